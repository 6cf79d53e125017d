"""The error with which the rooms of the relay refuse what a request asks for; `relay.api.errors` gives it its form.

It stands by itself so that what decides needs nothing of what answers, commands of the operator in particular.
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


def unavailable(sentence: str) -> ApiError:
    """The answer where it is the relay that cannot do its part now, and may soon."""
    return ApiError(503, "ServiceUnavailable", sentence, headers={"Retry-After": "5"})


def too_many(sentence: str, seconds: int) -> ApiError:
    """The refusal of somebody who asks for too much, and may ask again in so many seconds."""
    return ApiError(429, "TooManyRequests", sentence, headers={"Retry-After": str(seconds)})
