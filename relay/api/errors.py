"""Errors of the HTTP APIs, each in the shape that clients of that Globus service understand.

Routes raise `ApiError`; everything else that can go wrong (a malformed document, an unknown route, an error of our
own) is turned into one here, so that no answer is ever anything but JSON in the right shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An answer other than success.

    ``status`` is the HTTP status, ``code`` the service's own word (``EndpointNotFound``, ``invalid_grant``) and
    ``message`` one sentence for people. ``extra`` is added to the document's top level, ``headers`` to the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.extra: dict[str, Any] = dict(extra or {})
        self.headers: dict[str, str] = dict(headers or {})
