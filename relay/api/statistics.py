"""What the relay says of itself, for its administrators: as JSON, and for Prometheus (`relay.metrics`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import trio
from fastapi import APIRouter, Depends, Request, Response

from relay.api.bearer import Caller, transfer_caller
from relay.auth.administrators import is_administrator
from relay.metrics import exposition
from relay.process import numbers_of_process
from relay.refusal import ApiError
from relay.services import services_of
from relay.store.kept import numbers_of_files, numbers_of_rows

router = APIRouter(tags=["Towpath"])

# Text exposition format of Prometheus, version 0.0.4.
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


async def administrator(request: Request) -> Caller:
    """The caller, who must administer the relay itself. Raises `ApiError` 401, 403."""
    caller = await transfer_caller(request)

    if not await services_of(request).store.read(lambda connection: is_administrator(connection, caller.identity_id)):
        raise ApiError(403, "PermissionDenied", "Only administrators of this relay may see how it does.")
    return caller


async def _now(request: Request) -> dict[str, Mapping[str, Any]]:
    """The counters of every part, and what is kept and used by now."""
    services = services_of(request)
    parts = cast("Callable[[], Mapping[str, Mapping[str, Any]]]", request.app.state.statistics)()
    rows = await services.store.read(numbers_of_rows)
    # Both ask the kernel, of a disk that may be slow and of thousands of descriptors.
    files = await trio.to_thread.run_sync(numbers_of_files, services.store.path)
    process = await trio.to_thread.run_sync(numbers_of_process)
    return {**parts, "kept": {**rows, **files}, "process": process}


@router.get("/towpath/v1/statistics", dependencies=[Depends(administrator)])
async def statistics(request: Request) -> dict[str, dict[str, Any]]:
    """The counters of every part."""
    return {part: dict(values) for part, values in (await _now(request)).items()}


@router.get("/metrics", dependencies=[Depends(administrator)])
async def metrics(request: Request) -> Response:
    """The same numbers for Prometheus; scrape with a token of an administrator."""
    text = exposition(request.app.version, await _now(request))
    return Response(text, media_type=EXPOSITION, headers={"Cache-Control": "no-store"})
