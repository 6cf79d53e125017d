"""Whether a task's owner may still do what the task does: asked at submission, and again before every ticket."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from relay.access.decisions import Spot, TaskNeeds, may_run
from relay.access.principals import subject_of
from relay.transfer import collections, task_rows
from relay.transfer.scopes import below_home, place
from relay.transfer.task_rows import Scope, Task


def spots(prefixes: Iterable[str]) -> list[Spot]:
    """Where path prefixes of a ticket are. Those of older tasks that begin at home could be anywhere."""
    return [None if below_home(prefix) else place(prefix, "path", ()) for prefix in prefixes]


def needs_of(task: Task, scope: Scope) -> TaskNeeds:
    """What a task's owner must be allowed: exactly what its tickets name, and what it changes besides."""
    written = tuple(spots([*scope.destination, *scope.changes]))
    return TaskNeeds(None if task.destination_id is None else tuple(spots(scope.source)), written)


def entitled(connection: Connection, task: Task, now: float) -> bool:
    """Whether the task may run (on) by the rules and roles of this moment."""
    known = collections.load_many(connection, [task.source_id, task.worker_id])
    source, destination = known.get(task.source_id), known.get(task.worker_id)
    return may_run(
        subject_of(connection, task.owner_id, now),
        needs_of(task, task_rows.load_scope(connection, task.id)),
        None if source is None else source.facts,
        None if destination is None else destination.facts,
    )
