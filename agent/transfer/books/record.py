"""Writing down what is settled: counters, manifests, journal. Called only for what is durable under its final name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from agent.transfer.basis.compare import SMALL_FILE
from agent.transfer.basis.jobs import FileJob, Group, LargeFile, Outcome
from agent.transfer.basis.journal_rows import (
    BARE,
    FAILED,
    KEPT,
    LINKED,
    LIST_FATE,
    SKIPPED,
    TRANSFERRED,
    UNCHANGED,
    HardLinkRow,
    PartialRow,
    Place,
    bytes_done,
)
from agent.transfer.books.counted import add_counts, keep_counted, uncount
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter, SkippedRow, TransferredRow
from protocol.errors import RetryLater
from protocol.names import format_path, is_within, split_path
from protocol.session import join_path


class FolderMoved(RetryLater):
    """A folder of the destination (the sentence names the first of ``folders``) is not in its place any more: what was
    written into it is wherever that is now."""

    def __init__(self, folders: Sequence[bytes]) -> None:
        self.folders = folders
        subject = format_path(split_path(folders[0]), directory=True)
        sentence = (
            f"{subject[:1000]} was renamed, removed or replaced at the destination while files were written into it; "
            "what belongs there is transferred again."
        )
        super().__init__(sentence, code="FOLDER_MOVED", who="destination owner", subject=subject)


class Record:
    """The books of one task. Any thread may call; a commit waits for the disk, and others for it."""

    def __init__(
        self,
        journal: Journal,
        manifests: tuple[ManifestWriter, ManifestWriter],
        *,
        verify: bool,
        now: Callable[[], str],
        remove: Callable[[Group, bytes], None] = lambda _group, _temporary: None,
        probe: Callable[[], bytes] = lambda: b"",
    ) -> None:
        self._lock = threading.RLock()
        self._remove = remove
        self._probe = probe
        self.journal = journal
        self.counters = journal.counters()
        self.settled_bytes = journal.settled()
        self._transferred, self._skipped = manifests
        self._verify = verify
        self._now = now
        self._unsynced: set[ManifestWriter] = set()

    def settle(self, size: int) -> None:
        """So many bytes more are durable; below zero, so many have to be transferred again."""
        self.settled_bytes = max(0, self.settled_bytes + size)

    def part_settled(self, file: LargeFile, size: int) -> None:
        """So many bytes more of a large file are durable, as its bitmap has them."""
        with self._lock, self.journal.together():
            file.settled += size
            self.settle(size)
            self._put_settled()
            self.journal.put_partial(*file.job.key, file.row())

    def part_taken(self, file: LargeFile, known: PartialRow) -> None:
        """What had arrived of another version of a large file becomes something to be compared with this one; durable
        when this returns, so that whatever is written into it counts for no other version."""
        with self._lock, self.journal.together():
            self.settle(-bytes_done(known))
            self._put_settled()
            self.journal.put_partial(*file.job.key, file.row())
            self.journal.commit()

    def part_dropped(self, file: LargeFile) -> None:
        """A large file begins anew, or is given up: nothing of it counts any more."""
        with self._lock, self.journal.together():
            self.settle(-file.settled)
            file.settled = 0
            self._put_settled()
            self.journal.drop_partial(*file.job.key)

    def known_part_dropped(self, job: FileJob, temporary: bytes) -> None:
        """The same for what an earlier run left of a file, if it is still the journal's."""
        with self._lock, self.journal.together():
            known = self.journal.partial(*job.key)
            if known is not None and known.temporary == temporary:
                self.settle(-bytes_done(known))
                self._put_settled()
                self.journal.drop_partial(*job.key)

    def _put_settled(self) -> None:
        self.journal.put_settled(self.settled_bytes)

    def _note_transferred(self, done: list[tuple[FileJob, str | None]], linked: list[FileJob]) -> int:
        """Files (with a published checksum, where one was asked for) and links that have their final names. The bytes
        that are settled by that."""
        rows = []
        settled = 0
        verify, group, source, destination = self._verify, None, b"", b""
        for job, checksum in done:
            counts, size = job.group.counts_of(job.item), job.row.size
            counts.files_transferred += 1
            if job.linked:
                counts.hard_links_kept += 1
                rows.append(TransferredRow(job.source_path, job.destination_path, size))
                continue
            if job.group is not group:
                # Files of one folder mostly come one after the other.
                group = job.group
                source = group.source + b"/" if group.source else b""
                destination = group.destination + b"/" if group.destination else b""
            if job.place is not None:
                self._note_place(job, job.place)
            counts.bytes_transferred += size
            if job.attributes_left_out:
                counts.xattrs_left_out += 1
            if job.list_fate:
                counts.add_list(job.list_fate)
            if verify:
                counts.bytes_checksummed += size
            if size <= SMALL_FILE:
                settled += size
            algorithm = (job.algorithm or "MD5") if checksum else None
            rows.append(TransferredRow(source + job.source_name, destination + job.name, size, checksum, algorithm))
        for job in linked:
            job.group.counts_of(job.item).symlinks_transferred += 1
            rows.append(TransferredRow(job.source_path, job.destination_path, 0))
        self._append(self._transferred, rows)
        return settled

    def _note_outcomes(self, outcomes: list[Outcome]) -> None:
        """Jobs that ended without content: errors, or nothing to do."""
        rows = []
        for outcome in outcomes:
            job, error = outcome.job, outcome.error
            counts = job.group.counts_of(job.item)
            if error is None:
                counts.files_skipped += 1
                counts.hard_links_kept += job.linked
                if job.place is not None:
                    self._note_place(job, job.place)
                continue
            if outcome.skipped:
                counts.skipped_errors += 1
            else:
                counts.failed += 1
            rows.append(skipped_row(job, error, self._now()))
        self._append(self._skipped, rows)

    def _note_place(self, job: FileJob, place: Place) -> None:
        """Remember what a file with several names became, for the other ones."""
        row = HardLinkRow(job.row.version, job.destination_path, place)
        self.journal.put_hard_link((job.row.device, job.row.inode), row)

    def _append(self, manifest: ManifestWriter, rows: list[TransferredRow] | list[SkippedRow]) -> None:
        if rows:
            manifest.append(rows)
            self._unsynced.add(manifest)

    def settled(
        self,
        transferred: list[tuple[FileJob, str | None]],
        linked: list[FileJob],
        outcomes: list[Outcome],
        complete: list[LargeFile],
        listed: list[Group],
    ) -> list[Group]:
        """Files (with a published checksum, where one was asked for) and links that have their final names, and jobs
        that ended without: counted, listed, and durable when this returns. The groups that are done now.

        Raises `FolderMoved` when all else is in the books and a group that was done is not where it was."""
        with self._lock:
            size = self._note_transferred(transferred, linked)
            self._note_outcomes(outcomes)
            settled = [job for job, _ in transferred] + linked
            done, moved = self._commit_all(settled, outcomes, complete, listed, size)
        if moved:
            raise FolderMoved(moved)
        return done

    def _commit_all(
        self, settled: list[FileJob], outcomes: list[Outcome], complete: list[LargeFile], listed: list[Group], size: int
    ) -> tuple[list[Group], list[bytes]]:
        """Count jobs in their groups, fold groups that are done, and make all of it durable: manifest first, then the
        journal that says how long it is. The groups that are done now, and folders that have left their places."""
        for manifest in self._unsynced:
            manifest.sync()
        self._unsynced.clear()
        with self.journal.together():
            size += sum(file.last_check for file in complete)
            # Not before: a manifest that cannot be synced ends the run, but not before others have kept their books.
            self.settle(size)
            try:
                return self._commit(settled, outcomes, complete, listed)
            except BaseException:
                self.settle(-size)
                raise

    def _commit(
        self, settled: list[FileJob], outcomes: list[Outcome], complete: list[LargeFile], listed: list[Group]
    ) -> tuple[list[Group], list[bytes]]:
        groups: dict[int, Group] = {id(group): group for group in listed}
        for group in listed:
            group.listed = True
        for job in settled:
            job.group.settled += 1
            groups[id(job.group)] = job.group
        for outcome in outcomes:
            outcome.job.group.settled += 1
            groups[id(outcome.job.group)] = outcome.job.group
        done = [group for group in groups.values() if group.complete]
        moved = {id(group): folder for group in done if (folder := self._left(group)) is not None}
        done = [group for group in done if id(group) not in moved] if moved else done
        done_ids = {group.id for group in done if group.id > 0}
        finished = [(*job.key, _settled_code(job)) for job in settled if job.group.id not in done_ids]
        finished += [
            (*outcome.job.key, _outcome_code(outcome))
            for outcome in outcomes
            if outcome.job.group.id not in done_ids or outcome.error is not None
        ]
        self.journal.put_finished(finished)
        for file in complete:
            self.journal.drop_partial(*file.job.key)
        for group in done:
            self._fold(group)
        folders = list(dict.fromkeys(moved.values()))
        for folder in folders:
            self.journal.note_moved(folder)
        self.journal.put_counters(self.counters)
        self._put_settled()
        self.journal.put_lengths(self._transferred.length, self._skipped.length)
        self.journal.commit()
        return done, folders

    def reopen_items(self, items: Collection[int]) -> None:
        """What was brought for these single items, which were done, is not there any more: it comes again, and is
        counted with what comes then."""
        with self._lock, self.journal.together():
            self.journal.put_counters(self.counters)
            self._put_settled()
            self.journal.reopen_items(items)
            uncount(self.journal, items)
            self.counters = self.journal.counters()
            self.settled_bytes = self.journal.settled()

    def gone(self, size: int) -> None:
        """So many bytes of files that were settled, and had not been counted yet, are not there any more."""
        with self._lock:
            self.settle(-size)
            self._put_settled()

    def forget_below(self, folders: Sequence[bytes], groups: Iterable[Group]) -> None:
        """What was settled of these groups, as far as they are at or below folders that left their places, comes again;
        none of them was done."""
        left = [split_path(folder) for folder in folders]
        with self._lock, self.journal.together():
            for group in groups:
                path = split_path(group.destination)
                if not group.folded and any(is_within(path, folder) for folder in left):
                    self.settle(-sum(counts.bytes_transferred for counts in group.all_counts))
            self._put_settled()

    def _left(self, group: Group) -> bytes | None:
        """The folder that is not in its place any more, of those that lead to a group's and itself; None if all are."""
        handle, named = group.handle, split_path(group.destination)
        gone = len(handle.path) - handle.components_in_place(self._probe())
        # The group's own name leads there by links, perhaps: what both have in common at the end is what was moved.
        while gone > 1 and named[-gone:] != handle.path[-gone:]:
            gone -= 1
        return join_path(named[: len(named) - gone + 1]) if gone else None

    def removed(self, count: int, failures: list[SkippedRow]) -> None:
        """Extras of a mirror that are gone or could not be removed; durable when this returns."""
        with self._lock:
            self.counters = msgspec.structs.replace(
                self.counters, deleted=self.counters.deleted + count, failed=self.counters.failed + len(failures)
            )
            self._append(self._skipped, failures)
            self._commit_all([], [], [], [], 0)

    def _fold(self, group: Group) -> None:
        """Add a finished group's counts to the task's and forget its details."""
        group.folded = True
        if group.counts.directories:
            # One that is listed again was counted with all that before.
            group.counts.xattrs_left_out += group.attributes_left_out
            group.counts.add_list(group.list_fate)
        self.counters = add_counts(self.counters, group.all_counts)
        if group.id > 0:
            self._finish(group, group.id, failures=bool(group.counts.failed or group.counts.skipped_errors))
        else:
            keep_counted(self.journal, group.each)
            failed = self.journal.failed_items(group.items)
            for item in group.items:
                self.journal.put_item(item, done=True, failed=item in failed)
                self._finish(group, -1 - item)

    def _finish(self, group: Group, directory: int, *, failures: bool = False) -> None:
        """Mark a directory, or what stands for an item, as done. Parts of large files that are left of it are of no
        use any more: the source has a small file there by now, something else, or nothing."""
        for part in self.journal.partials(directory):
            self.settle(-bytes_done(part))
            self._remove(group, part.temporary)
        self.journal.finish_directory(directory, failures=failures)


def skipped_row(job: FileJob, error: dict[str, object], now: str) -> SkippedRow:
    """How a failed file, or a folder that failed as a whole, is listed among the task's errors."""
    whole = job.name == b"."
    return SkippedRow(
        job.group.source if whole else job.source_path,
        job.group.destination if whole else job.destination_path,
        job.row.kind,
        str(error["code"]),
        str(error["sentence"]),
        now,
        False,
        job.external_checksum,
        job.algorithm,
    )


def _settled_code(job: FileJob) -> int:
    if job.linked:
        return LINKED
    return (BARE if job.attributes_left_out else TRANSFERRED) + LIST_FATE * job.list_fate


def _outcome_code(outcome: Outcome) -> int:
    if outcome.error is None:
        return KEPT if outcome.job.linked else UNCHANGED
    return SKIPPED if outcome.skipped else FAILED
