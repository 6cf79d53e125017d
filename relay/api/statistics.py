"""What the relay says of itself, for its administrators: as JSON, and for Prometheus.

Metrics carry no labels, so their number does not grow with users, endpoints or tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from fastapi import APIRouter, Depends, Request, Response

from relay.auth.administrators import is_administrator
from relay.auth.bearer import Caller, transfer_caller
from relay.refusal import ApiError
from relay.services import services_of

router = APIRouter(tags=["Towpath"])

# Text exposition format of Prometheus, version 0.0.4.
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


async def administrator(request: Request) -> Caller:
    """The caller, who must administer the relay itself. Raises `ApiError` 401, 403."""
    caller = await transfer_caller(request)

    if not await services_of(request).store.read(lambda connection: is_administrator(connection, caller.identity_id)):
        raise ApiError(403, "PermissionDenied", "Only administrators of this relay may see how it does.")
    return caller


def _now(request: Request) -> Mapping[str, Mapping[str, Any]]:
    return cast("Callable[[], Mapping[str, Mapping[str, Any]]]", request.app.state.statistics)()


@router.get("/towpath/v1/statistics", dependencies=[Depends(administrator)])
async def statistics(request: Request) -> dict[str, dict[str, Any]]:
    """The counters of every part."""
    return {part: dict(values) for part, values in _now(request).items()}


@router.get("/metrics", dependencies=[Depends(administrator)])
async def metrics(request: Request) -> Response:
    """The same numbers for Prometheus; scrape with a token of an administrator."""
    text = "".join(exposition(_now(request)))
    return Response(text, media_type=EXPOSITION, headers={"Cache-Control": "no-store"})


def exposition(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the text format: one metric for each number, named ``towpath_<part>_<field>``."""
    for part, values in sorted(parts.items()):
        for field, value in sorted(values.items()):
            if isinstance(value, bool | int | float):
                name = _NOT_A_NAME.sub("_", f"towpath_{part}_{field}")
                yield f"# TYPE {name} untyped\n{name} {float(value):.17g}\n"
