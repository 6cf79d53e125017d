"""What the Transfer routes share: reading a body, writing an answer, the caller, the views of documents."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import trio
from fastapi import Depends, Request, Response
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.access.principals import subject_of
from relay.api.bearer import Caller, transfer_caller
from relay.api.documents import NOT_JSON, decoded_untrusted
from relay.api.errors import request_id_of
from relay.auth.identities import select_by_ids
from relay.services import Services, services_here
from relay.transfer import collections, nodes
from relay.transfer.collection_documents import View
from relay.transfer.collections import Collection
from relay.transfer.fields import bad_request
from relay.transfer.task_documents import Surroundings

PREFIX = "/v0.10"
# Longer answers are written in a thread, so that nobody else waits for them.
_MANY = 200

CallerHere = Annotated[Caller, Depends(transfer_caller)]
ServicesHere = Annotated[Services, Depends(services_here)]


async def read_document(request: Request) -> Any:
    """The JSON of a request's body. Raises `ApiError`: 400, and 503 while too much is held of such documents."""
    body = await request.body()
    if not body:
        raise bad_request("The request needs a JSON document.")
    try:
        return await decoded_untrusted(request, body)
    except NOT_JSON as error:
        raise bad_request("The body of the request is not JSON.") from error


def answer(document: dict[str, Any], status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(document), status, media_type="application/json")


async def answer_large(document: dict[str, Any]) -> Response:
    """A JSON answer whose ``DATA`` may be long."""
    if len(document["DATA"]) < _MANY:
        return answer(document)
    return await trio.to_thread.run_sync(answer, document)


def result(
    request: Request, code: str, message: str, *, data_type: str = "result", status: int = 200, **more: Any
) -> Response:
    """The envelope of a successful change."""
    document = {
        "DATA_TYPE": data_type,
        "code": code,
        "message": message,
        "request_id": request_id_of(request),
        "resource": request.scope["path"],
        **more,
    }
    return answer(document, status)


def wanted_fields(request: Request) -> frozenset[str] | None:
    """The keys a client asked for with ``fields``; None means all."""
    text = request.query_params.get("fields")
    return None if not text else frozenset(part.strip() for part in text.split(",") if part.strip())


async def views(services: Services, caller: Caller, shown: list[Collection]) -> list[View]:
    """What documents of collections need beside them, in one look."""

    now = services.clock()

    def work(connection: Connection) -> tuple[dict[str, str], set[str], set[str], Subject]:
        owners = select_by_ids(connection, {collection.owner_id for collection in shown})
        used = collections.in_use_by(connection, caller.identity_id, [collection.id for collection in shown])
        resting = nodes.paused(connection, {collection.node_id for collection in shown if collection.node_id})
        subject = subject_of(connection, caller.identity_id, now)
        return {id_: owner.username for id_, owner in owners.items()}, used, resting, subject

    names, used, resting, subject = await services.store.read(work)
    return [
        View(
            subject=subject,
            owner=names.get(collection.owner_id, collection.owner_id),
            connected=collection.node_id is not None and services.registry.is_connected(collection.node_id),
            paused=collection.node_id in resting,
            in_use=collection.id in used,
        )
        for collection in shown
    ]


def surroundings(
    services: Services, known: dict[str, Collection], unseen: frozenset[str] = frozenset()
) -> Surroundings:
    """What task documents need beside their tasks."""
    return Surroundings(known, services.clock(), services.registry.is_connected, unseen)
