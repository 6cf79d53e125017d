"""Settling: the one thread that turns written temporaries into final names, in the only safe order.

sync the temporaries → read them back (when asked to verify) → rename → sync the directories → manifest → journal.
Everything that waits is settled together, so one pass costs few system calls however many files it holds, and what
piles up during a pass is the next one.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.transfer.checksum import file_digest
from agent.transfer.jobs import (
    BlocksWritten,
    FileJob,
    Group,
    GroupListed,
    LargeFile,
    LinkWanted,
    Outcome,
    SmallWritten,
    ToSettle,
)
from agent.transfer.journal import FAILED, SKIPPED, TRANSFERRED, UNCHANGED, Journal, PartialRow
from agent.transfer.manifest import ManifestWriter, SkippedRow, TransferredRow
from agent.transfer.receive import OWNER_ACCESS
from protocol.control import Counters
from protocol.errors import ItemFailed, RetryLater, TowpathError
from protocol.lane import digest as block_digest

# From this many files on, one syncfs is cheaper than an fsync each.
SYNCFS_FROM = 32


class SettleReports(Protocol):
    """What the settler tells the trio thread; every method may be called from any thread and returns at once."""

    def settled(self, jobs: list[FileJob], released: int) -> None: ...
    def blocks_settled(self, size: int) -> None: ...
    def job_failed(self, job: FileJob, error: TowpathError) -> None: ...
    def file_failed(self, file: LargeFile, error: TowpathError) -> None: ...
    def refetch(self, file: LargeFile, index: int) -> None: ...
    def group_done(self, group: Group) -> None: ...


class Settler:
    """Owns journal writes about content. `run` blocks until `stop`; an error it raises ends the run of the task."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        manifests: tuple[ManifestWriter, ManifestWriter],
        *,
        verify: bool,
        preserve_timestamp: bool,
        mode_mask: int,
        reports: SettleReports,
        temporary_name: Callable[[], bytes],
        now: Callable[[], str],
    ) -> None:
        self.queue: queue.SimpleQueue[ToSettle | None] = queue.SimpleQueue()
        self.counters = journal.counters()
        self.settled_bytes = int(journal.get("settled") or b"0")
        self._root = root
        self._journal = journal
        self._transferred, self._skipped = manifests
        self._verify = verify
        self._preserve_timestamp = preserve_timestamp
        self._mode_mask = mode_mask
        self._reports = reports
        self.temporary_name = temporary_name
        self._now = now

    def stop(self) -> None:
        """Let `run` settle what is queued and return."""
        self.queue.put(None)

    def run(self) -> None:
        """Settle until stopped. Raises `TowpathError` when nothing can be settled any more (a full disk)."""
        stopping = False
        while not stopping:
            batch = [self.queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self.queue.get_nowait())
            stopping = None in batch
            try:
                _Pass(self, [item for item in batch if item is not None]).run()
            except OSError as error:
                raise fault(error, "destination", b"") from error

    def commit(self) -> None:
        """Manifest first, then the journal that says how long it is."""
        self._transferred.sync()
        self._skipped.sync()
        self._journal.put_counters(self.counters)
        self._journal.put("settled", str(self.settled_bytes).encode())
        self._journal.put_lengths(self._transferred.length, self._skipped.length)
        self._journal.commit()


class _Pass:
    """One settling pass over what was waiting."""

    def __init__(self, settler: Settler, batch: list[ToSettle]) -> None:
        self.s = settler
        self.small = [item for item in batch if isinstance(item, SmallWritten)]
        self.files = {id(item.file): item.file for item in batch if isinstance(item, BlocksWritten)}
        self.links = [item for item in batch if isinstance(item, LinkWanted)]
        self.outcomes = [item for item in batch if isinstance(item, Outcome)]
        self.listed = [item.group for item in batch if isinstance(item, GroupListed)]
        self.complete: list[LargeFile] = []
        self.transferred: list[tuple[FileJob, str | None]] = []
        self.linked: list[FileJob] = []
        self.checked_bytes = 0

    def run(self) -> None:
        for file in list(self.files.values()):
            self._check_blocks(file)
        self._sync_small()
        if self.s._verify:
            self.small = [item for item in self.small if self._read_back(item)]
        self._publish()
        self._record()

    # --- temporaries -----------------------------------------------------------------------------------

    def _check_blocks(self, file: LargeFile) -> None:
        """Make written blocks durable and, when verifying, read them back; then they count."""
        blocks = file.take_unchecked()
        size = sum(file.length_of(index) for index in blocks)
        if file.failed or not blocks:
            self.checked_bytes += size
            return
        try:
            self.s._root.fsync(file.descriptor)
            for index, expected in blocks.items():
                if self.s._verify and self._block_differs(file, index, expected):
                    self.s._reports.refetch(file, index)
                    continue
                file.mark_done(index)
        except OSError as error:
            file.failed = True
            self.s._reports.file_failed(file, fault(error, "destination", file.job.destination_path))
            return
        finally:
            self.checked_bytes += size
        self.s.settled_bytes += size
        if file.complete:
            self.complete.append(file)
        else:
            row = PartialRow(file.temporary, file.job.row.version, file.block, file.done)
            self.s._journal.put_partial(*file.job.key, row)

    def _block_differs(self, file: LargeFile, index: int, expected: bytes) -> bool:
        length, offset = file.length_of(index), index * file.block
        buffer = memoryview(bytearray(length))
        os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        read = 0
        while read < length:
            count = self.s._root.preadv(file.descriptor, [buffer[read:]], offset + read)
            if not count:
                return True
            read += count
        return block_digest(buffer) != expected

    def _sync_small(self) -> None:
        if not self.small:
            return
        if len(self.small) >= SYNCFS_FROM and self.s._root.features.syncfs:
            self.s._root.syncfs()
            return
        kept = []
        for item in self.small:
            handle = item.job.group.handle
            try:
                descriptor = handle.open_temporary(item.temporary)
                try:
                    self.s._root.fsync(descriptor)
                finally:
                    self.s._root.close_file(descriptor)
                kept.append(item)
            except OSError as error:
                self._drop(item.job, item.temporary, fault(error, "destination", item.job.destination_path))
        self.small = kept

    def _read_back(self, item: SmallWritten) -> bool:
        """Whether a small file reads back as it was sent, past the page cache where the system allows."""
        size = item.job.row.size
        try:
            descriptor = item.job.group.handle.open_temporary(item.temporary)
            try:
                if size:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                buffer = memoryview(bytearray(size + 1))
                read = 0
                while count := self.s._root.preadv(descriptor, [buffer[read:]], read):
                    read += count
            finally:
                self.s._root.close_file(descriptor)
        except OSError as error:
            self._drop(item.job, item.temporary, fault(error, "destination", item.job.destination_path))
            return False
        if read == size and block_digest(buffer[:size]) == item.digest:
            return True
        self._drop(item.job, item.temporary, _differs(item.job))
        return False

    def _drop(self, job: FileJob, temporary: bytes, error: TowpathError) -> None:
        with contextlib.suppress(OSError):
            job.group.handle.unlink(temporary)
        self.s._reports.job_failed(job, error)

    # --- final names -----------------------------------------------------------------------------------

    def _publish(self) -> None:
        touched: dict[int, Directory] = {}
        for item in self.small:
            if self._finish(item.job, item.temporary):
                touched[id(item.job.group)] = item.job.group.handle
        for file in self.complete:
            if self._finish_large(file):
                touched[id(file.job.group)] = file.job.group.handle
        for link in self.links:
            if self._link(link):
                touched[id(link.job.group)] = link.job.group.handle
        for group in self.listed:
            # New folders in it were made while it was listed.
            touched[id(group)] = group.handle
        for handle in touched.values():
            handle.sync()

    def _link(self, link: LinkWanted) -> bool:
        job, temporary = link.job, self.s.temporary_name()
        try:
            job.group.handle.symlink(temporary, link.target)
            job.group.handle.rename(temporary, job.name)
            if self.s._preserve_timestamp:
                job.group.handle.set_times(job.name, job.row.mtime_ns)
        except OSError as error:
            self._drop(job, temporary, fault(error, "destination", job.destination_path))
            return False
        self.linked.append(job)
        return True

    def _finish_large(self, file: LargeFile) -> bool:
        job = file.job
        try:
            try:
                self.s._root.fchmod(file.descriptor, job.row.mode & self.s._mode_mask)
                if self.s._preserve_timestamp:
                    self.s._root.futimes(file.descriptor, job.row.mtime_ns)
                self.s._root.fsync(file.descriptor)
            finally:
                descriptor, file.descriptor = file.descriptor, -1
                self.s._root.close_file(descriptor)
        except OSError as error:
            self._drop(job, file.temporary, fault(error, "destination", job.destination_path))
            return False
        return self._finish(job, file.temporary)

    def _finish(self, job: FileJob, temporary: bytes) -> bool:
        """Check a published digest when there is one, then rename. Whether the name is there now."""
        checksum = None
        try:
            if job.external_checksum is not None or job.algorithm is not None:
                checksum = self._published_digest(job, temporary)
            mode = job.row.mode & self.s._mode_mask
            if job.small and mode & OWNER_ACCESS != OWNER_ACCESS:
                job.group.handle.set_mode(temporary, mode)
            job.group.handle.rename(temporary, job.name)
        except TowpathError as error:
            self._drop(job, temporary, error)
            return False
        except OSError as error:
            self._drop(job, temporary, fault(error, "destination", job.destination_path))
            return False
        self.transferred.append((job, checksum))
        return True

    def _published_digest(self, job: FileJob, temporary: bytes) -> str:
        descriptor = job.group.handle.open_temporary(temporary)
        try:
            value = file_digest(self.s._root, descriptor, job.algorithm or "MD5")
        finally:
            self.s._root.close_file(descriptor)
        if job.external_checksum is not None and value != job.external_checksum.lower():
            raise ItemFailed(
                f"The {job.algorithm or 'MD5'} digest of the file is {value}, not {job.external_checksum.lower()} as "
                "was given; the source holds other content than expected.",
                code="VERIFY_CHECKSUM",
                who="source owner",
            )
        return value

    # --- bookkeeping -----------------------------------------------------------------------------------

    def _record(self) -> None:
        finished: list[tuple[int, bytes, int]] = []
        groups: dict[int, Group] = {id(group): group for group in self.listed}
        for group in self.listed:
            group.listed = True
        settled = [job for job, _ in self.transferred] + self.linked
        self._record_transferred()
        self._record_outcomes()
        for job in settled:
            self._count(job, groups)
            finished.append((*job.key, TRANSFERRED))
        for outcome in self.outcomes:
            self._count(outcome.job, groups)
            finished.append((*outcome.job.key, _outcome_code(outcome)))
        done = [group for group in groups.values() if group.complete]
        done_ids = {group.id for group in done if group.id > 0}
        self.s._journal.put_finished(row for row in finished if row[0] not in done_ids)
        for file in self.complete:
            if file.job.key[0] not in done_ids:
                self.s._journal.drop_partial(*file.job.key)
        for group in done:
            self._fold(group)
        self.s.commit()
        jobs = settled + [outcome.job for outcome in self.outcomes]
        self.s._reports.settled(jobs, sum(job.charged for job in jobs))
        if self.checked_bytes:
            self.s._reports.blocks_settled(self.checked_bytes)
        for group in done:
            self.s._reports.group_done(group)

    def _count(self, job: FileJob, groups: dict[int, Group]) -> None:
        job.group.settled += 1
        groups[id(job.group)] = job.group

    def _record_transferred(self) -> None:
        rows = []
        for job, checksum in self.transferred:
            counts = job.group.counts
            counts.files_transferred += 1
            counts.bytes_transferred += job.row.size
            if self.s._verify:
                counts.bytes_checksummed += job.row.size
            if job.small:
                self.s.settled_bytes += job.row.size
            algorithm = (job.algorithm or "MD5") if checksum else None
            rows.append(TransferredRow(job.source_path, job.destination_path, job.row.size, checksum, algorithm))
        for job in self.linked:
            job.group.counts.symlinks_transferred += 1
            rows.append(TransferredRow(job.source_path, job.destination_path, 0))
        self.s._transferred.append(rows)

    def _record_outcomes(self) -> None:
        rows = []
        for outcome in self.outcomes:
            job, error = outcome.job, outcome.error
            if outcome.discard is not None:
                self._discard(outcome.discard)
            if error is None:
                job.group.counts.files_skipped += 1
                continue
            if outcome.skipped:
                job.group.counts.skipped_errors += 1
            else:
                job.group.counts.failed += 1
            rows.append(skipped_row(job, error, self.s._now()))
        self.s._skipped.append(rows)

    def _discard(self, file: LargeFile) -> None:
        if file.descriptor >= 0:
            descriptor, file.descriptor = file.descriptor, -1
            self.s._root.close_file(descriptor)
        with contextlib.suppress(OSError):
            file.job.group.handle.unlink(file.temporary)
        self.s._journal.drop_partial(*file.job.key)

    def _fold(self, group: Group) -> None:
        """Add a finished group's counts to the task's and forget its details."""
        group.folded = True
        self.s.counters = add_counts(self.s.counters, group)
        if group.id > 0:
            self.s._journal.finish_directory(group.id)
        else:
            for item in group.items:
                self.s._journal.put_item(item, done=True)
                self.s._journal.finish_directory(-1 - item)


def skipped_row(job: FileJob, error: dict[str, object], now: str) -> SkippedRow:
    """How a failed file is listed among the task's errors."""
    return SkippedRow(
        job.source_path,
        job.destination_path,
        job.row.kind,
        str(error["code"]),
        str(error["sentence"]),
        now,
        False,
        job.external_checksum,
        job.algorithm,
    )


def add_counts(counters: Counters, group: Group) -> Counters:
    """Task counters with a group's counts added; counts of errors met during the scan are part of the group."""
    counts = group.counts
    names: Iterable[str] = counts.__slots__
    changes = {name: getattr(counters, name) + getattr(counts, name) for name in names}
    return msgspec.structs.replace(counters, **changes)


def _outcome_code(outcome: Outcome) -> int:
    if outcome.error is None:
        return UNCHANGED
    return SKIPPED if outcome.skipped else FAILED


def _differs(job: FileJob) -> RetryLater:
    return RetryLater(
        "A file read back from the destination's storage differs from what was written; it is transferred again.",
        code="VERIFY_CHECKSUM",
        who="destination owner",
    )
