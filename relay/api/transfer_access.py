"""Transfer API: access rules on collections. They decide at once; tasks that lose their permission end."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from relay.access.decisions import Ability
from relay.api.transfer_frame import PREFIX, CallerHere, ServicesHere, answer, read_document, result
from relay.audit.notes import note
from relay.refusal import ApiError
from relay.transfer import collections, roles, rules, task_turns
from relay.transfer.collections import Collection

router = APIRouter(prefix=PREFIX, tags=["Transfer"])


@router.get("/endpoint/{endpoint_id}/access_list")
async def access_list(endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """All access rules, after those who have access by being administrators."""
    now = services.clock()

    def work(connection: Connection) -> list[dict[str, Any]]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.SEE_RULES, now=now)
        implied = [
            rules.administrator_document(grant.principal_type, grant.principal, grant.id)
            for grant in roles.granted(connection, collection)
            if grant.role == "administrator"
        ]
        return [*implied, *(rules.rule_document(rule) for rule in rules.listed(connection, collection.id))]

    rows = await services.store.read(work)
    return answer({"DATA_TYPE": "access_list", "DATA": rows, "length": len(rows), "endpoint": endpoint_id.lower()})


@router.post("/endpoint/{endpoint_id}/access", status_code=201)
async def create_rule(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Open a folder to somebody."""
    document = await read_document(request)
    now = services.clock()

    def work(connection: Connection) -> rules.StoredRule:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.CHANGE_RULES, now=now)
        new = rules.read_request(document, now)
        _check_shareable(collection)
        writable = not collection.disable_anonymous_writes
        made = rules.add(connection, collection.id, new, writable=writable, now=now)
        note(
            request,
            rule_id=made.id,
            principal=f"{made.principal_type} {made.principal}".strip(),
            path=made.path,
            permissions=made.permissions,
        )
        return made

    rule = await services.store.write(work)
    return result(
        request,
        "Created",
        "Access rule created successfully.",
        data_type="access_create_result",
        status=201,
        access_id=rule.id,
    )


def _check_shareable(collection: Collection) -> None:
    if not collection.shareable:
        raise ApiError(
            403,
            "PermissionDenied",
            f"“{collection.display_name}” cannot be shared: the configuration of its owner's agent does not say "
            "`sharing: true` (`towpath collection update NAME --sharing`, on its machine).",
        )


@router.get("/endpoint/{endpoint_id}/access/{rule_id}")
async def show_rule(endpoint_id: str, rule_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One access rule."""
    now = services.clock()

    def work(connection: Connection) -> rules.StoredRule:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.SEE_RULES, now=now)
        return rules.find(connection, collection.id, rule_id)

    return answer(rules.rule_document(await services.store.read(work)))


@router.put("/endpoint/{endpoint_id}/access/{rule_id}")
async def update_rule(
    request: Request, endpoint_id: str, rule_id: str, caller: CallerHere, services: ServicesHere
) -> Response:
    """Change what a rule allows, or until when. Tasks that needed more end in the same moment."""
    document = await read_document(request)
    now = services.clock()

    def work(connection: Connection) -> list[str]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.CHANGE_RULES, now=now)
        rule = rules.find(connection, collection.id, rule_id)
        writable = not collection.disable_anonymous_writes
        rules.change(connection, rule, document, writable=writable, now=now)
        return task_turns.end_where_access_is_gone(connection, collection.id, _reason(collection), now)

    for task_id in await services.store.write(work):
        services.steward.cut(task_id)
    return result(request, "Updated", "Access rule updated successfully.")


@router.delete("/endpoint/{endpoint_id}/access/{rule_id}")
async def delete_rule(
    request: Request, endpoint_id: str, rule_id: str, caller: CallerHere, services: ServicesHere
) -> Response:
    """Close a folder again. Tasks that needed the rule end in the same moment."""
    now = services.clock()

    def work(connection: Connection) -> list[str]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.CHANGE_RULES, now=now)
        rules.remove(connection, rules.find(connection, collection.id, rule_id).id)
        return task_turns.end_where_access_is_gone(connection, collection.id, _reason(collection), now)

    for task_id in await services.store.write(work):
        services.steward.cut(task_id)
    return result(request, "Deleted", "Access rule deleted successfully.")


def _reason(collection: Collection) -> str:
    return f"The permission on “{collection.display_name}” that this task needs was withdrawn."
