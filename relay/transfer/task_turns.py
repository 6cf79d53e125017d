"""The turns a task takes at the relay: accepted, changed, cancelled, ended. Functions of one database transaction.

The relay owns what is *desired* of a task (`revision` counts its changes), the agent what is *observed*. As long as no
order has left (`attempted`), the relay can end a task alone; after that it asks the agent and waits for its word,
except where permission is gone or time is up: then the task ends here at once and the agent is told.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, or_, select

from protocol.control import TaskOptions
from relay.access.decisions import Ability
from relay.refusal import ApiError, too_many
from relay.store import transfer_tables as tables
from relay.store.auth_tables import identities
from relay.store.sign_in_tables import linked_identities
from relay.transfer import collections, event_log, rules, task_rows
from relay.transfer.collections import Collection
from relay.transfer.entitlement import Entitlements, spots
from relay.transfer.event_log import TaskEvent
from relay.transfer.submission import Submission
from relay.transfer.task_documents import CANCELED, DEADLINE_EXPIRED
from relay.transfer.task_rows import Scope, Task

# A ticket that was issued so many seconds from now was not issued by this clock as it goes now.
CLOCK_TROUBLE = 60.0
ACCEPTED, DUPLICATE = "Accepted", "Duplicate"
CANCEL_DONE, CANCEL_ACCEPTED, TASK_COMPLETE = "Canceled", "CancelAccepted", "TaskComplete"


def find_submission(connection: Connection, owner_id: str, submission_id: str, kind: str) -> str | None:
    """The task of this kind that this identity has already submitted under this id. Raises `ApiError` 409 where the id
    was used for the other kind: who takes a transfer for the delete that was asked for waits for the wrong thing."""
    task = tables.tasks.c
    query = select(task.id, task.type).where(task.owner_id == owner_id, task.submission_id == submission_id)
    found = connection.execute(query).one_or_none()
    if found is not None and found.type != kind:
        sentence = f"A {found.type.lower()} was submitted under this submission id; ask for a new one."
        raise ApiError(409, "Conflict", sentence)
    return None if found is None else str(found.id)


def accept(
    connection: Connection,
    submission: Submission,
    items: bytes,
    *,
    owner_id: str,
    owner: str,
    deadline: float,
    now: float,
    most: int = 0,
) -> tuple[str, str]:
    """Store a new task; returns its id and ``Accepted``, or the id of the same submission and ``Duplicate``.

    ``deadline`` holds when the submission has none, ``most`` bounds the tasks of one person that are not over (0: no
    bound). Raises `ApiError` when the caller may not read or write there, or has too many tasks.
    """
    present = find_submission(connection, owner_id, submission.submission_id, submission.type)
    if present is not None:
        return present, DUPLICATE
    known = _check_places(connection, submission, owner_id, now)
    if most and count_of_owner(connection, owner_id) >= most:
        raise too_many(f"You have {most} tasks that are not over, the most allowed; wait for some to end.", 60)
    task_id = str(uuid.uuid4())
    values: dict[str, Any] = {
        "id": task_id,
        "owner_id": owner_id,
        "owner": owner,
        "submission_id": submission.submission_id,
        "type": submission.type,
        "label": submission.label,
        "requested": now,
        "deadline": submission.deadline or deadline,
        "source_id": submission.source_id,
        "destination_id": submission.destination_id,
        "options": msgspec.json.encode(_options(submission, known)).decode(),
        # Its owner sees these names later on, also where they may not see any more what became of the collections.
        "submitted": json.dumps({**submission.echo, "names": {one.id: one.display_name for one in known}}),
        "item_count": len(submission.items),
        "session_id": str(uuid.uuid4()),
        **_NEW,
    }
    scope = Scope(submission.source_scope, submission.destination_scope, submission.changes)
    task_rows.insert_task(connection, values, items, scope)
    for one in known:
        collections.change(connection, one.id, {"last_accessed": now})
    return task_id, ACCEPTED


def _options(submission: Submission, known: Iterable[Collection]) -> TaskOptions:
    """The task's options: those that were asked for, and checksums where one of the collections demands them."""
    options = submission.options
    if submission.type != "TRANSFER" or options.verify_checksum:
        return options
    return msgspec.structs.replace(options, verify_checksum=any(one.force_verify for one in known))


def count_of_owner(connection: Connection, owner_id: str) -> int:
    """How many tasks of a person are not over."""
    task = tables.tasks.c
    statement = select(func.count()).where(task.owner_id == owner_id, task.status == "ACTIVE")
    return int(connection.execute(statement).scalar_one())


_NEW: dict[str, Any] = {
    "status": "ACTIVE",
    "state": "QUEUED",
    "hidden": False,
    "desired": "run",
    "revision": 1,
    "delivered": 0,
    "attempted": False,
    "last_seq": 0,
    "session_open": False,
    "closed": False,
}


def _check_places(connection: Connection, submission: Submission, owner_id: str, now: float) -> tuple[Collection, ...]:
    """The same as `entitled` asks later on, with an answer for people. Returns the collections of the task."""
    sources = []
    if submission.destination_id is not None:
        wanted = spots(submission.source_scope)
        read = collections.require(connection, submission.source_id, owner_id, Ability.READ, now=now, spots=wanted)
        sources.append(read)
    written = collections.require(
        connection,
        submission.destination_id or submission.source_id,
        owner_id,
        Ability.WRITE,
        now=now,
        spots=spots([*submission.destination_scope, *submission.changes]),
    )
    if written.node_id is not None and written.available and written.read_only:
        raise ApiError(403, "PermissionDenied", f"“{written.display_name}” is read-only by its owner's configuration.")
    return (*sources, written)


def finish(connection: Connection, task: Task, *, code: str, sentence: str, when: float) -> None:
    """End a task. ``code`` is SUCCEEDED, CANCELED, or what it failed with. A task ends only once."""
    if task.finished:
        return
    succeeded = code == "SUCCEEDED"
    state = code if code in ("SUCCEEDED", CANCELED) else "FAILED"
    fatal = None if succeeded else json.dumps({"code": code, "description": sentence[: event_log.MAX_DESCRIPTION]})
    task_rows.change(
        connection,
        task.id,
        status="SUCCEEDED" if succeeded else "FAILED",
        state=state,
        completed=max(when, task.requested),
        fatal_error=fatal,
        held_by=None,
        # An agent that never got the task need not be told of its end.
        closed=not task.attempted,
    )
    if code == DEADLINE_EXPIRED:
        event_log.add(
            connection, task.id, TaskEvent(code=DEADLINE_EXPIRED, description=sentence, time=when, is_error=True)
        )
    event = TaskEvent(
        code=state, description=sentence, time=when, details=_ending(task, code), is_error=state == "FAILED"
    )
    event_log.add(connection, task.id, event)


def _ending(task: Task, code: str) -> str:
    counters = task.counters
    return json.dumps(
        {
            "code": code,
            "files_transferred": counters.files_transferred,
            "bytes_transferred": counters.bytes_transferred,
            "faults": counters.faults,
        }
    )


def cancel(connection: Connection, task: Task, now: float) -> str:
    """The owner cancels: ``Canceled`` when the relay could end it alone, ``CancelAccepted`` when the agent is asked."""
    if task.finished:
        return TASK_COMPLETE
    if not task.attempted:
        finish(connection, task, code=CANCELED, sentence="The task was cancelled by its owner.", when=now)
        return CANCEL_DONE
    if task.desired != "cancel":
        task_rows.change(connection, task.id, desired="cancel", revision=task.revision + 1, cancel_time=now)
    return CANCEL_ACCEPTED


def end_now(connection: Connection, task: Task, *, code: str, sentence: str, now: float) -> None:
    """End a task at once, whatever its agent is doing, and let the agent be told to stop."""
    if task.finished:
        return
    if task.attempted and task.desired != "cancel":
        task_rows.change(connection, task.id, desired="cancel", revision=task.revision + 1, cancel_time=now)
    finish(connection, task, code=code, sentence=sentence, when=now)


def options_with(task: Task, *, bandwidth_limit: int | None) -> str:
    """The options of a task, as they are stored, with another limit of bandwidth."""
    changed = msgspec.structs.replace(task.task_options, bandwidth_limit=bandwidth_limit)
    return msgspec.json.encode(changed).decode()


def update(connection: Connection, task: Task, changes: dict[str, Any]) -> None:
    """Change label, deadline or options. Raises `ApiError` 409 when the task has ended."""
    if task.finished:
        raise ApiError(409, "Conflict", "The task has ended; it cannot be changed any more.")
    if changes:
        task_rows.change(connection, task.id, **changes, revision=task.revision + 1)


def end_where_access_is_gone(connection: Connection, collection_id: str, reason: str, now: float) -> list[str]:
    """End every active task on a collection whose owner lost a permission it needs, and have new tickets made for those
    that go on where rules say how far links may lead them; returns the ids of all these.

    Called in the transaction that takes the permission away, so no task outlives it.
    """
    return _end_unentitled(connection, _on(collection_id), reason, now)


def end_of_people_without_access(connection: Connection, owners: Iterable[str], reason: str, now: float) -> list[str]:
    """The same for the active tasks of some people, who are another person's identities no longer."""
    return _end_unentitled(connection, tables.tasks.c.owner_id.in_(list(owners)), reason, now)


def end_all_on(connection: Connection, collection_id: str, reason: str, now: float) -> list[str]:
    """End every active task on a collection, whoever owns it; returns their ids."""
    return _end_all(connection, _on(collection_id), reason, now)


def end_all_of(connection: Connection, owner_id: str, reason: str, now: float) -> list[str]:
    """End every active task of an identity that is about to be deleted; returns their ids."""
    return _end_all(connection, tables.tasks.c.owner_id == owner_id, reason, now)


def _end_all(connection: Connection, which: ColumnElement[bool], reason: str, now: float) -> list[str]:
    tasks = _active(connection, which)
    for task in tasks:
        end_now(connection, task, code=CANCELED, sentence=reason, now=now)
    return [task.id for task in tasks]


def closed_linked_ones(connection: Connection) -> frozenset[str]:
    """The identities that are closed and belong to people who have others besides."""
    link = linked_identities.c
    one_of_several = identities.c.id.in_(select(link.identity_id)) | identities.c.id.in_(select(link.primary_id))
    closed = select(identities.c.id).where(identities.c.status == "closed", one_of_several)
    return frozenset(connection.execute(closed).scalars())


def end_where_linked_ones_were_closed(connection: Connection, now: float) -> list[str]:
    """The same for the tasks of people who have such identities: what those were granted counts no more."""
    return _end_unentitled(
        connection,
        _has_closed_one(),
        "The permission that this task needs was given to an identity that is closed.",
        now,
    )


def _has_closed_one() -> ColumnElement[bool]:
    """Tasks of people of whose identities another one is closed. What they own themselves pauses (`closed_owners`)."""
    link, owner, affected = linked_identities.c, tables.tasks.c.owner_id, _people_with_closed_ones()
    theirs = or_(owner.in_(affected), owner.in_(select(link.identity_id).where(link.primary_id.in_(affected))))
    return and_(theirs, ~_is_closed(owner))


def _people_with_closed_ones() -> Select[tuple[str]]:
    """The primary identities of people with several identities of which one is closed."""
    link = linked_identities.c
    closed = select(identities.c.id).where(identities.c.status == "closed")
    return select(link.primary_id).where(or_(link.identity_id.in_(closed), link.primary_id.in_(closed)))


def _is_closed(identity_id: ColumnElement[str]) -> ColumnElement[bool]:
    person = identities.alias().c
    return exists(select(person.id).where(person.id == identity_id, person.status == "closed"))


def _on(collection_id: str) -> ColumnElement[bool]:
    return or_(tables.tasks.c.source_id == collection_id, tables.tasks.c.destination_id == collection_id)


def _active(connection: Connection, which: ColumnElement[bool]) -> list[Task]:
    statement = select(*task_rows.COLUMNS).where(tables.tasks.c.status == "ACTIVE", which)
    return [Task(**row._mapping) for row in connection.execute(statement)]


def _end_unentitled(connection: Connection, which: ColumnElement[bool], reason: str, now: float) -> list[str]:
    """End those whose owner may not run them any more; returns their ids, and of those that go on, but whose tickets
    may let links lead into folders that are closed to them by now: these get new ones."""
    changed = []
    entitlements = Entitlements(connection, now)
    for task in _active(connection, which):
        may = entitlements.of(task)
        if not may.runs:
            end_now(connection, task, code=CANCELED, sentence=reason, now=now)
        elif _has_tickets(task) and (may.source_reach, may.destination_reach) != (None, None):
            task_rows.change(connection, task.id, revision=task.revision + 1)
        else:
            continue
        changed.append(task.id)
    return changed


def _has_tickets(task: Task) -> bool:
    return task.attempted and task.desired == "run"


def end_where_rules_ran_out(connection: Connection, now: float) -> list[str]:
    """Forget the access rules past their time and end the tasks that needed them; returns the tasks' ids."""
    ended = []
    for collection_id in rules.remove_expired(connection, now):
        reason = "The access rule that this task needs has expired."
        ended += end_where_access_is_gone(connection, collection_id, reason, now)
    return ended


def expire(connection: Connection, now: float, cancel_grace: float) -> list[str]:
    """End the tasks whose deadline has passed, and those whose agent has not answered a cancel; returns their ids."""
    column = tables.tasks.c
    statement = select(*task_rows.COLUMNS).where(
        column.status == "ACTIVE",
        or_(column.deadline <= now, and_(column.desired == "cancel", column.cancel_time <= now - cancel_grace)),
    )
    ended = []
    for row in connection.execute(statement).all():
        task = Task(**row._mapping)
        if task.desired == "cancel":
            sentence = "The task was cancelled; its agent has not confirmed that it stopped."
            finish(connection, task, code=CANCELED, sentence=sentence, when=now)
        else:
            sentence = "The deadline of the task has passed."
            end_now(connection, task, code=DEADLINE_EXPIRED, sentence=sentence, now=now)
        ended.append(task.id)
    return ended


def next_expiry(connection: Connection, cancel_grace: float) -> float | None:
    """The next moment at which `expire` will have something to do, or None."""
    column = tables.tasks.c
    # Each is one look into an index.
    deadline = select(func.min(column.deadline)).where(column.status == "ACTIVE")
    cancelled = select(func.min(column.cancel_time)).where(column.status == "ACTIVE", column.desired == "cancel")
    first, asked = (connection.execute(statement).scalar_one() for statement in (deadline, cancelled))
    moments = [first, None if asked is None else asked + cancel_grace]
    return min((moment for moment in moments if moment is not None), default=None)


def renew(connection: Connection, now: float, half_life: float) -> list[str]:
    """Give a new revision, and so a new ticket, to running tasks whose ticket is half over, or has not begun (the clock
    has gone back since); returns their ids."""
    column = tables.tasks.c
    due = or_(column.ticket_issued <= now - half_life, column.ticket_issued > now + CLOCK_TROUBLE)
    statement = select(column.id, column.revision).where(*_renewable(), due)
    renewed = connection.execute(statement).all()
    for row in renewed:
        task_rows.change(connection, row.id, revision=row.revision + 1)
    return [row.id for row in renewed]


def next_renewal(connection: Connection, now: float, half_life: float) -> float | None:
    """The next moment at which `renew` will have something to do, or None."""
    column = tables.tasks.c
    issued = select(column.ticket_issued).where(*_renewable(), column.ticket_issued.is_not(None)).limit(1)
    first, last = (
        connection.execute(issued.order_by(way)).scalar_one_or_none()
        for way in (column.ticket_issued, column.ticket_issued.desc())
    )
    if last is not None and last > now + CLOCK_TROUBLE:
        return now
    return None if first is None else float(first) + half_life


def _renewable() -> tuple[ColumnElement[bool], ...]:
    column = tables.tasks.c
    # A task with an order under way gets its new ticket with that order.
    return column.status == "ACTIVE", column.desired == "run", column.delivered >= column.revision


def hide(connection: Connection, task: Task) -> None:
    """Leave a task out of its owner's lists. Raises `ApiError` 409 while it runs."""
    if not task.finished:
        raise ApiError(409, "Conflict", "The task is still running; cancel it first.")
    task_rows.change(connection, task.id, hidden=True)
