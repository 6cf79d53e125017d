"""Delete tasks: remove what the items name, confined to the collection, never following a link.

Runs in a worker thread. It is idempotent: after a crash it begins again, and what an earlier run removed is not
missed, because items it had begun are in the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from agent.storage import rules
from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.storage.node import Node
from agent.storage.own_files import HoldsOwn
from agent.transfer.basis.patience import Patience, named
from agent.transfer.basis.times import now_iso
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter, SkippedRow
from agent.transfer.deleting.remove import Removal, Stopped
from protocol.control import Counters, TaskItem, TaskOptions
from protocol.errors import ItemFailed, NeedsPerson, ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath, parse_path_untrusted
from protocol.session import DIRECTORY, join_path


class DeleteRun:
    """One run of a delete task. `run` blocks; `stop` may be called from another thread. In the thread of `run`,
    ``on_fault`` is told of what fails, and ``on_begun`` that the root and the books are there and items looked at."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        skipped: ManifestWriter,
        items: list[TaskItem],
        options: TaskOptions,
        patience: Patience,
        on_fault: Callable[[TowpathError], None],
        on_begun: Callable[[], None],
    ) -> None:
        self._root = root
        self._journal = journal
        self._skipped = skipped
        self._items = items
        self._options = options
        self._patience = patience
        self._on_fault = on_fault
        self._on_begun = on_begun
        self._stop = threading.Event()
        # Where it is (see `agent.transfer.stalls.storage_watch.Deletes`).
        self.folder: Directory | None = None
        self.path: CollectionPath = ()
        self.steps = 0
        self.deleted = 0
        self.failed = 0

    def stop(self) -> None:
        """End before the next file."""
        self._stop.set()

    def counters(self) -> Counters:
        """What was removed and what failed so far; any thread may ask."""
        return Counters(
            files=len(self._items), deleted=self.deleted, failed=self.failed, scan_complete=True, skipped_errors=0
        )

    def run(self) -> None:
        """Remove everything. Raises `TowpathError` for what concerns the whole task, `Stopped`."""
        self._root.check_original()
        previous = self._journal.counters()
        self.deleted, self.failed = previous.deleted, previous.failed
        done, begun = self._journal.done_items(), self._journal.known_items()
        self._on_begun()
        for index, item in enumerate(self._items):
            if index in done:
                continue
            if self._stop.is_set():
                raise Stopped
            self.steps += 1
            self._journal.put_item(index, done=False)
            if index not in begun:
                # Written before anything is removed: a repeated run must not take the missing for an error.
                self._journal.commit()
            try:
                self._item(item, begun=index in begun)
            except (Stopped, TowpathError):
                # What is gone is gone, whether the rest of it follows in another run or never.
                self._journal.put_counters(self.counters())
                self._journal.commit()
                raise
            self._journal.put_item(index, done=True)
            self._journal.put_counters(self.counters())
        self._skipped.sync()
        self._journal.put_lengths(0, self._skipped.length)
        self._journal.commit()

    def _item(self, item: TaskItem, *, begun: bool) -> None:
        try:
            path = parse_path_untrusted(item.source_path)
            if not path:
                raise ItemFailed("The root of a collection cannot be deleted.", code="PERMISSION_DENIED", who="you")
            self.path = path
            self._remove(path, missing_is_fine=begun or self._options.ignore_missing)
        except OSError as error:
            self._fail(item, fault(error, "destination", item.source_path, alone=True))
        except ProtocolError as error:
            self._fail(item, ItemFailed(error.sentence, code="ILLEGAL_NAME", who="you"))
        except ItemFailed as error:
            self._fail(item, error)
        finally:
            self.folder = None

    def _remove(self, path: tuple[bytes, ...], *, missing_is_fine: bool) -> None:
        try:
            parent, last = self._root.open_parent(path)
        except FileNotFoundError:
            self._missing(fine=missing_is_fine)
            return
        stays: HoldsOwn | None = None
        with parent:
            self.folder = parent
            nodes = list(self._matching(parent, last))
            if not nodes:
                self._missing(fine=missing_is_fine)
            for node in nodes:
                if node.kind == "dir" and not self._options.recursive:
                    raise ItemFailed(
                        "This is a folder; it is deleted only with --recursive.", code="IS_A_DIRECTORY", who="you"
                    )
                removal = Removal(self._gone)
                try:
                    removal.entry(parent, node, recursive=True)
                except HoldsOwn as error:
                    stays = error
                if removal.missed:
                    self._missing(fine=True)
            parent.sync()
        if stays is not None:
            raise stays

    def _missing(self, *, fine: bool) -> None:
        """Something is not there: raises FileNotFoundError unless that is ``fine``, and `NeedsPerson` where it is the
        root that is not there, since all may come back with it."""
        self._root.check_present()
        if not fine:
            raise FileNotFoundError(2, "there is no such file or folder")

    def _gone(self) -> None:
        self.deleted += 1
        self.steps += 1
        if self._stop.is_set():
            raise Stopped

    def _matching(self, parent: Directory, last: bytes) -> Iterator[Node]:
        if self._options.interpret_globs and rules.has_wildcards(last):
            yield from (node for node in parent.scan() if rules.shell_matches(last, node.name))
            return
        try:
            yield parent.lstat(last)
        except FileNotFoundError:
            return

    def _fail(self, item: TaskItem, error: TowpathError) -> None:
        # Who got further than the last time has not met the same fault again.
        place = f"{item.source_path} {self.deleted}".encode("utf-8", "replace")
        if isinstance(error, RetryLater | NeedsPerson) and self._patience.is_passing(place, error):
            raise error
        self._on_fault(named(error, item.source_path))
        self.failed += 1
        path = item.source_path
        try:
            raw = join_path(parse_path_untrusted(path))
        except ProtocolError:
            raw = path.encode("utf-8", "replace")
        kind = DIRECTORY if error.code == "IS_A_DIRECTORY" else -1
        self._skipped.append([SkippedRow(raw, b"", kind, error.code, error.sentence, now_iso())])
