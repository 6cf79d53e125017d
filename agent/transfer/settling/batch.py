"""What the settler keeps together until it is durable, and what its side threads answer with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from agent.storage.base import Directory
from agent.transfer.basis.jobs import Abandoned, FileJob, Group, LargeFile, Outcome
from agent.transfer.settling.small_files import Temporary
from protocol.threads import NoThread

# From this many files and folders of one file system on, one syncfs is cheaper than an fsync each.
SYNCFS_FROM = 32
# So many fsyncs are asked for side by side: the file system commits, and the device flushes, for several at once.
FSYNCS_AT_ONCE = 8


@dataclass(slots=True)
class Settled:
    """What is settled but for the sync of its directories, and then its place in the books."""

    transferred: list[tuple[FileJob, str | None]] = field(default_factory=list)
    linked: list[FileJob] = field(default_factory=list)
    complete: list[LargeFile] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    listed: list[Group] = field(default_factory=list)
    folders: dict[int, Directory] = field(default_factory=dict)
    checked_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.transferred or self.linked or self.outcomes or self.listed or self.checked_bytes)

    def touch(self, group: Group) -> None:
        """A name in this folder is new."""
        self.folders[id(group)] = group.handle


@dataclass(slots=True)
class Batch:
    """To the settler, from the sync thread: these are durable now but for those that failed."""

    files: list[Temporary]
    names: Settled
    failed: list[tuple[Temporary, OSError]] = field(default_factory=list)
    names_durable: bool = False


def sync_disks(batch: Batch) -> set[int]:
    """Sync file systems as a whole where a batch has much on them; the groups (by `id`) for which that is not done.
    There may be several: others can be mounted below the root. Raises OSError."""
    groups: dict[int, Directory] = {}
    counts: Counter[int] = Counter()
    for item in batch.files:
        group = item.job.group
        groups[id(group)] = group.handle
        counts[id(group)] += 1
    groups.update(batch.names.folders)
    counts.update(batch.names.folders.keys())
    alone = set(groups)
    if counts.total() < SYNCFS_FROM:
        return alone
    disks: dict[int, list[int]] = {}
    for key, handle in groups.items():
        disk = handle.disk()
        if disk is not None:
            disks.setdefault(disk, []).append(key)
    for keys in disks.values():
        if sum(counts[key] for key in keys) >= SYNCFS_FROM:
            groups[keys[0]].sync_disk()
            alone.difference_update(keys)
    return alone


def sync_each(syncs: Iterable[Callable[[], None]], beside: Executor) -> list[OSError | None]:
    """Call all of them, in threads of ``beside`` where there are several: what became of each. Raises `NoThread`; then
    some may have been called, whose errors nobody is told a second time, so that none of them counts."""
    waiting = list(syncs)
    if len(waiting) < 2:
        return [_sync(sync) for sync in waiting]
    try:
        return list(beside.map(_sync, waiting))
    except RuntimeError as error:
        raise NoThread from error


def _sync(sync: Callable[[], None]) -> OSError | None:
    try:
        sync()
    except OSError as error:
        return error
    return None


@dataclass(slots=True)
class Recorded:
    """To the settler, from the sync thread: the names of a batch are in the books."""


@dataclass(slots=True)
class Closed:
    """To the settler, from the checker: the temporary of a file that is tried again is closed."""

    item: Abandoned


@dataclass(slots=True)
class Discarded:
    """To the settler, from the checker: the temporary of a file that is given up is gone."""

    outcome: Outcome
    file: LargeFile
