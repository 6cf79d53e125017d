"""Files with several names at the source, kept as one file with several names where a task asks for it.

The first name that is met *leads*: its content is brought over like any other, once. The others wait until it is
settled and become further names of what it became. This is written down in the journal with the leader, so that it
holds over crashes; only what is on its way is kept in memory. Where another name cannot be made (a file system
without them, too many names, a leader that somebody replaced), the file is copied and leads from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from agent.storage.faults import fault
from agent.storage.node import Node
from agent.transfer.basis.compare import CHECKSUM, MTIME, Decision
from agent.transfer.basis.jobs import FileJob, HardLinkWanted, Outcome, SharedName
from agent.transfer.basis.journal_rows import HardLinkRow
from agent.transfer.course.run import Run
from protocol.control import TaskOptions
from protocol.errors import ItemFailed
from protocol.session import FILE, Row

CODE = "HARD_LINK_NOT_KEPT"
# Names that wait for their leaders, and names that the settler has and has not made, before planners wait, too.
MOST_WAITING, MOST_HANDED = 2000, 8000
_DECISIONS = frozenset({"copy", "skip", "compare digests"})


@dataclass(slots=True, eq=False)
class _Waiting:
    """Who waits for the leader, or for that it is found out who leads."""

    names: deque[SharedName] = field(default_factory=deque)


def is_shared(row: Row, options: TaskOptions) -> bool:
    """Whether a row is one of several names that are to be kept as such."""
    return options.preserve_hard_links and row.kind == FILE and row.links > 1


def shared_name(job: FileJob, decision: Decision, existing: Node | None, options: TaskOptions) -> SharedName | None:
    """The name, if it is one to be handed to `HardLinks`."""
    if not job.shared or decision not in _DECISIONS:
        return None
    place = None
    if existing is not None and existing.kind == "file" and _is_trusted(job.row, existing, decision, options):
        place = (existing.device, existing.inode, existing.size, existing.mtime_ns)
    return SharedName(job, decision, place, existing is not None and existing.nlink > 1)


def _is_trusted(row: Row, existing: Node, decision: Decision, options: TaskOptions) -> bool:
    """Whether what is there, and would be left alone, may get further names: the sync levels by existence and by size
    say nothing about its content."""
    if decision == "compare digests":
        return True
    # To the nanosecond, but for file systems that keep whole seconds.
    second = row.mtime_ns // 10**9 * 10**9
    same = row.size == existing.size and existing.mtime_ns in (row.mtime_ns, second)
    return decision == "skip" and same and options.sync_level in (MTIME, CHECKSUM)


class HardLinks:
    """All such files of one run. Methods are called in the trio thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting: dict[tuple[int, int], _Waiting] = {}
        # By the job, because a file that is tried again may have been replaced by another one.
        self._leaders: dict[FileJob, tuple[int, int]] = {}
        self._count = 0
        # What the settler has of the names that do not lead: listing is faster than making names.
        self._handed: set[FileJob] = set()
        self._fewer = trio.Event()
        self._told = False

    async def take(self, names: Sequence[SharedName]) -> list[SharedName]:
        """Take names that were planned; those that lead come back and are to be handed out as what they are."""
        unknown: dict[tuple[int, int], _Waiting] = {}
        for name in names:
            waiting = self._waiting.get(name.source)
            if waiting is None:
                # Before the journal is asked, so that whatever settles meanwhile is met in one place or the other.
                waiting = self._waiting[name.source] = unknown[name.source] = _Waiting()
            waiting.names.append(name)
        self._count += len(names)
        known = await trio.to_thread.run_sync(self._run.context.journal.hard_links, list(unknown)) if unknown else {}
        leaders = []
        for source, waiting in unknown.items():
            row = known.get(source)
            leader = self._lead(source, waiting) if row is None else self._join(source, waiting, row)
            if leader is not None:
                leaders.append(leader)
        return leaders

    async def room(self) -> None:
        """Wait while very many names wait, or are to be made. What `take` gave back must have been handed out."""
        while self._count > MOST_WAITING or len(self._handed) > MOST_HANDED:
            await self._fewer.wait()

    def settled(self, jobs: Sequence[FileJob]) -> None:
        """Some jobs have ended; those that became a file have their ``place``."""
        self._made(jobs)
        for job in jobs:
            source = self._leaders.pop(job, None)
            if source is None:
                continue
            waiting = self._waiting[source]
            if job.place is None or (job.row.device, job.row.inode) != source:
                leader = self._lead(source, waiting)
            else:
                leader = self._join(source, waiting, HardLinkRow(job.row.version, job.destination_path, job.place))
            if leader is not None:
                self._run.nursery.start_soon(self._hand_out, leader)

    def failed(self, job: FileJob, error: OSError) -> None:
        """A name could not be made: the file comes on its own, and leads the next ones."""
        self._made([job])
        if not self._told:
            self._told = True
            reason = fault(error, "destination", job.destination_path).sentence
            sentence = f"Not every hard link can be kept: {reason} Such files are copied, and counted as hard links."
            self._run.context.on_fault(ItemFailed(sentence, code=CODE, who="destination owner"))
        name = SharedName(job, "copy", None)
        self._count += 1
        waiting = self._waiting.get(name.source)
        if waiting is not None:
            waiting.names.append(name)
            return
        waiting = self._waiting[name.source] = _Waiting(names=deque([name]))
        self._lead(name.source, waiting)
        self._run.nursery.start_soon(self._hand_out, name)

    def _lead(self, source: tuple[int, int], waiting: _Waiting) -> SharedName | None:
        """The next name leads, if there is one."""
        if not waiting.names:
            del self._waiting[source]
            return None
        leader = self._release(waiting)
        self._leaders[leader.job] = source
        leader.job.group.counts_of(leader.job.item).bytes_shared += leader.job.row.size
        return leader

    def _join(self, source: tuple[int, int], waiting: _Waiting, row: HardLinkRow) -> SharedName | None:
        """The file is here: it gets the names that wait. One that was listed with another version leads then."""
        while waiting.names and waiting.names[0].job.row.version == row.version:
            name = self._release(waiting)
            self._handed.add(name.job)
            if name.several and name.existing == row.place:
                name.job.linked = True
                self._run.settle.put(Outcome(name.job, None))
            elif name.decision == "skip" and name.existing is None:
                # It is left as it is whatever it is.
                self._run.settle.put(Outcome(name.job, None))
            else:
                self._run.settle.put(HardLinkWanted(name.job, row.destination, row.place))
        return self._lead(source, waiting)

    def _release(self, waiting: _Waiting) -> SharedName:
        self._count -= 1
        self._tell_fewer()
        return waiting.names.popleft()

    def _made(self, jobs: Sequence[FileJob]) -> None:
        self._handed.difference_update(jobs)
        self._tell_fewer()

    def _tell_fewer(self) -> None:
        self._fewer.set()
        self._fewer = trio.Event()

    async def _hand_out(self, name: SharedName) -> None:
        await self.hand_out(name)
        await self._run.offer()

    async def hand_out(self, name: SharedName) -> None:
        """Do about a leader what was decided about it alone; `Run.offer` must follow."""
        if name.decision == "copy":
            await self._run.copy(name.job)
        elif name.decision == "compare digests":
            await self._run.compare(name.job)
        else:
            name.job.place = name.existing
            self._run.settle.put(Outcome(name.job, None))
