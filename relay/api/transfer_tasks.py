"""Transfer API: tasks of the caller."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from relay.api.transfer_frame import (
    PREFIX,
    CallerHere,
    ServicesHere,
    answer,
    answer_large,
    read_document,
    result,
    surroundings,
    wanted_fields,
)
from relay.transfer import event_log, nodes, task_details, task_filters, task_lists, task_rows, task_turns
from relay.transfer.collection_documents import only_fields
from relay.transfer.collections import Collection
from relay.transfer.fields import Fields, query_integer
from relay.transfer.submission import read_bandwidth_limit, read_deadline, read_label
from relay.transfer.task_documents import Surroundings, name_for_reader, task_document
from relay.transfer.task_rows import Task

router = APIRouter(prefix=PREFIX, tags=["Transfer"])

# A cancel that the agent confirms within this many seconds is answered as done.
CANCEL_PATIENCE = 3.0

_CANCEL_MESSAGES = {
    task_turns.CANCEL_DONE: "The task has been cancelled successfully.",
    task_turns.CANCEL_ACCEPTED: "The cancellation is under way; the task stops as soon as its agent hears of it.",
    task_turns.TASK_COMPLETE: "The task completed before the cancel request was processed.",
}


@router.get("/task_list")
async def task_list(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """The caller's tasks."""
    parameters = request.query_params
    limit, offset = _page(parameters, default=task_lists.DEFAULT_LIMIT)
    filters = task_filters.conditions(*parameters.getlist("filter"))
    work = partial(
        task_lists.own_tasks,
        identity_id=caller.identity_id,
        now=services.clock(),
        conditions=filters,
        order=task_filters.order(parameters.get("orderby")),
        limit=limit,
        offset=offset,
    )
    page = await services.store.read(work)
    around, fields = surroundings(services, page.collections, page.unseen), wanted_fields(request)
    rows = [only_fields(task_document(task, around), fields) for task in page.tasks]
    return await answer_large(
        {
            "DATA_TYPE": "task_list",
            "DATA": rows,
            "length": len(rows),
            "limit": limit,
            "offset": offset,
            "total": page.total,
        }
    )


def _page(parameters: Any, *, default: int) -> tuple[int, int]:
    limit = query_integer(parameters.get("limit"), "limit", default=default, lowest=1, highest=task_lists.MAX_LIMIT)
    offset = query_integer(parameters.get("offset"), "offset", default=0, lowest=0, highest=task_lists.MAX_OFFSET)
    return limit, offset


async def _own(services: ServicesHere, caller: CallerHere, task_id: str) -> Task:
    return await services.store.read(partial(task_rows.require_own, task_id=task_id, identity_id=caller.identity_id))


async def _seen(services: ServicesHere, caller: CallerHere, task_id: str) -> tuple[Task, Surroundings]:
    """A task of the caller, with its collections as far as they may see them now."""
    now = services.clock()

    def work(connection: Connection) -> tuple[Task, dict[str, Collection], frozenset[str]]:
        task = task_rows.require_own(connection, task_id, caller.identity_id)
        known = task_lists.collections_of(connection, [task])
        return task, known, task_lists.unseen(connection, known, caller.identity_id, now)

    task, known, unseen = await services.store.read(work)
    return task, surroundings(services, known, unseen)


@router.get("/task/{task_id}")
async def show_task(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One task."""
    task, around = await _seen(services, caller, task_id)
    return answer(only_fields(task_document(task, around), wanted_fields(request)))


@router.put("/task/{task_id}")
async def update_task(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Change the label or the deadline of a task that is not over, or (ours, beside theirs) its limit of bandwidth."""
    fields = Fields(await read_document(request), "the task")
    fields.data_type("task")
    changes: dict[str, Any] = {}
    if "label" in fields:
        changes["label"] = read_label(fields)
    if fields.raw("deadline") is not None:
        changes["deadline"] = read_deadline(fields, services.clock())
    limited, limit = "towpath_bandwidth_limit" in fields, read_bandwidth_limit(fields)

    def work(connection: Connection) -> str:
        task = task_rows.require_own(connection, task_id, caller.identity_id)
        if limited:
            changes["options"] = task_turns.options_with(task, bandwidth_limit=limit)
        task_turns.update(connection, task, changes)
        return task.id

    services.steward.wake(await services.store.write(work))
    return result(request, "Updated", "Updated task successfully")


@router.post("/task/{task_id}/cancel")
async def cancel_task(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Cancel a task. Cancelling twice, or what is over, changes nothing."""
    now = services.clock()

    def work(connection: Connection) -> tuple[str, str, str | None]:
        task = task_rows.require_own(connection, task_id, caller.identity_id)
        code = task_turns.cancel(connection, task, now)
        return task.id, code, nodes.of_collection(connection, task.worker_id)

    found, code, node_id = await services.store.write(work)
    services.steward.wake(found)
    # An agent that is away confirms nothing; nobody needs to wait for it.
    if code == task_turns.CANCEL_ACCEPTED and node_id is not None and services.registry.is_connected(node_id):
        await services.steward.wait_finished(found, CANCEL_PATIENCE)
        task = await _own(services, caller, found)
        if task.finished:
            code = task_turns.CANCEL_DONE if task.state == "CANCELED" else task_turns.TASK_COMPLETE
    return result(request, code, _CANCEL_MESSAGES[code])


@router.post("/task/{task_id}/remove")
async def remove_task(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Leave a task that is over out of the caller's lists."""

    def work(connection: Connection) -> None:
        task_turns.hide(connection, task_rows.require_own(connection, task_id, caller.identity_id))

    await services.store.write(work)
    return result(request, "Removed", "The task was removed from the history")


@router.get("/task/{task_id}/event_list")
async def event_list(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """What happened to a task, newest first."""
    parameters = request.query_params
    limit, offset = _page(parameters, default=task_lists.DEFAULT_LIMIT)
    kind = task_filters.event_kind(parameters.get("filter"))

    def work(connection: Connection) -> dict[str, Any]:
        task = task_rows.require_own(connection, task_id, caller.identity_id)
        return event_log.event_list(connection, task.id, is_error=kind, limit=limit, offset=offset)

    return answer(await services.store.read(work))


@router.get("/task/{task_id}/successful_transfers")
async def successful_transfers(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """What has been transferred so far, also while the task runs."""
    return await _details(request, task_id, caller, services, task_details.successful_transfers)


async def _details(
    request: Request, task_id: str, caller: CallerHere, services: ServicesHere, page: Callable[..., Any]
) -> Response:
    task, around = await _seen(services, caller, task_id)
    marker, limit = _marker(request)
    worker, name = around.collections.get(task.worker_id), name_for_reader(task, task.worker_id, around) or "?"
    document = await page(services.registry, task, worker, name, marker, limit)
    return await answer_large(document)


@router.get("/task/{task_id}/skipped_errors")
async def skipped_errors(request: Request, task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """What was left out, and why."""
    return await _details(request, task_id, caller, services, task_details.skipped_errors)


def _marker(request: Request) -> tuple[str | None, int]:
    parameters = request.query_params
    limit = query_integer(
        parameters.get("limit"), "limit", default=task_details.PAGE, lowest=1, highest=task_details.PAGE
    )
    return parameters.get("marker") or None, limit


@router.get("/task/{task_id}/pause_info")
async def pause_info(task_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Which pause rules hold a task up, and what its agents' owners say about it."""
    task = await _own(services, caller, task_id)
    observed = task.last_observed
    paused = task.state == "PAUSED" and not task.finished and observed is not None
    message = None if observed is None or not paused else observed.status_sentence or "The owner paused this task."
    from_source = observed is not None and observed.who == "source owner"
    return answer(
        {
            "DATA_TYPE": "pause_info_limited",
            "pause_rules": [],
            "source_pause_message": message if from_source else None,
            "destination_pause_message": None if from_source else message,
            "source_pause_message_share": None,
            "destination_pause_message_share": None,
        }
    )
