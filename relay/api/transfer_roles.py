"""Transfer API: roles on collections."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from relay.access.decisions import Ability
from relay.api.transfer_frame import PREFIX, CallerHere, ServicesHere, answer, read_document, result
from relay.audit.notes import note
from relay.transfer import collections, roles, task_turns

router = APIRouter(prefix=PREFIX, tags=["Transfer"])


@router.get("/endpoint/{endpoint_id}/role_list")
async def role_list(endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """All roles, the owner's first."""
    now = services.clock()

    def work(connection: Connection) -> list[roles.Grant]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        return roles.granted(connection, collection)

    rows = [roles.role_document(grant) for grant in await services.store.read(work)]
    return answer({"DATA_TYPE": "role_list", "DATA": rows, "length": len(rows), "endpoint": endpoint_id.lower()})


@router.post("/endpoint/{endpoint_id}/role", status_code=201)
async def create_role(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Give an identity a role."""
    document = await read_document(request)
    now = services.clock()

    def work(connection: Connection) -> roles.Grant:
        # Permission first: what is wrong with the document is told to those who may send it.
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        principal, role = roles.read_request(document)
        made = roles.grant(connection, collection, principal, role, now)
        note(request, role=made.role, principal=made.principal, role_id=str(made.id))
        return made

    grant = await services.store.write(work)
    return result(
        request,
        "Created",
        "Role created successfully",
        data_type="role",
        status=201,
        **{key: value for key, value in roles.role_document(grant).items() if key != "DATA_TYPE"},
    )


@router.get("/endpoint/{endpoint_id}/role/{role_id}")
async def show_role(endpoint_id: str, role_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One role."""
    now = services.clock()

    def work(connection: Connection) -> roles.Grant:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        return roles.find(connection, collection, role_id)

    return answer(roles.role_document(await services.store.read(work)))


@router.delete("/endpoint/{endpoint_id}/role/{role_id}")
async def delete_role(
    request: Request, endpoint_id: str, role_id: str, caller: CallerHere, services: ServicesHere
) -> Response:
    """Take a role away. Tasks that needed it end in the same moment."""
    now = services.clock()

    def work(connection: Connection) -> list[str]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        roles.withdraw(connection, collection, role_id)
        reason = f"The permission on “{collection.display_name}” that this task needs was withdrawn."
        return task_turns.end_where_access_is_gone(connection, collection.id, reason, now)

    for task_id in await services.store.write(work):
        services.steward.cut(task_id)
    return result(request, "Deleted", "Role deleted successfully")
