"""Lists of tasks: pages in the order and with the filters a client asks for."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from relay.access.decisions import Ability, Subject, abilities
from relay.access.principals import subject_of
from relay.store import transfer_tables as tables
from relay.transfer import task_rows
from relay.transfer.collections import Collection, load_many
from relay.transfer.fields import bad_request, is_uuid
from relay.transfer.task_rows import Task

MAX_LIMIT = 1000
DEFAULT_LIMIT = 10
MAX_OFFSET = 10_000_000


@dataclass(frozen=True)
class TaskPage:
    """Tasks of one page with the collections they name, and how many there are in all.

    ``unseen`` are those of the collections that the reader may not see now.
    """

    tasks: list[Task]
    total: int
    collections: dict[str, Collection]
    unseen: frozenset[str] = frozenset()


def collections_of(connection: Connection, tasks: list[Task]) -> dict[str, Collection]:
    """The collections that tasks name."""
    ids = {task.source_id for task in tasks} | {task.destination_id for task in tasks if task.destination_id}
    return load_many(connection, ids)


def unseen(connection: Connection, known: dict[str, Collection], identity_id: str, now: float) -> frozenset[str]:
    """Which collections an identity may not see now. Deleted ones, which change no more, are not counted."""
    subject = subject_of(connection, identity_id, now)
    return frozenset(
        collection_id
        for collection_id, collection in known.items()
        if collection.deleted is None and Ability.SEE not in abilities(collection.facts, subject)
    )


def own_tasks(
    connection: Connection,
    *,
    identity_id: str,
    now: float,
    conditions: list[ColumnElement[bool]],
    order: list[ColumnElement[Any]],
    limit: int,
    offset: int,
) -> TaskPage:
    """A page of an identity's own tasks."""
    column = tables.tasks.c
    held = [column.owner_id == identity_id, column.hidden.is_(False), *conditions]
    total = int(connection.execute(select(func.count()).select_from(tables.tasks).where(*held)).scalar_one())
    rows = connection.execute(select(*task_rows.COLUMNS).where(*held).order_by(*order).limit(limit).offset(offset))
    tasks = [Task(**row._mapping) for row in rows]
    known = collections_of(connection, tasks)
    return TaskPage(tasks, total, known, unseen(connection, known, identity_id, now))


def watched_sides(task: Task, known: dict[str, Collection], subject: Subject) -> frozenset[str]:
    """On which sides of a task (source, destination) a person may watch over tasks."""
    sides = {"source": known.get(task.source_id), "destination": known.get(task.destination_id or "")}
    return frozenset(
        side
        for side, collection in sides.items()
        if collection is not None
        and collection.deleted is None
        and Ability.SEE_TASKS in abilities(collection.facts, subject)
    )


def place_of(task: Task) -> str:
    """Where a task stands in `watched_tasks`, as clients hand it back to get what comes after it. It says so by
    itself: if the task had to be looked up, whoever guesses an id would be shown that it exists."""
    return f"{task.requested!r}_{task.id}"


def place_untrusted(text: str) -> tuple[float, str]:
    """What `place_of` said. Raises `ApiError` 400 for anything else."""
    moment, _, task_id = text.partition("_")
    with contextlib.suppress(ValueError):
        if is_uuid(task_id) and math.isfinite(float(moment)):
            return float(moment), task_id
    # From the first page again, a client that asks for all of them would ask for ever.
    raise bad_request("last_key is not one that was given out.")


def watched_tasks(
    connection: Connection,
    *,
    subject: Subject,
    conditions: list[ColumnElement[bool]],
    after: tuple[float, str] | None,
    limit: int,
) -> tuple[TaskPage, bool]:
    """Tasks of anybody on collections that a person watches over, newest first, and whether there are more.

    ``after`` is the place of the last task of the page before.
    """
    column, collection, role = tables.tasks.c, tables.collections.c, tables.roles.c
    mine = select(collection.id).where(
        collection.deleted.is_(None),
        or_(
            collection.owner_id.in_(subject.identities),
            collection.id.in_(
                select(role.collection_id).where(
                    or_(
                        and_(role.principal_type == "identity", role.principal.in_(subject.identities)),
                        and_(role.principal_type == "group", role.principal.in_(subject.groups)),
                    ),
                    role.role.in_(("administrator", "activity_manager", "activity_monitor")),
                )
            ),
        ),
    )
    held = [or_(column.source_id.in_(mine), column.destination_id.in_(mine)), *conditions]
    if after is not None:
        requested, last = after
        held.append(or_(column.requested < requested, (column.requested == requested) & (column.id > last)))
    rows = connection.execute(
        select(*task_rows.COLUMNS).where(*held).order_by(column.requested.desc(), column.id).limit(limit + 1)
    )
    tasks = [Task(**row._mapping) for row in rows]
    page = tasks[:limit]
    return TaskPage(page, len(page), collections_of(connection, page)), len(tasks) > limit
