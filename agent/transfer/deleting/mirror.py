"""The last step of a mirror: deleting at the destination what the source does not have.

Only after everything has arrived, only in the very folder that was set up, and only what was found missing in
directories that the source listed to their end. A mirror that would delete suspiciously much (the source's disk is not
mounted, or the wrong folder was named) is refused as a whole unless the task allows as much.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.storage.hiding import is_hidden
from agent.storage.node import Node
from agent.storage.own_files import HoldsOwn
from agent.storage.real_places import Ways
from agent.storage.rules import included
from agent.transfer.basis.patience import Patience
from agent.transfer.basis.times import now_iso
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import SkippedRow
from agent.transfer.books.record import Record
from agent.transfer.deleting.remove import Removal, Stopped
from agent.transfer.planning.filled_places import SEVERAL, FilledPlaces
from protocol.control import TaskItem, TaskOptions
from protocol.errors import ItemFailed, TaskFailed, TowpathError
from protocol.names import CollectionPath, format_path, is_reserved, split_path

# Without a limit in the task, more than this many are deleted only when at least as many files and folders stay.
ALWAYS_ALLOWED = 1000

# Why something stays.
_SOURCE = (
    "{place} is, or holds, the very folder that the task copies: it is not deleted although the source does not have "
    "it. If it is not wanted there, remove it by hand."
)
_SPARED = (
    "The source does not have {place}, but in it there are names that the task's filters leave out, or that begin with "
    "a dot, which the source's collection does not show: they and the folders they are in are not deleted. If they are "
    "not wanted, remove them there by hand."
)


class Mirror:
    """One run over the extras that the journal remembers. `run` blocks; it may be called again after an error.
    ``on_fault`` is told in the same thread of what could not be deleted. ``items`` are those of the task.
    ``one_machine``: the source is on this one, too."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        record: Record,
        options: TaskOptions,
        patience: Patience,
        on_fault: Callable[[TowpathError], None],
        items: Sequence[TaskItem] = (),
        *,
        one_machine: bool = False,
    ) -> None:
        self._root = root
        self._items = items
        self._journal = journal
        self._record = record
        self._options = options
        self._patience = patience
        self._on_fault = on_fault
        self._stop = threading.Event()
        self._source_hides = False
        # What was told already: one place is named of each.
        self._told: set[str] = set()
        # Device and inode of the folders that are copied, where they are on this machine, too; whether one was met.
        self._one_machine = one_machine
        self._sources: set[tuple[int, int]] = set()
        self._met_source = False
        # What of an extra is to stay, if anything is.
        self._spares: Callable[[Node], bool] | None = None
        # Where it is (see `agent.transfer.stalls.storage_watch.Deletes`).
        self.folder: Directory | None = None
        self.path: CollectionPath = ()
        self.steps = 0

    def stop(self) -> None:
        """Have `run` return before the next removal. Any thread may call."""
        self._stop.set()

    def run(self) -> None:
        """Delete the extras. Raises `NeedsPerson` when the root is not the one that was set up, `TaskFailed`
        (DELETE_REFUSED) when it would be too much, and errors that may pass."""
        if next(self._journal.extras(), None) is None:
            return
        self._root.check_original()
        self._leave_to_others()
        self._source_hides = self._journal.source_hides()
        self._sources = self._journal.item_folders() if self._one_machine else set()
        spares = self._source_hides or self._options.filter_rules or self._sources
        self._spares = self._is_spared if spares else None
        self._refuse_too_many()
        with suppress(Stopped):
            for folder, name in self._journal.extras():
                self._go_on()
                self._remove(folder, name)

    def _leave_to_others(self) -> None:
        """Forget the extras of folders to which several items lead, and those on the way to another item, by whatever
        links and mounts: now that everything has arrived all of these are there."""
        root = self._root.place()
        if root is None:
            return
        ways = Ways(root)
        filled = FilledPlaces(self._items, ways.of_item)
        last, shared = b"", False
        for folder, name in self._journal.extras():
            path = split_path(folder)
            if folder != last or not last:
                last, shared = folder, any(map(filled.several, ways.of_folder(path)))
                if shared:
                    self._tell_once(SEVERAL, path)
            if shared or any(way[-1] in filled.names(way[:-1]) for way in ways.below((*path, name)) if way):
                self._journal.drop_extra(folder, name)

    def _tell_once(self, why: str, path: CollectionPath) -> None:
        """Tell why something stays, of the first place that it is so of."""
        if why not in self._told:
            self._told.add(why)
            place = format_path(path, directory=True)
            sentence = why.format(place=place[:1000])
            self._on_fault(ItemFailed(sentence, code="EXTRA_NOT_DELETED", who="you", subject=place))

    def _go_on(self) -> None:
        self.steps += 1
        if self._stop.is_set():
            raise Stopped

    def _refuse_too_many(self) -> None:
        counters = self._record.counters
        limit = self._options.delete_destination_extra_limit
        if limit is None:
            limit = max(ALWAYS_ALLOWED, counters.files + counters.directories + counters.symlinks)
        # What an earlier run has deleted belongs to the same count.
        count = counters.deleted
        for folder, name in self._journal.extras():
            count += self._count(folder, name, limit - count)
            if count > limit:
                raise TaskFailed(
                    f"The mirror would delete more than {limit} files and folders at the destination that the source "
                    "does not have, so nothing was deleted; everything else has arrived. If that is what you want, "
                    "submit the transfer again with a higher delete_destination_extra_limit.",
                    code="DELETE_REFUSED",
                    who="you",
                )

    def _count(self, folder: bytes, name: bytes, enough: int) -> int:
        """How many entries one extra is, itself included; not counted much beyond ``enough``."""
        try:
            with self._root.open_directory(split_path(folder)) as parent:
                if parent.lstat(name).kind != "dir":
                    return 1
                with parent.open_directory(name) as inner:
                    return 1 + _entries(inner, enough, self._spares)
        except FileNotFoundError:
            return 0
        except OSError:
            # Whatever keeps it from being counted will be reported when it is to be removed.
            return 1

    def _remove(self, folder: bytes, name: bytes) -> None:
        path = folder + b"/" + name if folder else name
        self.path = split_path(path)
        removal, rows = Removal(self._go_on, self._spares), []
        try:
            with self._root.open_directory(split_path(folder)) as parent:
                # A link that has taken the folder's place since leads to what was never compared.
                if parent.path == split_path(folder):
                    self.folder = parent
                    self._remove_from(parent, name, removal)
                    parent.sync()
        except HoldsOwn:
            # What is left are the agent's own files, which nobody sees.
            pass
        except FileNotFoundError:
            removal.missed = True
        except Stopped:
            self._record.removed(removal.count, [])
            raise
        except OSError as error:
            problem: TowpathError = fault(error, "destination", path)
            if self._patience.is_passing(path, problem):
                self._record.removed(removal.count, [])
                raise problem from error
            self._on_fault(problem)
            rows.append(SkippedRow(b"", path, -1, problem.code, problem.sentence, now_iso(), extra=True))
        finally:
            self.folder = None
        if removal.missed:
            self._check_root(removal)
        if self._met_source:
            self._tell_once(_SOURCE, split_path(path))
        elif removal.spared:
            self._tell_once(_SPARED, split_path(path))
        self._journal.drop_extra(folder, name)
        self._record.removed(removal.count, rows)

    def _check_root(self, removal: Removal) -> None:
        """Somebody else was faster, unless it is the root that is not there: then all may come back with it."""
        try:
            self._root.check_present()
        except TowpathError:
            self._record.removed(removal.count, [])
            raise

    def _remove_from(self, parent: Directory, name: bytes, removal: Removal) -> None:
        node = parent.lstat(name)
        self._met_source = False
        if not self._is_source(node):
            removal.entry(parent, node, recursive=True)

    def _is_source(self, node: Node) -> bool:
        """Whether this is a folder that the task copies: into the one above it, perhaps."""
        met = node.kind == "dir" and (node.device, node.inode) in self._sources
        self._met_source |= met
        return met

    def _is_spared(self, node: Node) -> bool:
        """Whether an entry below an extra is not for the source to decide about."""
        if self._is_source(node):
            return True
        if is_reserved(node.name):
            return False
        return (self._source_hides and is_hidden(node.name)) or not included(
            self._options.filter_rules, node.name, node.kind == "dir"
        )


def _entries(folder: Directory, enough: int, spares: Callable[[Node], bool] | None) -> int:
    """Entries below a folder, but for those that stay; not counted much beyond ``enough``. What cannot be looked into
    counts as one. However deep: few handles are open."""
    count = 0
    waiting: list[CollectionPath] = [()]
    while waiting:
        way = waiting.pop()
        with suppress(OSError), _opened(folder, way) as current:
            for node in current.scan():
                if spares is not None and spares(node):
                    continue
                count += 1
                if count > enough:
                    return count
                if node.kind == "dir":
                    waiting.append((*way, node.name))
    return count


@contextmanager
def _opened(folder: Directory, way: CollectionPath) -> Iterator[Directory]:
    """What a way of folders leads to. Raises OSError."""
    current = folder
    try:
        for name in way:
            above, current = current, current.open_directory(name)
            if above is not folder:
                above.close()
        yield current
    finally:
        if current is not folder:
            current.close()
