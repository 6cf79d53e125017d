"""Serves the project's signed releases as plain files: `/updates/…` and `/install.sh`.

The relay is a mere mirror. It holds no key of the project's; agents and `install.sh` check every signature against keys
pinned in themselves, so what stands here can be withheld, but not changed.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from relay.refusal import ApiError
from relay.services import services_of

router = APIRouter(tags=["Towpath"])


@router.get("/updates/{path:path}", response_class=FileResponse)
async def update_file(request: Request, path: str) -> FileResponse:
    """A file of the releases. Needs no token."""
    return _file(request, path)


@router.get("/install.sh", response_class=FileResponse)
async def install_script(request: Request) -> FileResponse:
    """The installer for Linux and macOS. Needs no token."""
    return _file(request, "install/install.sh")


def _file(request: Request, path: str) -> FileResponse:
    top = services_of(request).settings.updates_path
    if top is None:
        raise ApiError(404, "NotFound", "This relay offers no releases.")
    top = top.resolve()
    try:
        file = (top / path).resolve()
        found = file.is_relative_to(top) and file.is_file()
    except (OSError, ValueError, RuntimeError):
        # What no file can be called: too long, with a zero in it, or a link in a circle.
        found = False
    if not found:
        raise ApiError(404, "NotFound", "There is no such file among the releases.")
    return FileResponse(file, media_type="application/octet-stream")
