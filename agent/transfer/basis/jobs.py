"""The things a transfer works on: groups (a directory, or a run of single items), file jobs, requests.

A *group* is the unit of planning and of the journal: when all its jobs are settled it is marked done and its counts are
folded into the task's. Groups are touched by three threads, each field by one: the planner (trio thread) until
``listed`` is handed to the settler, the settler afterwards.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgspec

from agent.storage.base import Directory, PartMark
from agent.transfer.basis.compare import SMALL_FILE, Decision, block_count
from agent.transfer.basis.journal_rows import PartialRow, Place
from protocol.errors import TowpathError
from protocol.session import Row

# setuid, setgid and sticky.
SPECIAL_BITS = 0o7000


class ListFate(IntEnum):
    """What became of a file's access list: it has none, or the destination has it as it was, not (in full), or did not
    take it. Kept in the journal with the file's outcome."""

    NONE, KEPT, NOT_KEPT, REFUSED = range(4)


@dataclass(frozen=True, slots=True)
class ListWanted:
    """The access list that a file is to have (`agent.storage.access_lists`), and the mode that comes with it.
    ``extended``: it says more than the mode."""

    packed: bytes
    mode: int
    extended: bool


@dataclass(slots=True)
class Counts:
    """What one group, or one single item, adds to the task's counters once it is done. In this order in journals: what
    comes new comes last."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    files_transferred: int = 0
    files_skipped: int = 0
    symlinks_transferred: int = 0
    deleted: int = 0
    bytes_total: int = 0
    bytes_transferred: int = 0
    bytes_checksummed: int = 0
    skipped_errors: int = 0
    failed: int = 0
    hard_links: int = 0
    special_modes: int = 0
    xattrs_left_out: int = 0
    acls_kept: int = 0
    acls_not_kept: int = 0
    acls_refused: int = 0
    hard_links_kept: int = 0
    # Of files with several names that are kept as such, each counted once; part of the total.
    bytes_shared: int = 0

    def add_file(self, row: Row, *, shared: bool = False) -> None:
        """Count a file that was found at the source, and what of it is not taken over as it is. The bytes of one that
        is ``shared`` by several names are counted when it is known whether they come."""
        self.files += 1
        self.bytes_total += 0 if shared else row.size
        self.hard_links += row.links > 1
        self.special_modes += bool(row.mode & SPECIAL_BITS)

    def add_list(self, fate: ListFate) -> None:
        """Count a file or folder by what became of its access list."""
        self.acls_kept += fate == ListFate.KEPT
        self.acls_not_kept += fate == ListFate.NOT_KEPT
        self.acls_refused += fate == ListFate.REFUSED


@dataclass(slots=True, eq=False)
class Group:
    """A directory being worked on (``id`` > 0, a journal row), or some single items with one destination directory
    (``id`` < 0, minus one minus the first item's index)."""

    id: int
    source: bytes
    destination: bytes
    handle: Directory
    items: list[int]
    counts: Counts = field(default_factory=Counts)
    # Of single items, each on its own: one may have to be brought again later, and counts once.
    each: dict[int, Counts] = field(init=False, default_factory=dict)
    planned: int = 0
    settled: int = 0
    listed: bool = False
    # Whether it is known to lie on a file system of this machine.
    local: bool = False
    # Whether nothing was in it when it was opened.
    empty: bool = False
    # Whether folders were made in it, so that it has to be synced although no file came into it.
    made_folders: bool = False
    # Set by the settler just before the counts are added to the task's, so that nothing is counted twice.
    folded: bool = False
    # Whether the folder itself has extended attributes that it does not have here; what became of its access lists.
    attributes_left_out: bool = False
    list_fate: ListFate = ListFate.NONE

    def __post_init__(self) -> None:
        if self.id < 0:
            self.each = {item: Counts() for item in self.items}

    def counts_of(self, item: int) -> Counts:
        """Where what comes of an item, or of a file in this folder, is counted."""
        return self.each.get(item, self.counts)

    @property
    def all_counts(self) -> list[Counts]:
        """What it adds to the task's counters."""
        return [self.counts, *self.each.values()]

    @property
    def complete(self) -> bool:
        """Whether all of its jobs are settled and no more will come."""
        return self.listed and self.settled >= self.planned


class FileJob(msgspec.Struct, eq=False):
    """One file to bring over. ``source_name`` is relative to ``group.source``, ``name`` to the group's destination."""

    group: Group
    item: int
    row: Row
    source_name: bytes
    name: bytes
    follow: bool
    external_checksum: str | None = None
    algorithm: str | None = None
    # What the content was found to be when it was not what was expected: the same twice is no accident.
    found_digest: str = ""
    attempts: int = 0
    charged: int = 0
    # Extended attributes to be set, None until the source was asked; how many it has besides, or were refused here.
    attributes: list[tuple[bytes, bytes]] | None = None
    attributes_left_out: int = 0
    # Why the source could not look at them, where that may pass.
    attributes_error: TowpathError | None = None
    # The access list that it gets (None: whatever its folder gives), and what became of the source's.
    access: ListWanted | None = None
    list_fate: ListFate = ListFate.NONE
    # The source could not look at its list at all, and is asked no more: its mode gives the group what everybody has.
    narrowed: bool = False
    # One of several names of a file, to be kept as such; what it became here, and that it became so by
    # a link to another name.
    shared: bool = False
    place: Place | None = None
    linked: bool = False

    @property
    def small(self) -> bool:
        """Whether it is asked for whole, in a pack."""
        return self.row.size <= SMALL_FILE

    @property
    def source_path(self) -> bytes:
        """Its path in the source's collection."""
        return self.group.source + b"/" + self.source_name if self.group.source else self.source_name

    @property
    def destination_path(self) -> bytes:
        """Its path in the destination's collection."""
        return self.group.destination + b"/" + self.name if self.group.destination else self.name

    def mode(self, permitted: int) -> int:
        """The permission bits that the file shows in the end, of those that are given at all."""
        return self.row.mode & permitted if self.access is None else self.access.mode

    @property
    def key(self) -> tuple[int, bytes]:
        """Where the journal keeps this job."""
        return (self.group.id, self.name) if self.group.id > 0 else (-1 - self.item, b"")


@dataclass(slots=True, eq=False)
class SharedName:
    """One of several names of a file, and what would be done about it alone. ``existing`` is what it is
    at the destination already, as far as that may be taken for the source's file."""

    job: FileJob
    decision: Decision
    existing: Place | None
    # Whether that has other names already.
    several: bool = False

    @property
    def source(self) -> tuple[int, int]:
        """Device and inode at the source, which all names of one file share."""
        return (self.job.row.device, self.job.row.inode)


@dataclass(slots=True, eq=False)
class LargeFile:
    """A large file in flight: its temporary, and which blocks are written, checked and durable."""

    job: FileJob
    temporary: bytes
    descriptor: int
    block: int
    # Bitmap of durable, verified blocks, as the journal has it.
    done: bytearray
    done_count: int
    # Bytes of these blocks that the task's books count as settled; what is a hole never was.
    settled: int = 0
    # Bytes of the check that made it complete: they are settled when the file has its name.
    last_check: int = 0
    # The temporary as it was when the newest of these blocks were made durable.
    mark: PartMark | None = None
    # What that check has of the budget, as long as it does not count: else it would look as if it had come in vain.
    last_charged: int = 0
    # Blocks written and not yet checked, with their digests. The lock guards this and nothing else.
    unchecked: dict[int, bytes] = field(default_factory=dict)
    # How many blocks are being checked; the same lock.
    in_check: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    # Bitmap of the blocks that the temporary has of another version of the file, each to be compared before it counts.
    earlier: bytes = b""
    # Mode and time are final and were synced with the last blocks; whatever is written after that takes it back.
    sealed: bool = False
    failed: bool = False
    # It is given up or tried again: whatever else fails of it, that is decided.
    decided: bool = False
    # Ranges asked for or to be asked for, counted by the fetcher.
    open_ranges: int = 0
    error: TowpathError | None = None

    @property
    def count(self) -> int:
        """How many blocks it has."""
        return block_count(self.job.row.size, self.block)

    @property
    def complete(self) -> bool:
        """Whether every block is there and checked."""
        return self.done_count >= self.count

    def row(self) -> PartialRow:
        """What the journal is to know of it."""
        return PartialRow(self.temporary, self.job.row.version, self.block, self.done, self.mark, self.earlier)

    def take_unchecked(self) -> dict[int, bytes]:
        """All blocks waiting for a check; the caller is now responsible for them."""
        with self.lock:
            taken, self.unchecked = self.unchecked, {}
            self.in_check += len(taken)
        return taken

    def waiting(self) -> list[int]:
        """The blocks waiting for a check; they go on waiting."""
        with self.lock:
            return list(self.unchecked)

    def checked(self, blocks: int) -> None:
        """So many blocks that were taken for a check are through it, and marked if they are good."""
        with self.lock:
            self.in_check -= blocks

    @property
    def all_here(self) -> bool:
        """Whether every block is done or being checked: nothing will be written, unless one is found to be bad."""
        with self.lock:
            return not self.unchecked and self.done_count + self.in_check >= self.count

    def add_unchecked(self, index: int, digest: bytes) -> int:
        """Note a written block; how many wait now."""
        with self.lock:
            self.unchecked[index] = digest
            return len(self.unchecked)

    def mark_done(self, index: int) -> None:
        """A block is written and checked; says nothing new of one that was."""
        if not self.done[index >> 3] >> (index & 7) & 1:
            self.done[index >> 3] |= 1 << (index & 7)
            self.done_count += 1

    def length_of(self, index: int) -> int:
        """Bytes of a block; the last one is shorter."""
        return min(self.block, self.job.row.size - index * self.block)


def empty_bitmap(size: int, block: int) -> bytearray:
    """A bitmap with no block of a file of this size done."""
    return bytearray((block_count(size, block) + 7) // 8)


def count_done(done: bytearray) -> int:
    """How many blocks a bitmap marks as done."""
    return int.from_bytes(done, "little").bit_count()


@dataclass(slots=True, eq=False)
class PackRequest:
    """Several small files asked for together."""

    r: int
    jobs: list[FileJob]
    size: int
    # Indices that have arrived or failed on this lane.
    seen: set[int] = field(default_factory=set)
    # Which request each index was first delivered by; shared with a twin (see `Fetcher.rescue`), so that what comes
    # twice counts once. `dict.setdefault` is one step for all threads.
    owners: dict[int, int] = field(default_factory=dict)
    twin: PackRequest | None = None


@dataclass(slots=True, eq=False)
class RangeRequest:
    """A run of blocks of one large file."""

    r: int
    file: LargeFile
    offset: int
    length: int
    # How far the range has arrived, in bytes from ``offset``; blocks of a range arrive in order.
    arrived: int = 0
    # The same for offsets of blocks, in a `RangeRequest`.
    owners: dict[int, int] = field(default_factory=dict)
    twin: RangeRequest | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.length


Request = PackRequest | RangeRequest


@dataclass(slots=True, eq=False)
class PackArrived:
    """To the settler: small files have arrived, each of which matches its digest. ``contents`` are views of one buffer,
    which is theirs."""

    jobs: list[FileJob]
    contents: list[memoryview]
    digests: list[bytes]


@dataclass(slots=True)
class BlocksWritten:
    """To the settler: some blocks of a large file wait for their check."""

    file: LargeFile


@dataclass(slots=True, eq=False)
class BlocksChecked:
    """To the settler, from the checker: these blocks are durable (and read back as they were sent), or ``error``
    says why none of them is. ``taken`` blocks were looked at, and give ``size`` back to the budget."""

    file: LargeFile
    good: list[int]
    bad: list[int]
    taken: int
    size: int
    error: OSError | None = None
    # The temporary as it was made durable.
    mark: PartMark | None = None


@dataclass(slots=True, eq=False)
class FileSealed:
    """To the settler, from the checker: a complete large file is closed and waits for its name, unless ``error``."""

    file: LargeFile
    error: OSError | TowpathError | None = None


@dataclass(slots=True)
class Outcome:
    """To the settler: a job ended without content to settle: an error (``skipped`` when the task asked to skip
    such errors), or nothing to do. ``discard`` is a large file's temporary to be closed and removed."""

    job: FileJob
    error: dict[str, Any] | None
    skipped: bool = False
    discard: LargeFile | None = None


@dataclass(slots=True)
class Abandoned:
    """To the settler: a large file failed with ``error`` and is tried again once its temporary is closed. What of it is
    durable stays for that."""

    file: LargeFile
    error: TowpathError


@dataclass(slots=True)
class PartDropped:
    """To the settler: what an earlier run had settled of a large file in this temporary is of no use; it is transferred
    again."""

    job: FileJob
    temporary: bytes


@dataclass(slots=True, eq=False)
class NameFound:
    """To the settler: a complete large file had its name when an earlier run was killed, and only the books lack it.
    ``checksum`` is the published one, where one was asked for."""

    file: LargeFile
    checksum: str | None


@dataclass(slots=True)
class LinkWanted:
    """To the settler: a symlink to be made as it is at the source."""

    job: FileJob
    target: bytes


@dataclass(slots=True)
class HardLinkWanted:
    """To the settler: a file is here already as ``place`` under the path ``target``, and gets the name
    of the job besides."""

    job: FileJob
    target: bytes
    place: Place


@dataclass(slots=True)
class GroupListed:
    """To the settler: every job of this group has been handed out."""

    group: Group


@dataclass(slots=True)
class AllArrived:
    """To the settler: nothing is under way any more, so that nothing need wait for company."""


@dataclass(slots=True)
class AllThere:
    """To the settler: a large file of which an earlier attempt left every block, so that only its name is missing."""

    file: LargeFile


ToSettle = (
    PackArrived
    | AllArrived
    | AllThere
    | BlocksWritten
    | Abandoned
    | PartDropped
    | BlocksChecked
    | FileSealed
    | NameFound
    | LinkWanted
    | HardLinkWanted
    | Outcome
    | GroupListed
)
