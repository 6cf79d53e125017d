"""Transfer API: endpoints (which here are collections): search, create, show, describe, delete."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from relay.access.decisions import Ability
from relay.access.principals import subject_of
from relay.api.transfer_frame import (
    PREFIX,
    CallerHere,
    ServicesHere,
    answer,
    read_document,
    result,
    views,
    wanted_fields,
)
from relay.refusal import ApiError
from relay.transfer import collections, enrolment, search, task_turns
from relay.transfer.collection_documents import endpoint_document, only_fields, server_list
from relay.transfer.collections import Collection
from relay.transfer.fields import BAD_REQUEST, Fields, query_integer

router = APIRouter(prefix=PREFIX, tags=["Transfer"])


@router.get("/endpoint_search")
async def endpoint_search(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """Collections that the caller may know of."""
    parameters = request.query_params
    query = search.read(
        parameters,
        limit=query_integer(
            parameters.get("limit"), "limit", default=search.MAX_LIMIT, lowest=1, highest=search.MAX_LIMIT
        ),
        offset=query_integer(parameters.get("offset"), "offset", default=0, lowest=0, highest=search.MAX_OFFSET),
    )
    now = services.clock()

    def work(connection: Connection) -> tuple[list[Collection], bool]:
        subject = subject_of(connection, caller.identity_id, now)
        return search.find(connection, query, subject, caller.identity_id)

    found, more = await services.store.read(work)
    fields = wanted_fields(request)
    rows = [
        only_fields(endpoint_document(collection, view), fields)
        for collection, view in zip(found, await views(services, caller, found), strict=True)
    ]
    return answer(
        {
            "DATA_TYPE": "endpoint_list",
            "DATA": rows,
            "length": len(rows),
            "limit": query.limit,
            "offset": query.offset,
            "has_next_page": more,
        }
    )


@router.post("/endpoint", status_code=201)
async def create_endpoint(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """A new collection and the setup key with which an agent comes to serve it."""
    document = await read_document(request)
    collection_id, setup_key = await enrolment.create_mapped_collection(
        services.store, services.settings, caller.identity_id, document, now=services.clock()
    )
    return result(
        request,
        "Created",
        "Endpoint created successfully",
        data_type="endpoint_create_result",
        status=201,
        id=collection_id,
        globus_connect_setup_key=setup_key,
    )


@router.post("/shared_endpoint")
async def create_shared_endpoint(caller: CallerHere) -> Response:
    """Guest collections come with sharing, which this relay does not have yet."""
    raise ApiError(
        501,
        "NotSupported",
        "This relay does not offer guest collections yet; share a folder of the collection: `towpath share add`, "
        "or `globus endpoint permission create`.",
    )


async def _require(services: ServicesHere, caller: CallerHere, endpoint_id: str, ability: Ability) -> Collection:
    return await services.store.read(
        partial(
            collections.require,
            collection_id=endpoint_id,
            identity_id=caller.identity_id,
            ability=ability,
            now=services.clock(),
        )
    )


@router.get("/endpoint/{endpoint_id}")
async def show_endpoint(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One collection."""
    collection = await _require(services, caller, endpoint_id, Ability.SEE)
    (view,) = await views(services, caller, [collection])
    return answer(only_fields(endpoint_document(collection, view), wanted_fields(request)))


@router.put("/endpoint/{endpoint_id}")
async def update_endpoint(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Change how a collection is described: only keys that are present change."""
    fields = Fields(await read_document(request), "the endpoint")
    fields.data_type("endpoint")
    values = collections.read_description(fields, creating=False)
    now = services.clock()

    def work(connection: Connection) -> list[str]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        disable = values.get("disable_verify", collection.disable_verify)
        if disable and values.get("force_verify", collection.force_verify):
            raise ApiError(400, BAD_REQUEST, "disable_verify and force_verify cannot both be true.")
        collections.change(connection, collection.id, values)
        if not values.get("disable_anonymous_writes"):
            return []
        reason = f"“{collection.display_name}” does not let anybody write any more who was not named."
        return task_turns.end_where_access_is_gone(connection, collection.id, reason, now)

    for task_id in await services.store.write(work):
        services.steward.cut(task_id)
    return result(request, "Updated", "Endpoint updated successfully")


@router.delete("/endpoint/{endpoint_id}")
async def delete_endpoint(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Delete a collection. Files stay; active tasks on it end."""
    now = services.clock()

    def work(connection: Connection) -> tuple[Collection, list[str]]:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        collections.mark_deleted(connection, collection.id, now)
        reason = f"The collection “{collection.display_name}” was deleted."
        return collection, task_turns.end_where_access_is_gone(connection, collection.id, reason, now)

    deleted, ended = await services.store.write(work)
    for task_id in ended:
        services.steward.cut(task_id)
    if deleted.node_id is not None:
        services.steward.tell_missing(deleted.node_id, [deleted.id])
    return result(request, "Deleted", "Endpoint deleted successfully")


@router.put("/endpoint/{endpoint_id}/subscription")
async def set_subscription(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Accepted and kept; nothing here depends on a subscription."""
    fields = Fields(await read_document(request), "the subscription")
    values: dict[str, Any] = {"subscription_id": collections.read_subscription(fields)}
    await _change(services, caller, endpoint_id, values)
    return result(request, "Updated", "Endpoint updated successfully")


@router.put("/endpoint/{endpoint_id}/subscription_admin_verified")
async def set_subscription_admin_verified(
    request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere
) -> Response:
    """Accepted and kept."""
    fields = Fields(await read_document(request), "the subscription")
    if fields.raw("subscription_admin_verified") is None:
        raise ApiError(400, BAD_REQUEST, "subscription_admin_verified is missing.")
    values = {"subscription_admin_verified": fields.boolean("subscription_admin_verified", False)}
    await _change(services, caller, endpoint_id, values)
    return result(request, "Updated", "Endpoint updated successfully")


async def _change(services: ServicesHere, caller: CallerHere, endpoint_id: str, values: dict[str, Any]) -> None:
    now = services.clock()

    def work(connection: Connection) -> None:
        collection = collections.require(connection, endpoint_id, caller.identity_id, Ability.MANAGE, now=now)
        collections.change(connection, collection.id, values)

    await services.store.write(work)


@router.get("/endpoint/{endpoint_id}/my_shared_endpoint_list")
async def my_shared_endpoint_list(endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Guest collections on this collection: none, as long as there are none."""
    await _require(services, caller, endpoint_id, Ability.SEE)
    return answer({"DATA_TYPE": "endpoint_list", "DATA": []})


@router.get("/endpoint/{endpoint_id}/shared_endpoint_list")
async def shared_endpoint_list(endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Guest collections on this collection, for those who manage it."""
    await _require(services, caller, endpoint_id, Ability.MANAGE)
    return answer({"shared_endpoints": [], "next_token": None})


@router.get("/endpoint/{endpoint_id}/server_list")
async def endpoint_server_list(endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """The agent behind a collection, as a list of servers."""
    collection = await _require(services, caller, endpoint_id, Ability.SEE)
    (view,) = await views(services, caller, [collection])
    return answer(server_list(collection, view))


@router.get("/endpoint/{endpoint_id}/server/{server_id}")
async def endpoint_server(endpoint_id: str, server_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One server; there is one, with the id 0."""
    collection = await _require(services, caller, endpoint_id, Ability.SEE)
    (view,) = await views(services, caller, [collection])
    if server_id != "0":
        raise ApiError(404, "ServerNotFound", f"No such server '{server_id[:64]}' on this endpoint.")
    document: dict[str, Any] = server_list(collection, view)["DATA"][0]
    return answer(document)


@router.get("/endpoint/{endpoint_id}/my_effective_pause_rule_list")
async def my_effective_pause_rule_list(endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Pause rules that concern the caller: there are none yet."""
    await _require(services, caller, endpoint_id, Ability.SEE)
    return answer({"DATA_TYPE": "pause_rule_limited_list", "DATA": []})
