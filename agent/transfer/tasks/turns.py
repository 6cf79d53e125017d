"""Which tasks run next: bounded workers, owners in turn, and one task at a time on any place of a destination. Pure.

A task holds the lease of its destination paths while it runs; one that overlaps it waits, and so does one that came
later than another that is waiting for the same place. A task that is paused or held up by its owner holds nothing.
Tasks that wait for a person or a peer keep their process but not their turn: they must not lock the others out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.names import CollectionPath

# Processes of tasks that wait for something, for each worker that may be busy.
WAITING_FOR_EACH = 4


@dataclass(frozen=True, slots=True)
class Claim:
    """Where a task writes: its paths, each with everything below it, and all folders above them, with the links that
    lead there. They begin at the root of the file system (see `agent.transfer.tasks.places`)."""

    collection_id: str
    paths: frozenset[CollectionPath]
    above: frozenset[CollectionPath]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One task as the choice sees it. ``waiting``: it runs, but is held up by something. ``ending``: it is only to be
    cancelled, which touches nothing but its own temporaries."""

    id: str
    owner_id: str
    claim: Claim
    running: bool = False
    waiting: bool = False
    runnable: bool = False
    ending: bool = False


@dataclass(frozen=True, slots=True)
class Turns:
    """Tasks to start now, and for those that wait for a place the task that has it."""

    start: list[str]
    behind: dict[str, str]


@dataclass(slots=True)
class _Leases:
    """Who has which place."""

    paths: dict[CollectionPath, str] = field(default_factory=dict)
    above: dict[CollectionPath, str] = field(default_factory=dict)

    def holder(self, claim: Claim) -> str | None:
        """Who has a place that holds one of these, is one of them, or lies below one of them. Sorted, so that the
        answer is always the same."""
        for path in sorted(claim.above):
            holder = self.paths.get(path)
            if holder is not None:
                return holder
        for path in sorted(claim.paths):
            holder = self.paths.get(path) or self.above.get(path)
            if holder is not None:
                return holder
        return None

    def take(self, task_id: str, claim: Claim) -> None:
        for path in claim.paths:
            self.paths.setdefault(path, task_id)
        for path in claim.above:
            self.above.setdefault(path, task_id)


def next_turns(tasks: Sequence[Candidate], workers: int, has_room: Callable[[str, int], bool]) -> Turns:
    """What to start, given all tasks in the order in which they came. Owners with fewer running tasks go first, among
    their tasks the oldest. ``has_room`` says whether a collection takes one more beside so many."""
    running = [task for task in tasks if task.running]
    free = min(
        workers - sum(not task.waiting for task in running),
        workers * (1 + WAITING_FOR_EACH) - len(running),
    )
    leases = _Leases()
    for task in running:
        leases.take(task.id, task.claim)
    behind: dict[str, str] = {}
    ready: list[Candidate] = []
    for task in tasks:
        if task.running or not task.runnable:
            continue
        if task.ending:
            ready.append(task)
            continue
        holder = leases.holder(task.claim)
        if holder is None:
            ready.append(task)
        else:
            behind[task.id] = holder
        # Whoever comes later for the same place comes after this one.
        leases.take(task.id, task.claim)
    return Turns(_choose(ready, running, free, has_room), behind)


def _choose(
    ready: list[Candidate], running: list[Candidate], free: int, has_room: Callable[[str, int], bool]
) -> list[str]:
    of_owner = Counter(task.owner_id for task in running)
    into = Counter(task.claim.collection_id for task in running)
    start: list[str] = []
    while ready and len(start) < free:
        best = min(ready, key=lambda task: of_owner[task.owner_id])
        ready.remove(best)
        collection_id = best.claim.collection_id
        if not has_room(collection_id, into[collection_id]):
            continue
        into[collection_id] += 1
        of_owner[best.owner_id] += 1
        start.append(best.id)
    return start
