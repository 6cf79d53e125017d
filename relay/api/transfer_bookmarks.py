"""Transfer API: bookmarks."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from relay.api.transfer_frame import PREFIX, CallerHere, ServicesHere, answer, read_document, result
from relay.transfer import bookmarks

router = APIRouter(prefix=PREFIX, tags=["Transfer"])


@router.get("/bookmark_list")
async def bookmark_list(caller: CallerHere, services: ServicesHere) -> Response:
    """All bookmarks of the caller."""
    found = await services.store.read(partial(bookmarks.of, owner_id=caller.identity_id))
    return answer({"DATA_TYPE": "bookmark_list", "DATA": [bookmarks.bookmark_document(one) for one in found]})


@router.post("/bookmark", status_code=201)
async def create_bookmark(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """A new bookmark."""
    document = await read_document(request)
    work = partial(bookmarks.create, owner_id=caller.identity_id, document=document, now=services.clock())
    return answer(bookmarks.bookmark_document(await services.store.write(work)), 201)


@router.get("/bookmark/{bookmark_id}")
async def show_bookmark(bookmark_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One bookmark."""
    work = partial(bookmarks.find, owner_id=caller.identity_id, bookmark_id=bookmark_id)
    return answer(bookmarks.bookmark_document(await services.store.read(work)))


@router.put("/bookmark/{bookmark_id}")
async def update_bookmark(request: Request, bookmark_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Rename or pin a bookmark."""
    document = await read_document(request)
    work = partial(bookmarks.change, owner_id=caller.identity_id, bookmark_id=bookmark_id, document=document)
    return answer(bookmarks.bookmark_document(await services.store.write(work)))


@router.delete("/bookmark/{bookmark_id}")
async def delete_bookmark(request: Request, bookmark_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Delete a bookmark."""
    await services.store.write(partial(bookmarks.remove, owner_id=caller.identity_id, bookmark_id=bookmark_id))
    return result(request, "Deleted", f"Bookmark '{bookmark_id.lower()}' deleted successfully")
