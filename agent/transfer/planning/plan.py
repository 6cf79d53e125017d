"""Planning one folder: compares what the source has there with what the destination has, makes folders, and says what
else is to be done. All of it blocks and runs in worker threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from agent.storage.base import Directory, Root
from agent.storage.enclosing import enclosing
from agent.storage.faults import fault
from agent.storage.node import Node, nearest_time
from agent.storage.rules import included
from agent.transfer.basis.compare import Decision, decide, is_another
from agent.transfer.basis.jobs import FileJob, Group, SharedName
from agent.transfer.basis.journal_rows import COUNTED_BEFORE, FAILED, LIST_FATE, SKIPPED, DirectoryRow
from agent.transfer.basis.patience import Patience
from agent.transfer.books.counted import bytes_settled, count_finished
from agent.transfer.books.journal import Journal
from agent.transfer.planning.collisions import collision, losers
from agent.transfer.planning.extras import Extras, KeptExtra
from agent.transfer.planning.filled_places import FilledPlaces
from agent.transfer.planning.hard_links import is_shared, shared_name
from agent.transfer.planning.into_itself import into_itself
from agent.transfer.planning.left_behind import collect_orphans
from protocol.control import TaskOptions
from protocol.errors import ItemFailed, ProtocolError, TowpathError
from protocol.names import MAX_COMPONENT, CollectionPath, check_component_untrusted, is_reserved, split_path
from protocol.session import DIRECTORY, FILE, MAX_PATH, SYMLINK, Row, Rows, join_path

# The code of a device, pipe or socket.
UNSUPPORTED = "UNSUPPORTED_TYPE"
_ENDLESS = "A symlink leads back to a folder above it: who follows it comes to no end."


@dataclass
class Planned:
    """What comes of one batch of rows."""

    copies: list[FileJob] = field(default_factory=list)
    comparisons: list[FileJob] = field(default_factory=list)
    links: list[FileJob] = field(default_factory=list)
    shared: list[SharedName] = field(default_factory=list)
    failures: list[tuple[FileJob, TowpathError]] = field(default_factory=list)
    directories: list[tuple[int, bytes, bytes, int, list[tuple[int, int]]]] = field(default_factory=list)
    # Bytes of files that an earlier run settled and that are not there any more.
    gone: int = 0


class DirectoryPlanner:
    """Plans one directory. Its methods block and run in worker threads, one at a time."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        options: TaskOptions,
        row: DirectoryRow,
        *,
        prefix: bytes,
        sweep: Callable[[Directory], object] | None,
        patience: Patience,
        filled: FilledPlaces | None = None,
        top: CollectionPath = (),
        one_machine: bool = False,
    ) -> None:
        self._root = root
        # Where the item leads to, as it is named.
        self._top = top
        self._journal = journal
        self._options = options
        self._row = row
        # Whether an earlier run has settled anything here, and what of the rows that are being planned.
        self._has_finished = False
        self._finished: dict[bytes, int] = {}
        self._fresh = False
        self._extras: Extras | None = None
        self._filled = filled or FilledPlaces(())
        # Device and inode of the folders in which this one lies, once they are wanted.
        self._inside: Collection[tuple[int, int]] | None = None if one_machine else ()
        self._prefix = prefix
        self._sweep = sweep
        # Whether names may be one name at the destination: all rows must then come to `compare_names` before `plan`.
        self.folds = False
        self._left_out: dict[bytes, bytes] = {}
        self._patience = patience
        # Whether names changed at the source while they were listed, or shortly before, as far as it tells.
        self.source_changed = False
        self.source_recent: bool | None = None
        # The time of the folder that was listed.
        self.source_mtime_ns = row.mtime_ns
        self.group: Group
        self.opened = False

    def open(self) -> Group:
        """Open (or make) the destination directory. Raises OSError."""
        path = split_path(self._row.destination)
        handle = self._root.make_directories(path)
        self.group = Group(self._row.id, self._row.source, self._row.destination, handle, [])
        # The directory itself, so that its count and its parts are folded together.
        self.group.counts.directories = 0 if self._row.again else 1
        try:
            if self._sweep is not None:
                # In the first run of a task nothing is settled before its folder is planned.
                self._has_finished = self._journal.has_finished(self._row.id)
            # Most folders are new: nothing is looked for in them.
            self.group.empty = _is_empty(handle) or self._clean(handle)
            if self._options.delete_destination_extra:
                # What an earlier run found missing may be at the source by now, and this listing not come to its end.
                self._journal.drop_extras(join_path(handle.path))
            self.folds = handle.folds(self._prefix)
            self.group.local = handle.disk() is not None
            self._fresh = self.group.empty and not self._has_finished
        except BaseException:
            handle.close()
            raise
        if self._options.delete_destination_extra:
            self._extras = self._new_extras(handle, path)
        self.opened = True
        return self.group

    def _new_extras(self, handle: Directory, path: CollectionPath) -> Extras:
        return Extras(
            self._root,
            self._journal,
            handle,
            path,
            top=self._top,
            filled=self._filled,
            rules=self._options.filter_rules,
            folds=self.folds,
        )

    def _clean(self, handle: Directory) -> bool:
        """Remove what dead runs have left in a folder; whether nothing is in it after that."""
        if self._sweep is not None:
            self._sweep(handle)
        removed = collect_orphans(handle, time.time_ns())
        return (self._sweep is not None or removed > 0) and _is_empty(handle)

    def take(self, rows: list[Row]) -> Planned | None:
        """`open`, at the first call, and `plan`; None when all rows are to come to `compare_names` (see ``folds``).
        ``opened`` says how far it came when it raises."""
        if not self.opened:
            self.open()
        return None if self.folds else self.plan(rows)

    def plan(self, rows: list[Row]) -> Planned:
        """Decide about some rows. Folders are made here, everything else is left to others. Raises OSError."""
        planned = Planned()
        losers = self._left_out
        rules, follow = self._options.filter_rules, self._options.recursive_symlinks == "copy"
        # Where nothing is, there is nothing to decide about a file: what most files of large trees come to.
        plain = self._fresh and not losers and not self._options.preserve_hard_links
        group, item = self.group, self._row.item
        self._finished = self._finished_of(rows, planned) if self._has_finished else {}
        if self._extras is not None:
            self._extras.add(row.name for row in rows)
        for row in self._missing(rows) if self._row.again else rows:
            name = row.name
            if is_reserved(check_component_untrusted(name)):
                # Our own sources never list these; what another one calls so must not pass for a temporary.
                raise ProtocolError("The source lists a reserved name.", code="ILLEGAL_NAME")
            if rules and not included(rules, name, row.kind == DIRECTORY):
                continue
            if plain and row.kind == FILE:
                group.counts.add_file(row)
                planned.copies.append(FileJob(group, item, row, name, name, follow))
            else:
                self._plan_row(row, planned, losers.get(name))
        self._journal.add_directories(planned.directories)
        self.group.planned += len(planned.copies) + len(planned.comparisons)
        self.group.planned += len(planned.links) + len(planned.failures) + len(planned.shared)
        return planned

    def _finished_of(self, rows: list[Row], planned: Planned) -> dict[bytes, int]:
        """What an earlier run settled of these rows, but for names that are gone: the folder may be another one by now.
        Asked for by the message, since a folder may have more names than memory holds. Raises OSError."""
        finished = self._journal.finished(self._row.id, [row.name for row in rows])
        ended = (FAILED, SKIPPED)
        there = {
            name: outcome
            for name, outcome in finished.items()
            if outcome % LIST_FATE in ended or self._is_there(check_component_untrusted(name))
        }
        if len(there) < len(finished):
            gone = finished.keys() - there.keys()
            planned.gone = sum(bytes_settled(row, finished[row.name]) for row in rows if row.name in gone)
        return there

    def _missing(self, rows: list[Row]) -> list[Row]:
        """Of a folder listed again, folders and what is not here, or another file; nothing that was given up. Raises
        OSError."""
        return [row for row in rows if self._is_missing(row)]

    def _is_missing(self, row: Row) -> bool:
        outcome = self._finished.get(row.name)
        if outcome is not None:
            # What the run before has brought, and not counted yet, is not passed over.
            return outcome < COUNTED_BEFORE
        name = check_component_untrusted(row.name)
        if row.kind == DIRECTORY or name in self._left_out:
            return True
        try:
            existing = self.group.handle.lstat(name)
            # A link is as quickly read as looked at.
            target = self.group.handle.readlink(name) if existing.kind == "symlink" and row.kind == SYMLINK else None
        except FileNotFoundError:
            return True
        except PermissionError:
            # Nobody can say.
            return False
        return is_another(row, existing, self._options, target)

    def _is_there(self, name: bytes) -> bool:
        try:
            self.group.handle.lstat(name)
        except FileNotFoundError:
            return False
        except PermissionError:
            # Nobody can say.
            return True
        return True

    def compare_names(self, rows: list[Row], there: Callable[[set[bytes]], set[bytes]] | None = None) -> None:
        """Find out which names of a folder that folds them cannot be beside another one, of all or of all that may be
        one name; only these may come to `plan` next. ``there`` and what is raised as for `losers`."""
        rules = self._options.filter_rules
        names = (
            check_component_untrusted(row.name) for row in rows if included(rules, row.name, row.kind == DIRECTORY)
        )
        self._left_out = losers(self._root, self.group.handle, names, self._prefix, there)

    def _plan_row(self, row: Row, planned: Planned, winner: bytes | None) -> None:
        counts = self.group.counts
        job = FileJob(self.group, self._row.item, row, row.name, row.name, self._options.recursive_symlinks == "copy")
        job.shared = is_shared(row, self._options)
        if row.kind == FILE:
            counts.add_file(row, shared=job.shared)
        outcome = self._finished.get(row.name)
        if outcome is not None:
            count_finished(counts, row, outcome, verified=self._options.verify_checksum, shared=job.shared)
            return
        if winner is not None:
            planned.failures.append((job, collision(row.name, winner)))
            return
        decision = self._decide(row, job, planned)
        if decision == "copy":
            planned.copies.append(job)
        elif decision == "compare digests":
            planned.comparisons.append(job)
        elif decision == "skip":
            counts.files_skipped += row.kind == FILE
            counts.symlinks += row.kind == SYMLINK
        elif decision == "link":
            counts.symlinks += 1
            planned.links.append(job)
        elif decision == "ignore" and row.kind == SYMLINK:
            # Found and left out: by the task's policy, or because it leads nowhere or out of the collection. Where
            # the folder is listed again they are counted already.
            counts.symlinks += not self._row.again
        elif decision == "directory":
            self._plan_directory(row, job, planned)
        elif decision in ("conflict", "unsupported"):
            planned.failures.append((job, refusal(row, decision)))

    def _decide(self, row: Row, job: FileJob, planned: Planned) -> Decision:
        existing: Node | None = None
        if not self._fresh:
            try:
                existing = self.group.handle.lstat(row.name)
            except FileNotFoundError:
                existing = None
            except OSError as error:
                planned.failures.append((job, self._lasting(job, error)))
                return "ignore"
        decision = decide(row, existing, self._options)
        name = shared_name(job, decision, existing, self._options)
        if name is None:
            return decision
        planned.shared.append(name)
        return "ignore"

    def _plan_directory(self, row: Row, job: FileJob, planned: Planned) -> None:
        identity = (row.device, row.inode)
        ancestry = self._row.ancestry if self._options.recursive_symlinks == "copy" else []
        if identity in ancestry:
            planned.failures.append((job, ItemFailed(_ENDLESS, code="SYMLINK_LOOP", who="source owner")))
            return
        if identity in self._enclosing():
            planned.failures.append((job, into_itself(job.destination_path)))
            return
        if len(job.source_path) + MAX_COMPONENT >= MAX_PATH:
            # What lies in it could not be asked about.
            sentence = "This folder lies too deep: its path, with a name in it, is longer than what may be asked about."
            planned.failures.append((job, ItemFailed(sentence, code="ILLEGAL_NAME", who="source owner")))
            return
        try:
            self.group.handle.mkdir(row.name)
            self.group.made_folders = True
        except FileExistsError:
            pass
        except OSError as error:
            planned.failures.append((job, self._lasting(job, error)))
            return
        mtime_ns, ancestry = nearest_time(row.mtime_ns), [*ancestry, identity]
        planned.directories.append((self._row.item, job.source_path, job.destination_path, mtime_ns, ancestry))

    def _enclosing(self) -> Collection[tuple[int, int]]:
        """Folders in which this one lies, where the source is on this machine, too."""
        if self._inside is None:
            self._inside = enclosing(self.group.handle)
        return self._inside

    def _lasting(self, job: FileJob, error: OSError) -> TowpathError:
        """The error of a job that ends with it. One that may pass is raised: the run begins anew."""
        problem = fault(error, "destination", job.destination_path)
        if self._patience.is_passing(job.destination_path, problem):
            raise problem from error
        return problem

    def note_end(self, answer: Rows) -> None:
        """What the source says with the last of its rows."""
        self.source_changed, self.source_recent = answer.changed, answer.recent
        if answer.mtime_ns is not None:
            self.source_mtime_ns = nearest_time(answer.mtime_ns)

    def note_time(self) -> None:
        """Have the folder known by the time that it had when its listing began: what else is known of it is from before
        or, of one that was listed ahead, from after that. Where an earlier run has settled some of its names, their
        files may be others by now: it stays one that changed."""
        if not self._has_finished:
            self._journal.put_time(self._row.id, self.source_mtime_ns)

    def note_extra(self, *, source_hides: bool = False) -> KeptExtra:
        """After the last row: remember what the source does not have (`agent.transfer.deleting.mirror` deletes it). Why
        something stays that it has not listed either. Raises OSError."""
        if self._extras is None:
            return KeptExtra.NONE
        return self._extras.note(source_hides=source_hides, source_changed=self.source_changed)

    def close(self) -> None:
        """Let go what is known of the source's names; the folder's group goes on. Safe to call twice."""
        if self._extras is not None:
            self._extras.close()


def refusal(row: Row, decision: Decision) -> TowpathError:
    """Why a row that cannot be transferred is refused."""
    if decision == "unsupported":
        return ItemFailed(
            "This is a device, pipe or socket; only files, folders and links are transferred.",
            code=UNSUPPORTED,
            who="source owner",
        )
    here, there = ("folder", "file") if row.kind == DIRECTORY else ("file", "folder")
    return ItemFailed(
        f"The source has a {here} where the destination has a {there} of the same name; move one of them away, or name "
        "another destination.",
        code="IS_A_DIRECTORY" if row.kind != DIRECTORY else "NOT_A_DIRECTORY",
        who="destination owner",
    )


def _is_empty(handle: Directory) -> bool:
    """Whether nothing is in a folder, as far as it may be listed."""
    try:
        return next(handle.scan(reserved=True), None) is None
    except PermissionError:
        return False
