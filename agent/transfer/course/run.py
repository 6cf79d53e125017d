"""One run of a transfer as its parts know it: planners, lanes, large files and retries ask these things of it.

`agent.transfer.transfer_run` puts the parts together and stands above them; none of them imports it.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from agent.limits.pace import Pace
from agent.storage.base import Directory, Root
from agent.transfer.asking.arrivals import Reports
from agent.transfer.asking.budget import Budget
from agent.transfer.asking.fetch import Fetcher
from agent.transfer.asking.source_session import SourceSession
from agent.transfer.basis.jobs import FileJob, Group, LargeFile, SharedName
from agent.transfer.basis.journal_rows import PartialRow
from agent.transfer.basis.kept_lists import ListPolicy
from agent.transfer.basis.lane_keys import KEY_RECORDS
from agent.transfer.basis.patience import Patience
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter
from agent.transfer.course.received import ReceivedCounter
from agent.transfer.lane_processes.pool import LaneProcesses
from protocol.control import TaskOptions, TaskOrder
from protocol.errors import TowpathError


@dataclass(frozen=True)
class RunContext:
    """What stays the same over all runs of a task."""

    order: TaskOrder
    root: Root
    journal: Journal
    manifests: tuple[ManifestWriter, ManifestWriter]
    received: ReceivedCounter
    temporary_prefix: bytes
    mode_mask: int
    lists: ListPolicy
    # In the trio thread only: it posts to the daemon.
    on_fault: Callable[[TowpathError], None]
    # Told, by who has noticed, why the run stands still, and when it does not any more; in the trio thread.
    on_standstill: Callable[[str, TowpathError | None], None]
    patience: Patience
    pace: Pace
    # What receives beside the lanes' threads of this process, if anything does.
    processes: LaneProcesses | None = None
    # After how many TLS records a lane is followed by another.
    key_records: int = KEY_RECORDS

    @property
    def one_machine(self) -> bool:
        """Whether the source is on this machine, too, offered by the same agent: numbers of disks and files are the
        same there."""
        source = self.order.source
        return source is not None and source.node_id == self.order.destination.node_id


class Failures(Protocol):
    """Decides what becomes of a job that failed. Methods are called in the trio thread."""

    def lasting(self, job: FileJob, error: TowpathError) -> bool:
        """Whether this error ends the job; whole-task errors stop the run."""

    def job_failed(self, job: FileJob, error: TowpathError) -> None:
        """A file could not be brought over this time."""

    async def unknown_mode(self, job: FileJob) -> None:
        """The source could not look at a file's access list. Waits while many files wait for that."""

    def unknown_link(self, job: FileJob) -> None:
        """The source could not look at a link when it listed its folder."""


class SharedNames(Protocol):
    """Keeps several names of one file as such. Methods are called in the trio thread."""

    async def take(self, names: Sequence[SharedName]) -> list[SharedName]:
        """Take names that were planned; those that lead come back and are to be handed out as what they are."""

    async def hand_out(self, name: SharedName) -> None:
        """Do about a leader what was decided about it alone; `Run.offer` must follow."""

    async def room(self) -> None:
        """Wait while very many names wait. What `take` gave back must have been handed out."""


class Run(Reports, Protocol):
    """See the module. But for `Reports`, `settle`, `temporary_name` and `attribute_refused`, all is for the
    trio thread."""

    context: RunContext
    options: TaskOptions
    session: SourceSession
    resumed: bool
    # Whether something that the source had listed, or that an item names, was not there any more.
    missed: bool
    budget: Budget
    fetcher: Fetcher
    settle: queue.SimpleQueue[Any]
    nursery: trio.Nursery

    @property
    def retries(self) -> Failures: ...

    @property
    def hard_links(self) -> SharedNames: ...

    @property
    def stopping(self) -> bool:
        """Whether the run is ending with an error."""

    def stop(self, error: TowpathError) -> None:
        """End the run with this error, or with the one it is ending with already."""

    def put_off(self, error: TowpathError) -> None:
        """Leave a folder to a later run: the others go on, and when they are done this run ends with the error."""

    def part_taken(self, file: LargeFile, known: PartialRow) -> None:
        """See `agent.transfer.books.record.Record.part_taken`. Any thread may call; blocks."""

    def temporary_name(self) -> bytes:
        """A new reserved name."""

    def sweep(self, handle: Directory) -> None:
        """Remove what earlier runs of the task have left in a folder, but for what is to be gone on with. Any thread
        may call. Raises OSError."""

    async def copy(self, job: FileJob) -> None:
        """Have a file brought over; `offer` must follow."""

    async def copy_all(self, jobs: Iterable[FileJob]) -> None:
        """`copy` for many."""

    async def read_attributes(self, jobs: Sequence[FileJob]) -> int:
        """Ask for extended attributes if the task wants them: how many of the jobs, from the first, have them now."""

    async def read_folder_attributes(self, group: Group) -> TowpathError | None:
        """Take over those of a folder itself, and its access lists; why the source could not look at them."""

    def attribute_refused(self, job: FileJob, error: OSError, code: str) -> None:
        """The destination did not take an attribute or an access list: an event with this code. Any thread may call."""

    async def offer(self) -> None:
        """Nothing more comes for the moment: hand out what has been collected if a lane waits for it."""

    async def compare(self, job: FileJob) -> None:
        """Have a file compared by digest, and brought over when it differs."""

    async def slot(self) -> None:
        """Wait until one more group may be open; `opened` must follow."""

    def release_slot(self) -> None:
        """The group could not be opened after all."""

    def opened(self, group: Group) -> None:
        """A group is being worked on until the settler says it is done."""

    def groups_done(self, groups: list[Group]) -> None:
        """Nothing of these groups is worked on any more, and their handles may be closed."""

    def count_finished(self, job: FileJob, outcome: int) -> None:
        """A single item that an earlier run settled."""

    def brought_again(self, items: Collection[int]) -> None:
        """Nothing is there any more of what was brought for these single items; any thread may call."""

    def settled_is_gone(self, size: int) -> None:
        """So many bytes of files that an earlier run has settled, in what was not done, are not there any more; any
        thread may call."""

    def give_up(self, job: FileJob, error: TowpathError, discard: LargeFile | None = None) -> None:
        """End a job with an error: it is listed, counted, and the rest goes on."""
