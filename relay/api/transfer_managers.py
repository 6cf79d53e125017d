"""Transfer API: the part for those who watch over collections (``/endpoint_manager``).

Reading works for everybody with the role administrator, activity_manager or activity_monitor on a collection. What
belongs to the other side of a task stays hidden from them. Pausing and cancelling for others is not offered yet.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import ColumnElement, Connection, false, func

from relay.access.decisions import Ability, Subject
from relay.access.principals import subject_of
from relay.api.transfer_frame import PREFIX, CallerHere, ServicesHere, answer, surroundings
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer import closed_owners, collections, event_log, task_filters, task_lists, task_rows
from relay.transfer.collections import Collection
from relay.transfer.fields import bad_request, is_uuid, query_boolean, query_integer
from relay.transfer.task_documents import OFFLINE, Surroundings, holdup, task_document
from relay.transfer.task_rows import Task

router = APIRouter(prefix=f"{PREFIX}/endpoint_manager", tags=["Transfer"])

_OTHER_SIDE = ("_endpoint", "_endpoint_id", "_endpoint_display_name", "_base_path", "_local_user")
_EXTRA = ("host_endpoint", "host_endpoint_id", "host_endpoint_display_name", "host_path")
_MAPPED = ("mapped_collection_id", "mapped_collection_display_name")
_NOT_TOLD = "More is told to the task's owner, and to those who watch over both of its endpoints."


def admin_document(task: Task, around: Surroundings, sides: frozenset[str]) -> dict[str, Any]:
    """A task as those see it who watch over the given sides of it."""
    document = {**task_document(task, around), "owner_string": task.owner}
    for side in ("source", "destination"):
        document.update({f"{side}_{key}": None for key in (*_EXTRA, *_MAPPED)})
        document[f"{side}_local_user_status"] = "NO_PERMISSION"
        if side not in sides:
            document.update({f"{side}{key}": None for key in _OTHER_SIDE})
    # The file under way may be told by its name on either side.
    document["towpath"] = {**document["towpath"], "current": ""}
    if task.destination_id is not None and sides != {"source", "destination"}:
        _hide_words(document, task, around, sides)
    document["label"] = document["label"] if sides else None
    return document


def _hide_words(document: dict[str, Any], task: Task, around: Surroundings, sides: frozenset[str]) -> None:
    """Sentences name files, collections and addresses of either side; the codes stay."""
    if not task.finished:
        holding = holdup(task, around)
        own = holding.code == closed_owners.CODE or holding.who in {f"{side} owner" for side in sides}
        if not (own and holding.code in (OFFLINE, closed_owners.CODE)):
            document["nice_status_details"] = None
    if document["fatal_error"] is not None:
        document["fatal_error"] = {**document["fatal_error"], "description": _NOT_TOLD}
    document["towpath"]["path"] = ""


def _conditions(parameters: Any) -> list[ColumnElement[bool]]:
    column = tables.tasks.c
    held: list[ColumnElement[bool]] = []
    for name, clause in (("filter_status", "status"), ("filter_task_id", "task_id")):
        if parameters.get(name):
            held += task_filters.conditions(f"{clause}:{parameters[name]}")
    if parameters.get("filter_completion_time"):
        held += task_filters.conditions(f"completion_time:{parameters['filter_completion_time']}")
    for name in ("filter_owner_id", "filter_endpoint"):
        if parameters.get(name) and not is_uuid(parameters[name]):
            raise bad_request(f"{name} must be a UUID.")
    if parameters.get("filter_owner_id"):
        held.append(column.owner_id == parameters["filter_owner_id"].lower())
    if parameters.get("filter_endpoint"):
        held.append(_endpoint_condition(parameters["filter_endpoint"].lower(), parameters.get("filter_endpoint_use")))
    elif parameters.get("filter_endpoint_use"):
        raise bad_request("filter_endpoint_use needs filter_endpoint.")
    wanted = query_boolean(parameters.get("filter_is_paused"), "filter_is_paused")
    if wanted is not None:
        # The same as `is_paused` of the documents.
        paused = (column.status == "ACTIVE") & ((column.state == "PAUSED") | (column.desired == "pause"))
        held.append(paused if wanted else ~paused)
    if parameters.get("filter_min_faults"):
        least = query_integer(parameters["filter_min_faults"], "filter_min_faults", default=0, lowest=0, highest=10**9)
        held.append(func.coalesce(func.json_extract(column.observed, "$.counters.faults"), 0) >= least)
    if parameters.get("filter_local_user"):
        # Each agent works in its owner's account: no task has a local user.
        held.append(false())
    return held


def _endpoint_condition(endpoint_id: str, use: str | None) -> ColumnElement[bool]:
    column = tables.tasks.c
    if use not in (None, "", "source", "destination"):
        raise bad_request("filter_endpoint_use must be source or destination.")
    source, destination = column.source_id == endpoint_id, column.destination_id == endpoint_id
    return {"source": source, "destination": destination}.get(use or "", source | destination)


@router.get("/task_list")
async def managed_task_list(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """Tasks on collections that the caller watches over."""
    parameters = request.query_params
    limit = query_integer(parameters.get("limit"), "limit", default=100, lowest=1, highest=task_lists.MAX_LIMIT)
    last_key = parameters.get("last_key")
    after = task_lists.place_untrusted(last_key) if last_key else None
    conditions = _conditions(parameters)

    now = services.clock()

    def work(connection: Connection) -> tuple[task_lists.TaskPage, bool, Subject]:
        if watched := parameters.get("filter_endpoint"):
            # Which tasks use an endpoint is for those to ask who watch over it, also where they see the other side.
            collections.require(connection, watched, caller.identity_id, Ability.SEE_TASKS, now=now)
        subject = subject_of(connection, caller.identity_id, now)
        page, more = task_lists.watched_tasks(
            connection, subject=subject, conditions=conditions, after=after, limit=limit
        )
        return page, more, subject

    page, more, subject = await services.store.read(work)
    around = surroundings(services, page.collections)
    rows = [
        admin_document(task, around, task_lists.watched_sides(task, page.collections, subject)) for task in page.tasks
    ]
    return answer(
        {
            "DATA_TYPE": "task_list",
            "DATA": rows,
            "has_next_page": more,
            "last_key": task_lists.place_of(page.tasks[-1]) if page.tasks else None,
        }
    )


async def _watched(
    services: ServicesHere, caller: CallerHere, task_id: str
) -> tuple[Task, dict[str, Collection], frozenset[str]]:
    now = services.clock()

    def work(connection: Connection) -> tuple[Task, dict[str, Collection], frozenset[str]]:
        task = task_rows.load(connection, task_id.lower()) if is_uuid(task_id) else None
        if task is not None:
            known = task_lists.collections_of(connection, [task])
            sides = task_lists.watched_sides(task, known, subject_of(connection, caller.identity_id, now))
            if sides:
                return task, known, sides
        raise ApiError(404, "TaskNotFound", f"No such task '{task_id[:64]}'.")

    return await services.store.read(work)


@router.get("/task/{task_id}")
async def managed_task(task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One task on a collection that the caller watches over."""
    task, known, sides = await _watched(services, caller, task_id)
    return answer(admin_document(task, surroundings(services, known), sides))


@router.get("/task/{task_id}/event_list")
async def managed_event_list(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """What happened to such a task; descriptions may name files, so both sides must be the caller's to watch."""
    task, _, sides = await _watched(services, caller, task_id)
    if task.destination_id is not None and sides != {"source", "destination"}:
        raise ApiError(403, "PermissionDenied", "The events of this task also speak of an endpoint of others.")
    parameters = request.query_params
    limit = query_integer(parameters.get("limit"), "limit", default=10, lowest=1, highest=task_lists.MAX_LIMIT)
    offset = query_integer(parameters.get("offset"), "offset", default=0, lowest=0, highest=task_lists.MAX_OFFSET)
    kind = query_boolean(parameters.get("filter_is_error"), "filter_is_error")

    def work(connection: Connection) -> dict[str, Any]:
        return event_log.event_list(connection, task.id, is_error=kind, limit=limit, offset=offset)

    return answer(await services.store.read(work))


@router.get("/pause_rule_list")
async def pause_rule_list(caller: CallerHere) -> Response:
    """There are no pause rules yet."""
    return answer({"DATA_TYPE": "pause_rule_list", "DATA": []})


@router.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
async def not_offered(rest: str, caller: CallerHere) -> Response:
    """Everything else of this part of the API."""
    raise ApiError(501, "NotSupported", "This relay does not offer this part of the endpoint manager yet.")
