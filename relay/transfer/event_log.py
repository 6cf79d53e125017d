"""The events of a task that people read: stored once, shown newest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, func, insert, select, update

from relay.store import transfer_tables as tables
from relay.times import api_time

MAX_CODE = 64
MAX_DESCRIPTION = 2000
MAX_DETAILS = 16 * 1024
# So many events of a task are kept at length: the first ones, and those that mark its turns. What comes after them is
# cut to ``SHORT`` bytes each for description and details, so that all of a task's events have some 12 MiB at most.
AT_LENGTH = 100
SHORT = 500
# Of more than these the first half is kept, and the newest.
MAX_EVENTS = 10_000
# A task ends in one of these ways.
ENDINGS: Final = frozenset({"SUCCEEDED", "FAILED", "CANCELED"})
# These mark a turn of the task that comes once; relay and agent may both report it.
ONCE: Final = ENDINGS | {"STARTED", "DEADLINE_EXPIRED"}


@dataclass(frozen=True, kw_only=True)
class TaskEvent:
    """One event. ``seq`` is the agent's number, None for the relay's own events."""

    code: str
    description: str
    time: float
    details: str = ""
    is_error: bool = False
    seq: int | None = None


def add(connection: Connection, task_id: str, event: TaskEvent) -> bool:
    """Store an event, in place of one from the middle where there are too many; False when it was there already."""
    column = tables.task_events.c
    code = event.code[:MAX_CODE] or "UNKNOWN"
    if event.seq is not None and _exists(connection, column.task_id == task_id, column.seq == event.seq):
        return False
    if code in ONCE and _exists(connection, column.task_id == task_id, column.code == code):
        return False
    present = count(connection, task_id, None)
    if present >= MAX_EVENTS:
        _forget_one(connection, task_id)
    short = present >= AT_LENGTH and code not in ONCE
    connection.execute(
        insert(tables.task_events).values(
            task_id=task_id,
            seq=event.seq,
            time=event.time,
            code=code,
            description=_cut(event.description, SHORT if short else MAX_DESCRIPTION),
            details=_cut(event.details, SHORT if short else MAX_DETAILS),
            is_error=event.is_error,
        )
    )
    return True


def _cut(text: str, size: int) -> str:
    """The beginning of a text in at most ``size`` bytes."""
    return text.encode()[:size].decode(errors="ignore")


def _forget_one(connection: Connection, task_id: str) -> None:
    """Forget the oldest event behind the first half, but none that marks a turn of the task."""
    column = tables.task_events.c
    later = select(column.id).where(column.task_id == task_id, column.code.not_in(ONCE))
    oldest = later.order_by(column.time, column.id).limit(1).offset(MAX_EVENTS // 2)
    connection.execute(delete(tables.task_events).where(column.id == oldest.scalar_subquery()))


def _exists(connection: Connection, *conditions: Any) -> bool:
    return connection.execute(select(tables.task_events.c.id).where(*conditions).limit(1)).first() is not None


def count(connection: Connection, task_id: str, is_error: bool | None) -> int:
    """How many events a task has, of one kind or (None) of both."""
    column = tables.task_events.c
    statement = select(func.count()).select_from(tables.task_events).where(column.task_id == task_id)
    if is_error is not None:
        statement = statement.where(column.is_error == is_error)
    return int(connection.execute(statement).scalar_one())


def has_started(connection: Connection, task_id: str) -> bool:
    """Whether the task is known to have started."""
    column = tables.task_events.c
    found = select(column.id).where(column.task_id == task_id, column.code == "STARTED").limit(1)
    return connection.execute(found).first() is not None


def last_told(connection: Connection, task_id: str) -> float | None:
    """When the last of those events happened that the task's agent told of."""
    column = tables.task_events.c
    told = column.seq.is_not(None) | (column.code == "STARTED")
    statement = select(column.time).where(column.task_id == task_id, told).order_by(column.time.desc()).limit(1)
    latest: float | None = connection.execute(statement).scalar()
    return latest


def forget_numbers(connection: Connection, task_id: str) -> None:
    """Keep the events of a task, and let their agent's numbers be used again."""
    connection.execute(update(tables.task_events).where(tables.task_events.c.task_id == task_id).values(seq=None))


def event_list(
    connection: Connection, task_id: str, *, is_error: bool | None, limit: int, offset: int
) -> dict[str, Any]:
    """The ``event_list`` document: one page of a task's events, newest first."""
    column = tables.task_events.c
    statement = select(tables.task_events).where(column.task_id == task_id)
    if is_error is not None:
        statement = statement.where(column.is_error == is_error)
    rows = connection.execute(statement.order_by(column.time.desc(), column.id.desc()).limit(limit).offset(offset))
    events = [
        {
            "DATA_TYPE": "event",
            "code": row.code,
            "description": row.description,
            # Clients demand a string; a JSON text in it is printed nicely.
            "details": row.details,
            "is_error": row.is_error,
            "time": api_time(row.time),
            "parent_task_id": None,
        }
        for row in rows
    ]
    return {
        "DATA_TYPE": "event_list",
        "DATA": events,
        "length": len(events),
        "limit": limit,
        "offset": offset,
        "total": count(connection, task_id, is_error),
    }
