"""Tasks as the database holds them, and their items."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import msgspec
from sqlalchemy import Connection, func, insert, select, update

from protocol.control import Counters, TaskItem, TaskObserved, TaskOptions
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer.fields import is_uuid

# Uncompressed; a task order with all its items must fit into one document of the link.
MAX_ITEMS_BYTES = 48 * 1024 * 1024
_ITEMS = msgspec.msgpack.Decoder(list[TaskItem])


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table of tasks; see there for what the columns mean."""

    id: str
    owner_id: str
    owner: str
    submission_id: str
    type: str
    label: str | None
    requested: float
    deadline: float | None
    completed: float | None
    source_id: str
    destination_id: str | None
    status: str
    state: str
    options: str
    observed: str | None
    fatal_error: str | None
    submitted: str
    item_count: int
    hidden: bool
    desired: str
    revision: int
    delivered: int
    attempted: bool
    cancel_time: float | None
    held_by: str | None
    last_seq: int
    session_id: str
    session_open: bool
    ticket_issued: float | None
    closed: bool

    @property
    def finished(self) -> bool:
        """Whether the task has ended, well or not."""
        return self.status in ("SUCCEEDED", "FAILED")

    @property
    def worker_id(self) -> str:
        """The collection whose agent drives the task: the destination, or where a delete happens."""
        return self.destination_id or self.source_id

    @cached_property
    def task_options(self) -> TaskOptions:
        return msgspec.json.decode(self.options, type=TaskOptions)

    @cached_property
    def last_observed(self) -> TaskObserved | None:
        return None if self.observed is None else msgspec.json.decode(self.observed, type=TaskObserved)

    @property
    def counters(self) -> Counters:
        return Counters() if self.last_observed is None else self.last_observed.counters

    @cached_property
    def echo(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.submitted)
        return document


COLUMNS = [tables.tasks.c[column.name] for column in fields(Task)]
_BATCH = 500
_FORGOTTEN_AT_ONCE = 2000


def load(connection: Connection, task_id: str) -> Task | None:
    """One task, whoever owns it."""
    row = connection.execute(select(*COLUMNS).where(tables.tasks.c.id == task_id)).one_or_none()
    return None if row is None else Task(**row._mapping)


def load_many(connection: Connection, ids: Iterable[str]) -> dict[str, Task]:
    """Tasks by id; unknown ids are left out."""
    wanted = sorted(set(ids))
    found: dict[str, Task] = {}
    for start in range(0, len(wanted), _BATCH):
        rows = connection.execute(select(*COLUMNS).where(tables.tasks.c.id.in_(wanted[start : start + _BATCH])))
        found.update({row.id: Task(**row._mapping) for row in rows})
    return found


def require_own(connection: Connection, task_id: str, identity_id: str) -> Task:
    """A task of this identity. Raises `ApiError` 404 TaskNotFound for unknown tasks and for those of others alike."""
    task = load(connection, task_id.lower()) if is_uuid(task_id) else None
    if task is None or task.owner_id != identity_id:
        raise ApiError(404, "TaskNotFound", f"No such task '{task_id[:64]}'.")
    return task


def change(connection: Connection, task_id: str, **values: Any) -> None:
    """Set columns of one task."""
    connection.execute(update(tables.tasks).where(tables.tasks.c.id == task_id).values(**values))


def pack_items(items: list[TaskItem]) -> bytes:
    """Items as stored. Raises `ApiError` 400 when they are more than one order can carry."""
    plain = msgspec.msgpack.encode(items)
    if len(plain) > MAX_ITEMS_BYTES:
        raise ApiError(
            400, "ClientError.BadRequest", "The paths of this submission are too long together; split it into several."
        )
    return zlib.compress(plain, 1)


def unpack_items(data: bytes) -> list[TaskItem]:
    """What `pack_items` made."""
    return _ITEMS.decode(zlib.decompress(data))


@dataclass(frozen=True)
class Scope:
    """Path prefixes of a task's tickets for each side, and folders of the destination it changes besides."""

    source: list[str]
    destination: list[str]
    changes: list[str] = field(default_factory=list)


def insert_task(connection: Connection, values: dict[str, Any], items: bytes, scope: Scope) -> None:
    """A new task with its items."""
    connection.execute(insert(tables.tasks).values(**values))
    connection.execute(
        insert(tables.task_items).values(
            task_id=values["id"], items=items, scope=json.dumps([scope.source, scope.destination, scope.changes])
        )
    )


def load_items(connection: Connection, task_id: str) -> bytes:
    """The packed items of a task."""
    column = tables.task_items.c
    return bytes(connection.execute(select(column["items"]).where(column.task_id == task_id)).scalar_one())


def forget_items(connection: Connection) -> int:
    """Forget the items of tasks that are over and closed, some of them at a time; returns of how many.

    Nobody is ordered them any more, and a hundred thousand paths for each task would stay for ever.
    """
    empty = pack_items([])
    item, task = tables.task_items.c, tables.tasks.c
    over = task.closed & task.status.in_(("SUCCEEDED", "FAILED"))
    some = select(item.task_id).join(tables.tasks, task.id == item.task_id)
    some = some.where(over, func.length(item["items"]) > len(empty)).limit(_FORGOTTEN_AT_ONCE)
    chosen = list(connection.execute(some).scalars())
    connection.execute(update(tables.task_items).where(item.task_id.in_(chosen)).values(items=empty))
    return len(chosen)


def load_scope(connection: Connection, task_id: str) -> Scope:
    """The path prefixes of a task."""
    column = tables.task_items.c
    text = connection.execute(select(column.scope).where(column.task_id == task_id)).scalar_one()
    return Scope(*json.loads(text))
