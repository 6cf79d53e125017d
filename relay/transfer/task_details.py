"""What was transferred and what was left out, read page by page from the agent that drives the task, at any time."""

from __future__ import annotations

from typing import Any

import msgspec

from protocol.control import Page, SkippedError, SuccessfulTransfer, decode_untrusted
from protocol.errors import TowpathError
from relay.refusal import ApiError
from relay.transfer.agents import AgentLinks
from relay.transfer.collections import Collection
from relay.transfer.fields import bad_request
from relay.transfer.operation_errors import Operation, disconnected, operation_error
from relay.transfer.task_rows import Task

PAGE = 1000
MAX_MARKER = 4096

DETAILS = Operation("TaskDetailsFailed", "NotFound")


async def successful_transfers(
    links: AgentLinks, task: Task, worker: Collection | None, name: str, marker: str | None, limit: int
) -> dict[str, Any]:
    """``GET /task/<id>/successful_transfers``; ``name`` is what the reader calls the worker. Raises `ApiError`."""
    if task.type != "TRANSFER":
        raise bad_request("Only transfer tasks have successful transfers.")
    return await _page(links, task, worker, name, "successful", SuccessfulTransfer, marker, limit)


async def skipped_errors(
    links: AgentLinks, task: Task, worker: Collection | None, name: str, marker: str | None, limit: int
) -> dict[str, Any]:
    """``GET /task/<id>/skipped_errors``. Raises `ApiError`."""
    return await _page(links, task, worker, name, "skipped", SkippedError, marker, limit)


_NAMES = {
    "successful": ("successful_transfers", "successful_transfer"),
    "skipped": ("skipped_errors", "skipped_error"),
}


async def _page(
    links: AgentLinks,
    task: Task,
    worker: Collection | None,
    name: str,
    kind: str,
    row_type: type[Any],
    marker: str | None,
    limit: int,
) -> dict[str, Any]:
    if marker is not None and len(marker) > MAX_MARKER:
        raise bad_request("marker is not one that was given out.")
    page = Page(rows=[])
    if task.attempted:
        page = await _ask(links, task, worker, name, kind, marker, limit)
    list_type, data_type = _NAMES[kind]
    # A delete goes nowhere.
    beside = {"destination_path": None} if task.type == "DELETE" else {}
    return {
        "DATA_TYPE": list_type,
        "marker": marker,
        "next_marker": page.next_marker,
        "DATA": [{"DATA_TYPE": data_type, **_row(row, row_type), **beside} for row in page.rows],
    }


async def _ask(
    links: AgentLinks, task: Task, worker: Collection | None, name: str, kind: str, marker: str | None, limit: int
) -> Page:
    if worker is None or worker.node_id is None or not links.is_connected(worker.node_id):
        raise disconnected(DETAILS, name, served=worker is None or worker.node_id is not None)
    query = [("limit", str(limit))]
    if marker:
        query.append(("marker", marker))
    try:
        answer = await links.call(
            worker.node_id, "GET", f"/link/tasks/{task.id}/{kind}", query=query, caller=task.owner_id
        )
        page = decode_untrusted(answer, Page)
    except TowpathError as error:
        raise operation_error(DETAILS, error, name) from error
    if len(page.rows) > limit or len(page.next_marker or "") > MAX_MARKER:
        raise ApiError(
            502, "ExternalError.TaskDetailsFailed.EndpointError", f"The agent of “{name}” answered too much."
        )
    return page


def _row(row: dict[str, Any], row_type: type[Any]) -> dict[str, Any]:
    try:
        document: dict[str, Any] = msgspec.to_builtins(msgspec.convert(row, row_type))
    except msgspec.ValidationError as error:
        raise ApiError(
            502, "ExternalError.TaskDetailsFailed.EndpointError", "The agent answered with a row that cannot be read."
        ) from error
    if document.get("is_delete_destination_extra"):
        # It is only at the destination.
        document["source_path"] = None
    return document
