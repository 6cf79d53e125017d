"""Transfer API: submission of transfer and delete tasks."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import trio
from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from relay.api.transfer_frame import PREFIX, CallerHere, ServicesHere, answer, read_document, result
from relay.audit.notes import note
from relay.transfer import collections, task_turns
from relay.transfer.fields import is_uuid
from relay.transfer.submission import Homes, Submission, read_delete, read_transfer
from relay.transfer.task_rows import pack_items

router = APIRouter(prefix=PREFIX, tags=["Transfer"])

# Submissions with more items are read in a thread, so that nobody else waits for them.
_MANY = 200


@router.get("/submission_id")
async def submission_id(caller: CallerHere) -> Response:
    """A fresh id, with which a submission may be repeated without making a second task."""
    return answer({"DATA_TYPE": "submission_id", "value": str(uuid.uuid4())})


@router.post("/transfer", status_code=202)
async def submit_transfer(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """Submit a transfer."""
    return await _submit(request, caller, services, "transfer", read_transfer)


@router.post("/delete", status_code=202)
async def submit_delete(request: Request, caller: CallerHere, services: ServicesHere) -> Response:
    """Submit a delete."""
    return await _submit(request, caller, services, "delete", read_delete)


async def _submit(
    request: Request, caller: CallerHere, services: ServicesHere, word: str, read: Callable[..., Submission]
) -> Response:
    document = await read_document(request)
    present, homes = await _known(document, word.upper(), caller, services)
    if present is not None:
        return _accepted(request, word, str(document["submission_id"]).lower(), present, task_turns.DUPLICATE)
    now = services.clock()
    tasks = services.settings.tasks

    def prepare() -> tuple[Submission, bytes]:
        submission = read(document, homes=homes, max_items=tasks.max_items, now=now)
        return submission, pack_items(submission.items)

    many = isinstance(document, dict) and isinstance(document.get("DATA"), list) and len(document["DATA"]) >= _MANY
    submission, items = await trio.to_thread.run_sync(prepare) if many else prepare()
    accept = partial(
        task_turns.accept,
        submission=submission,
        items=items,
        owner_id=caller.identity_id,
        owner=caller.username,
        deadline=now + float(tasks.deadline),
        now=now,
        most=services.settings.limits.user_tasks,
    )
    source, destination = submission.source_id, submission.destination_id or ""
    note(request, source_id=source, destination_id=destination, items=str(len(submission.items)))

    def work(connection: Connection) -> tuple[str, str]:
        made, word_of_code = accept(connection)
        note(request, task_id=made)
        return made, word_of_code

    # From here on the task exists, whether or not the client hears of it; its submission id finds it again.
    task_id, code = await services.store.write(work)
    services.steward.wake(task_id)
    return _accepted(request, word, submission.submission_id, task_id, code)


async def _known(document: Any, kind: str, caller: CallerHere, services: ServicesHere) -> tuple[str | None, Homes]:
    """The task that this very submission has made already, and where its collections have their homes."""
    fields = document if isinstance(document, dict) else {}
    given = fields.get("submission_id")
    places = [fields.get(key) for key in ("source_endpoint", "destination_endpoint", "endpoint")]
    ids = [str(place).lower() for place in places if is_uuid(place)]
    now = services.clock()

    def work(connection: Connection) -> tuple[str | None, Homes]:
        present = None
        if is_uuid(given):
            present = task_turns.find_submission(connection, caller.identity_id, str(given).lower(), kind)
        return present, collections.homes(connection, ids, caller.identity_id, now)

    return await services.store.read(work)


def _accepted(request: Request, word: str, submission: str, task_id: str, code: str) -> Response:
    message = f"The {word} has been accepted and a task has been created and queued for execution"
    if code == task_turns.DUPLICATE:
        message = f"The {word} was submitted before under this submission id; nothing new was created"
    return result(
        request,
        code,
        message,
        data_type=f"{word}_result",
        status=202,
        submission_id=submission,
        task_id=task_id,
        task_link={
            "DATA_TYPE": "link",
            "href": f"{PREFIX}/task/{task_id}?format=json",
            "rel": "related",
            "resource": "task",
            "title": "related task",
        },
    )
