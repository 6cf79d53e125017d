"""The part of the developers' API that is about scopes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.api.bearer import Caller
from relay.api.developer import Developer, body_of, reading, scope_reader, writing
from relay.applications import custom_scopes
from relay.applications.documents import MAX_LIST, invalid

router = APIRouter(prefix="/v2/api", tags=["Auth"])

Reader = Annotated[Caller, Depends(scope_reader)]


@router.get("/scopes")
async def list_scopes(
    request: Request, caller: Reader, ids: str | None = None, scope_strings: str | None = None
) -> dict[str, Any]:
    """The scopes with these ids or strings that the caller may see; without either, those of the caller's clients."""
    if ids is not None and scope_strings is not None:
        raise invalid("Give either ids or scope_strings, not both.")
    by_id, by_string = _split(ids), _split(scope_strings)

    def work(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        if ids is None and scope_strings is None:
            mine = custom_scopes.administered(connection, subject)
            return [custom_scopes.scope_document(connection, one) for one in mine]
        return custom_scopes.look_up(connection, subject, ids=by_id, strings=by_string)

    return {"scopes": await reading(request, caller, work)}


def _split(text: str | None) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if len(parts) > MAX_LIST:
        raise invalid(f"At most {MAX_LIST} scopes may be asked for at once.")
    return parts


@router.post("/clients/{client_id}/scopes", status_code=201)
async def create_scope(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """A new scope of a client."""
    document = await body_of(request, "scope")

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        made = custom_scopes.create(connection, client_id, document, subject)
        return custom_scopes.scope_document(connection, made)

    return {"scope": await writing(request, caller, work)}


@router.get("/scopes/{scope_id}")
async def show_scope(request: Request, scope_id: str, caller: Reader) -> dict[str, Any]:
    """One scope."""
    return {"scope": await reading(request, caller, lambda c, subject: custom_scopes.look(c, scope_id, subject))}


@router.put("/scopes/{scope_id}")
async def update_scope(request: Request, scope_id: str, caller: Developer) -> dict[str, Any]:
    """Change a scope."""
    document = await body_of(request, "scope")

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = custom_scopes.require(connection, scope_id, subject)
        return custom_scopes.scope_document(connection, custom_scopes.change(connection, found, document, subject))

    return {"scope": await writing(request, caller, work)}


@router.delete("/scopes/{scope_id}")
async def delete_scope(request: Request, scope_id: str, caller: Developer) -> dict[str, Any]:
    """Delete a scope."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = custom_scopes.require(connection, scope_id, subject)
        document = custom_scopes.scope_document(connection, found)
        custom_scopes.remove(connection, found)
        return document

    return {"scope": await writing(request, caller, work)}
