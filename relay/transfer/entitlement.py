"""Whether a task's owner may still do what the task does: asked at submission, and again before every ticket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from protocol.names import below_home
from relay.access.decisions import Ability, CollectionFacts, Spot, Subject, TaskNeeds, may_run, reach
from relay.access.principals import subject_of
from relay.transfer import collections, task_rows
from relay.transfer.scopes import place, reach_text
from relay.transfer.task_rows import Scope, Task


def spots(prefixes: Iterable[str]) -> list[Spot]:
    """Where path prefixes of a ticket are. Those of older tasks that begin at home could be anywhere."""
    return [None if below_home(prefix) else place(prefix, "path", ()) for prefix in prefixes]


def needs_of(task: Task, scope: Scope) -> TaskNeeds:
    """What a task's owner must be allowed: exactly what its tickets name, and what it changes besides."""
    written = tuple(spots([*scope.destination, *scope.changes]))
    return TaskNeeds(None if task.destination_id is None else tuple(spots(scope.source)), written)


@dataclass(frozen=True)
class Entitlement:
    """What a task's owner may do by the rules and roles of this moment: whether the task may run (on), and in which
    folders of its source and its destination symlinks that it meets may end (None: anywhere)."""

    runs: bool
    source_reach: list[str] | None
    destination_reach: list[str] | None


NOTHING = Entitlement(runs=False, source_reach=[], destination_reach=[])


def entitlement(connection: Connection, task: Task, scope: Scope, now: float) -> Entitlement:
    """Look at the collections of a task and at its owner once, and decide."""
    known = collections.load_many(connection, [task.source_id, task.worker_id])
    facts = {collection_id: collection.facts for collection_id, collection in known.items()}
    source, destination = facts.get(task.source_id), facts.get(task.worker_id)
    subject = subject_of(connection, task.owner_id, now)
    if not may_run(subject, needs_of(task, scope), source, destination):
        return NOTHING
    return Entitlement(
        runs=True,
        source_reach=_reach(source, subject, Ability.READ),
        destination_reach=_reach(destination, subject, Ability.WRITE),
    )


def _reach(facts: CollectionFacts | None, subject: Subject, wanted: Ability) -> list[str] | None:
    return [] if facts is None else reach_text(reach(facts, subject, wanted))


def entitled(connection: Connection, task: Task, now: float) -> bool:
    """Whether the task may run (on) by the rules and roles of this moment."""
    return entitlement(connection, task, task_rows.load_scope(connection, task.id), now).runs
