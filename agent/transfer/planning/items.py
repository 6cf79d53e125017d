"""Planning the items a task was submitted with: which are files, which are folders, and where each goes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence, Set

import trio

from agent.storage.base import Directory
from agent.storage.enclosing import enclosing
from agent.storage.faults import fault
from agent.storage.folding import fold_key
from agent.storage.node import Node, nearest_time
from agent.transfer.asking.source_session import SourceSession, stat_error
from agent.transfer.asking.take_ahead import LANE, MOST_BYTES, Awaited, takeable
from agent.transfer.basis.checksum import check_given, normalised_algorithm
from agent.transfer.basis.compare import SMALL_FILE, Decision, decide, decide_link
from agent.transfer.basis.jobs import FileJob, Group, GroupListed, LinkWanted, SharedName
from agent.transfer.basis.journal_rows import FAILED, LIST_FATE, SKIPPED
from agent.transfer.books.counted import bytes_settled
from agent.transfer.course.run import Run
from agent.transfer.planning.collisions import collision, losers, twice
from agent.transfer.planning.hard_links import is_shared, shared_name
from agent.transfer.planning.into_itself import into_itself
from agent.transfer.planning.plan import refusal
from protocol.control import TaskItem
from protocol.errors import (
    ItemFailed,
    NeedsPerson,
    ProtocolError,
    RetryLater,
    TowpathError,
)
from protocol.names import CollectionPath, format_path, is_reserved, parse_path_untrusted, split_path
from protocol.session import DIRECTORY, FILE, SYMLINK, Row, StatResult, join_path

ITEMS_AT_ONCE = 250
# Folders that are listed before it is known what they are.
LISTED_AHEAD = 4
_UNKNOWN = Row(b"", -1, 0, 0, 0, 0, 0, 0)


class ItemPlanner:
    """Resolves the items of a task. Items that an earlier run finished are left alone."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._items = run.context.order.items or []
        self._settled: dict[int, int] = {}
        self._first = True
        # For every parent and key of a name, the items that want it, in their order.
        self._wanted: dict[tuple[CollectionPath, bytes], list[int]] = {}

    async def run(self, session: SourceSession) -> None:
        """Hand out jobs for file items, remember folders for listing."""
        journal = self._run.context.journal
        self._note_wanted()
        resolved = journal.known_items()
        if self._run.resumed:
            resolved -= await trio.to_thread.run_sync(self._reopen, resolved)
        self._settled = journal.finished_items()
        waiting = [index for index in range(len(self._items)) if index not in resolved]
        for start in range(0, len(waiting), ITEMS_AT_ONCE):
            chunk = waiting[start : start + ITEMS_AT_ONCE]
            for links in (False, True):
                indices = [index for index in chunk if self._items[index].symlink is links]
                if indices:
                    await self._resolve(session, indices, follow=not links)

    def _reopen(self, resolved: Set[int]) -> set[int]:
        """Items that were brought into a folder to which others still come, and are not there any more: the folder may
        be another one by now. They are brought again, as files are of a folder that is not done."""
        unfinished = {self._folder(index) for index in range(len(self._items)) if index not in resolved}
        brought: dict[CollectionPath, list[int]] = {}
        for index in self._run.context.journal.done_items():
            if (folder := self._folder(index)) is not None and folder in unfinished:
                brought.setdefault(folder, []).append(index)
        gone: set[int] = set()
        for folder, indices in brought.items():
            try:
                with self._run.context.root.open_directory(folder) as handle:
                    gone.update(index for index in indices if not self._is_there(handle, index))
            except FileNotFoundError:
                gone.update(indices)
            except OSError:
                # What is wrong with it is found out when something is to be written there.
                continue
        self._run.brought_again(gone)
        return gone

    def _folder(self, index: int) -> CollectionPath | None:
        try:
            return parse_path_untrusted(self._items[index].destination_path)[:-1]
        except ProtocolError:
            return None

    def _is_there(self, handle: Directory, index: int) -> bool:
        try:
            handle.lstat(parse_path_untrusted(self._items[index].destination_path)[-1])
        except FileNotFoundError:
            return False
        except OSError:
            # Nobody can say.
            return True
        return True

    def _note_wanted(self) -> None:
        for index, item in enumerate(self._items):
            # One whose name cannot be fails by itself.
            with contextlib.suppress(ProtocolError):
                path = parse_path_untrusted(item.destination_path)
                self._wanted.setdefault((path[:-1], fold_key(path[-1]) if path else b""), []).append(index)
        self._wanted = {place: wanted for place, wanted in self._wanted.items() if len(wanted) > 1}

    def _taken(self, group: Group, job: FileJob) -> ItemFailed | None:
        """Whether an earlier item of the task has this name, or one that is the same at the destination. Raises
        OSError."""
        path = parse_path_untrusted(self._items[job.item].destination_path)
        for index in self._wanted.get((path[:-1], fold_key(path[-1])), ()):
            if index >= job.item:
                break
            earlier = self._items[index]
            other = parse_path_untrusted(earlier.destination_path)[-1]
            if other == job.name:
                if earlier.source_path != self._items[job.item].source_path:
                    return twice(job.destination_path, earlier.source_path)
            elif group.handle.folds(self._run.context.temporary_prefix) and losers(
                self._run.context.root, group.handle, [other, job.name], self._run.context.temporary_prefix
            ):
                return collision(job.name, other)
        return None

    async def _resolve(self, session: SourceSession, indices: list[int], *, follow: bool) -> None:
        paths: list[bytes] = []
        legal: list[int] = []
        for index in indices:
            try:
                paths.append(join_path(parse_path_untrusted(self._items[index].source_path)))
                _refuse_reserved(parse_path_untrusted(self._items[index].destination_path))
            except ProtocolError as error:
                del paths[len(legal) :]
                illegal = ItemFailed(error.sentence, code="ILLEGAL_NAME", who="you")
                await self._fail([(index, b"", illegal)])
                continue
            legal.append(index)
        if follow:
            self._list_ahead(session, legal, paths)
        results = await self._ask(session, legal, paths, follow=follow)
        files: dict[CollectionPath, list[tuple[int, bytes, Row]]] = {}
        failures: list[tuple[int, bytes, TowpathError]] = []
        folders = [
            (index, path, result.row)
            for index, path, result in zip(legal, paths, results, strict=True)
            if result.row is not None and result.row.kind == DIRECTORY
        ]
        if folders and self._run.context.one_machine:
            failures += await trio.to_thread.run_sync(self._into_themselves, folders)
        if folders and self._run.resumed:
            # What was a file in an earlier run, which left something beside the folder of today.
            may_have_been = [index for index, _, _ in folders if self._items[index].recursive is None]
            await trio.to_thread.run_sync(self._tidy, may_have_been)
        refused = {index for index, _, _ in failures}
        for index, path, result in zip(legal, paths, results, strict=True):
            if index not in refused:
                self._sort(index, path, result, files, failures)
        await self._fail(failures)
        for parent, rows in files.items():
            await self._files(parent, rows)

    async def _ask(
        self, session: SourceSession, indices: list[int], paths: list[bytes], *, follow: bool
    ) -> list[StatResult]:
        """What the paths are; in the first flight of a task, small files are asked for at the same time."""
        first, self._first = self._first, False
        items = [self._items[index] for index in indices]
        may = first and follow and session.ahead and not self._run.resumed
        count = takeable(items, self._run.options) if may else 0
        if not count:
            return await session.stat(paths, follow=follow)
        awaited = Awaited(session.number(), paths[:count])
        self._run.fetcher.expect(awaited)
        try:
            results = await session.take(paths, awaited.r, LANE, count, SMALL_FILE, MOST_BYTES, follow=follow)
        except BaseException:
            self._run.fetcher.discard_awaited()
            raise
        awaited.answered(results)
        return results

    def _list_ahead(self, session: SourceSession, indices: list[int], paths: list[bytes]) -> None:
        """Ask for the rows of the first folders together with the question whether they are folders: on a long path
        that saves a round trip."""
        links = self._run.options.recursive_symlinks == "copy"
        folders = [path for index, path in zip(indices, paths, strict=True) if self._items[index].recursive]
        for path in folders[:LISTED_AHEAD]:
            session.list_ahead(path, follow=links)

    def _sort(
        self,
        index: int,
        path: bytes,
        result: StatResult,
        files: dict[CollectionPath, list[tuple[int, bytes, Row]]],
        failures: list[tuple[int, bytes, TowpathError]],
    ) -> None:
        item, row = self._items[index], result.row
        if row is None:
            error = stat_error(result)
            lasts = self._run.context.patience.lasts_at_source(path, error)
            if isinstance(error, RetryLater | NeedsPerson) and not lasts:
                raise error
            failures.append((index, path, error))
        elif row.kind == DIRECTORY:
            if item.recursive is False:
                failures.append((index, path, _wrong_kind(item, "folder", "IS_A_DIRECTORY")))
            else:
                self._directory(index, path, row)
        elif item.recursive is True:
            failures.append((index, path, _wrong_kind(item, "file", "NOT_A_DIRECTORY")))
        else:
            destination = parse_path_untrusted(item.destination_path)
            if not destination or item.destination_path.endswith("/"):
                failures.append((index, path, _names_a_folder(path, destination)))
            else:
                files.setdefault(destination[:-1], []).append((index, path, row))

    def _into_themselves(self, rows: list[tuple[int, bytes, Row]]) -> list[tuple[int, bytes, TowpathError]]:
        """Those folders of the source that their destination is, or lies in."""
        found: list[tuple[int, bytes, TowpathError]] = []
        for index, path, row in rows:
            place = parse_path_untrusted(self._items[index].destination_path)
            # What is wrong with it otherwise is found out when something is to be written there.
            with contextlib.suppress(OSError), self._nearest(place) as handle:
                if (row.device, row.inode) in enclosing(handle):
                    found.append((index, path, into_itself(join_path(place))))
        return found

    def _nearest(self, place: CollectionPath) -> Directory:
        """The folder in which a place is to be made, or the place itself. Raises OSError."""
        for depth in range(len(place), 0, -1):
            try:
                return self._run.context.root.open_directory(place[:depth])
            except FileNotFoundError:
                continue
        return self._run.context.root.open_directory(())

    def _directory(self, index: int, path: bytes, row: Row) -> None:
        journal = self._run.context.journal
        destination = join_path(parse_path_untrusted(self._items[index].destination_path))
        ancestry = [(row.device, row.inode)]
        journal.add_directories([(index, path, destination, nearest_time(row.mtime_ns), ancestry)])
        journal.put_item(index, done=False)
        if self._run.resumed:
            journal.drop_partial(-1 - index, b"")

    # --- failures --------------------------------------------------------------------------------------

    async def _fail(self, failures: Sequence[tuple[int, bytes, TowpathError]]) -> None:
        """Items that cannot be done: errors of their own, settled like everything else."""
        failures = [row for row in failures if row[0] not in self._settled]
        if not failures:
            return
        await self._run.slot()
        if self._run.resumed:
            await trio.to_thread.run_sync(self._tidy, [index for index, _, _ in failures])
        handle = await trio.to_thread.run_sync(self._run.context.root.open_directory, ())
        group = Group(-1 - failures[0][0], b"", b"", handle, [index for index, _, _ in failures])
        self._run.opened(group)
        group.planned = len(failures)
        for index, path, error in failures:
            item = self._items[index]
            job = FileJob(group, index, _UNKNOWN, path, _session_path(item.destination_path), False)
            self._run.give_up(job, error)
        self._run.settle.put(GroupListed(group))

    def _tidy(self, items: Sequence[int]) -> None:
        """Remove what earlier runs have left of items whose folders nobody else may come to."""
        self._leave_parts(items)
        folders = set()
        for index in items:
            # One whose name cannot be has brought nothing.
            with contextlib.suppress(ProtocolError):
                folders.add(parse_path_untrusted(self._items[index].destination_path)[:-1])
        for folder in folders:
            # Where it is gone, or away with its disk, there is nothing to be removed now.
            with contextlib.suppress(OSError), self._run.context.root.open_directory(folder) as handle:
                self._run.sweep(handle)

    def _leave_parts(self, items: Sequence[int]) -> None:
        """What an earlier run has brought of such items is removed in the end, from the folders in which it lies."""
        journal = self._run.context.journal
        for index in items:
            for temporary in journal.partial_temporaries(-1 - index):
                folder = parse_path_untrusted(self._items[index].destination_path)[:-1]
                journal.add_left_behind(join_path(folder), temporary)

    # --- files -----------------------------------------------------------------------------------------

    async def _files(self, parent: CollectionPath, rows: list[tuple[int, bytes, Row]]) -> None:
        await self._run.slot()
        try:
            group = await trio.to_thread.run_sync(self._open, parent, [index for index, _, _ in rows])
        except OSError as error:
            self._run.release_slot()
            problem = fault(error, "destination", join_path(parent))
            if self._run.context.patience.is_passing(join_path(parent), problem):
                raise problem from error
            await self._fail([(index, path, problem) for index, path, _ in rows])
            return
        self._run.opened(group)
        jobs = [self._job(group, index, path, row) for index, path, row in rows]
        group.planned = len(jobs)
        decisions = await trio.to_thread.run_sync(self._decide, group, jobs)
        copies = [job for job, decision in zip(jobs, decisions, strict=True) if decision == "copy"]
        while copies:
            copies = copies[await self._run.read_attributes(copies) :]
        shared: list[SharedName] = []
        for job, decision in zip(jobs, decisions, strict=True):
            if isinstance(decision, SharedName):
                shared.append(decision)
            else:
                await self._hand_out(job, decision)
        for name in await self._run.hard_links.take(shared) if shared else ():
            await self._run.hard_links.hand_out(name)
        await self._run.offer()
        await self._run.hard_links.room()
        self._run.settle.put(GroupListed(group))

    def _job(self, group: Group, index: int, path: bytes, row: Row) -> FileJob:
        item = self._items[index]
        name = parse_path_untrusted(item.destination_path)[-1]
        # What has to be compared with a checksum of its own comes on its own.
        checked = item.external_checksum is not None or item.checksum_algorithm is not None
        shared = is_shared(row, self._run.options) and not checked
        if row.kind == FILE:
            group.each[index].add_file(row, shared=shared)
        elif row.kind == SYMLINK:
            group.each[index].symlinks += 1
        job = FileJob(group, index, row, path, name, not item.symlink, item.external_checksum, item.checksum_algorithm)
        job.shared = shared
        return job

    def _open(self, parent: CollectionPath, items: list[int]) -> Group:
        context = self._run.context
        handle = context.root.make_directories(parent)
        if self._run.resumed:
            self._run.sweep(handle)
        return Group(-1 - items[0], b"", join_path(parent), handle, items, local=handle.disk() is not None)

    def _decide(self, group: Group, jobs: list[FileJob]) -> list[Decision | SharedName | TowpathError | int]:
        decisions: list[Decision | SharedName | TowpathError | int] = []
        for job in jobs:
            settled = self._settled.get(job.item)
            if settled is not None:
                if settled % LIST_FATE in (FAILED, SKIPPED) or self._is_there(group.handle, job.item):
                    decisions.append(settled)
                    continue
                self._run.settled_is_gone(bytes_settled(job.row, settled))
            existing: Node | None = None
            try:
                taken = self._taken(group, job)
                if taken is not None:
                    decisions.append(taken)
                    continue
                existing = group.handle.lstat(job.name)
            except FileNotFoundError:
                existing = None
            except OSError as error:
                problem = fault(error, "destination", job.destination_path)
                if self._run.context.patience.is_passing(job.destination_path, problem):
                    raise problem from error
                decisions.append(problem)
                continue
            if job.row.kind == SYMLINK:
                decisions.append(decide_link(existing, self._run.options))
            else:
                decision = decide(job.row, existing, self._run.options)
                decisions.append(shared_name(job, decision, existing, self._run.options) or decision)
        return decisions

    async def _hand_out(self, job: FileJob, decision: Decision | TowpathError | int) -> None:
        run = self._run
        if isinstance(decision, int):
            job.group.planned -= 1
            run.count_finished(job, decision)
        elif isinstance(decision, TowpathError):
            run.give_up(job, decision)
        elif decision == "copy":
            refused = _bad_checksum(job)
            if refused is not None:
                run.give_up(job, refused)
            else:
                await run.copy(job)
        elif decision == "skip":
            job.group.planned -= 1
            job.group.each[job.item].files_skipped += job.row.kind == FILE
        elif decision == "compare digests":
            await run.compare(job)
        elif decision == "link":
            run.settle.put(LinkWanted(job, job.row.target or b""))
        elif decision == "conflict" and job.row.kind != DIRECTORY:
            run.give_up(job, _names_a_folder(job.source_path, split_path(job.destination_path)))
        else:
            run.give_up(job, refusal(job.row, decision))


def _bad_checksum(job: FileJob) -> ItemFailed | None:
    try:
        if job.algorithm is not None:
            normalised_algorithm(job.algorithm)
        if job.external_checksum is not None:
            check_given(job.external_checksum, job.algorithm)
    except ItemFailed as error:
        return error
    return None


def _refuse_reserved(path: CollectionPath) -> None:
    if any(is_reserved(component) for component in path):
        raise ProtocolError("Names that begin with .towpath. are reserved for temporaries.", code="ILLEGAL_NAME")


def _wrong_kind(item: TaskItem, found: str, code: str) -> ItemFailed:
    asked = "a folder (recursive)" if item.recursive else "a file"
    return ItemFailed(
        f"The source path names a {found}, but the item asks for {asked}; submit it "
        f"{'with' if found == 'folder' else 'without'} --recursive and with a full destination path.",
        code=code,
        who="you",
    )


def _names_a_folder(source: bytes, destination: CollectionPath) -> ItemFailed:
    """A file's destination is a folder, or is written as one (`/results/`). It is not made up what was meant: a file of
    the folder's name would be replaced by the next one that is sent there."""
    folder, name = format_path(destination, directory=True), split_path(source)[-1]
    return ItemFailed(
        f"The source is a file, and its destination {folder} is a folder; write the whole path of the new file, "
        f"such as {format_path((*destination, name))}.",
        code="IS_A_DIRECTORY",
        who="you",
    )


def _session_path(text: str) -> bytes:
    try:
        return join_path(parse_path_untrusted(text))
    except ProtocolError:
        return text.encode("utf-8", "surrogateescape")
