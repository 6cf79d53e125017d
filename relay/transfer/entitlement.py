"""Whether a task's owner may still do what the task does: asked at submission, and again before every ticket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from protocol.names import CollectionPath, format_path
from protocol.ticket import MAX_PATHS
from relay.access.decisions import Ability, CollectionFacts, Spot, TaskNeeds, may_run, reach
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


@dataclass(frozen=True)
class Reaches:
    """The folders in which symlinks that a task meets may end, in its source and in its destination; None is all."""

    source: list[str] | None
    destination: list[str] | None


def reaches(connection: Connection, task: Task, now: float) -> Reaches:
    """How far a task's owner gets by the rules and roles of this moment."""
    known = collections.load_many(connection, [task.source_id, task.worker_id])
    subject = subject_of(connection, task.owner_id, now)

    def folders(collection_id: str, wanted: Ability) -> list[str] | None:
        facts: CollectionFacts | None = known[collection_id].facts if collection_id in known else None
        return [] if facts is None else reach_text(reach(facts, subject, wanted))

    return Reaches(folders(task.source_id, Ability.READ), folders(task.worker_id, Ability.WRITE))


def reach_text(folders: Iterable[CollectionPath] | None) -> list[str] | None:
    """Folders as they travel. Never more than a ticket takes: what does not fit is not reached."""
    return None if folders is None else [format_path(folder) for folder in folders][:MAX_PATHS]


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
