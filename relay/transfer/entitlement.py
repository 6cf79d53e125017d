"""Whether a task's owner may still do what the task does: asked at submission, and again before every ticket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from protocol.names import below_home
from relay.access.decisions import ROOT, Ability, Held, Spot, Subject, TaskNeeds, may_run
from relay.access.principals import subject_of
from relay.transfer import collections, task_rows
from relay.transfer.collections import Collection
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
_EVERYWHERE = TaskNeeds((ROOT,), (ROOT,))


class Entitlements:
    """What the owners of tasks may do at one moment (Unix seconds): each collection and each owner is read once for all
    tasks that are asked about in a transaction, and so is what one holds in the other."""

    def __init__(self, connection: Connection, now: float) -> None:
        self._connection, self._now = connection, now
        self._collections: dict[str, Collection] = {}
        self._owners: dict[str, Subject] = {}
        self._held: dict[tuple[str, str], Held] = {}
        self._reach: dict[tuple[str, str, Ability], list[str] | None] = {}

    def of(self, task: Task, scope: Scope | None = None) -> Entitlement:
        """What a task's owner may do. ``scope`` is read where it is not given and matters."""
        source = self._held_by(task.owner_id, task.source_id)
        destination = self._held_by(task.owner_id, task.worker_id)
        # Who may do it everywhere may do it at each place.
        if not may_run(_EVERYWHERE, source, destination):
            needs = needs_of(task, scope or task_rows.load_scope(self._connection, task.id))
            if not may_run(needs, source, destination):
                return NOTHING
        return Entitlement(
            runs=True,
            source_reach=self._reach_of(task.owner_id, task.source_id, Ability.READ),
            destination_reach=self._reach_of(task.owner_id, task.worker_id, Ability.WRITE),
        )

    def _held_by(self, owner_id: str, collection_id: str) -> Held:
        key = owner_id, collection_id
        if key not in self._held:
            if collection_id not in self._collections:
                self._collections |= collections.load_many(self._connection, [collection_id])
            if owner_id not in self._owners:
                self._owners[owner_id] = subject_of(self._connection, owner_id, self._now)
            found = self._collections.get(collection_id)
            self._held[key] = Held(None if found is None else found.facts, self._owners[owner_id])
        return self._held[key]

    def _reach_of(self, owner_id: str, collection_id: str, wanted: Ability) -> list[str] | None:
        key = owner_id, collection_id, wanted
        if key not in self._reach:
            self._reach[key] = reach_text(self._held_by(owner_id, collection_id).reach(wanted))
        return self._reach[key]


def entitlement(connection: Connection, task: Task, scope: Scope, now: float) -> Entitlement:
    """What the owner of one task may do now."""
    return Entitlements(connection, now).of(task, scope)


def entitled(connection: Connection, task: Task, now: float) -> bool:
    """Whether the task may run (on) by the rules and roles of this moment."""
    return Entitlements(connection, now).of(task).runs
