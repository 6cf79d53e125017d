"""What is done to large files besides receiving them: blocks made durable and read back, the whole file sealed, a file
that failed discarded. All of it runs in one side thread of the settler, in order, so that a descriptor is closed only
behind the checks that were asked for before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from agent.storage import page_cache
from agent.storage.base import Root
from agent.transfer.attributes import Refused, give_access_list, give_attributes
from agent.transfer.jobs import Abandoned, BlocksChecked, FileSealed, LargeFile
from agent.transfer.journal import Journal, PartialRow
from agent.transfer.small_files import OWNER_ACCESS, Remover
from protocol.lane import digest as block_digest


class BlockChecker:
    """Its methods block; one thread calls them."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        *,
        verify: bool,
        mode_mask: int,
        preserve_timestamp: bool,
        refused: Refused,
        remover: Remover,
    ) -> None:
        self._root = root
        self._remover = remover
        self._journal = journal
        self._verify = verify
        self._mode_mask = mode_mask
        self._preserve_timestamp = preserve_timestamp
        self._refused = refused
        self._buffer = memoryview(bytearray(0))

    def check(self, file: LargeFile) -> BlocksChecked:
        """Make written blocks durable and, when verifying, read them back past the page cache if possible."""
        blocks = file.take_unchecked()
        answer = BlocksChecked(file, [], [], sum(file.length_of(index) for index in blocks))
        if file.failed or not blocks:
            return answer
        try:
            file.sealed = self._seal_ahead(file, len(blocks))
            self._root.fsync(file.descriptor)
            if self._verify:
                self._ask_device(file, blocks)
            for index, expected in blocks.items():
                same = not self._verify or self._reads_back(file, index, expected)
                (answer.good if same else answer.bad).append(index)
        except OSError as error:
            answer.error = error
        return answer

    def _seal_ahead(self, file: LargeFile, blocks: int) -> bool:
        """With the last blocks: give the file its mode and time before the sync that it needs anyway, and say whether
        that is done. A block that reads back wrong is written again, and then this is done again."""
        job = file.job
        # What a crash leaves must open again, and what is refused is reported once.
        if file.done_count + blocks < file.count or job.attributes or job.access is not None:
            return False
        if job.row.mode & self._mode_mask & OWNER_ACCESS != OWNER_ACCESS:
            return False
        try:
            self._give_mode_and_time(file)
        except OSError:
            # Sealing tries again, and reports it.
            return False
        return True

    def _give_mode_and_time(self, file: LargeFile) -> None:
        if file.job.access is None:
            self._root.fchmod(file.descriptor, file.job.row.mode & self._mode_mask)
        else:
            # Which is a mode, too: setting one afterwards would change the list's mask.
            give_access_list(self._root, file.job, file.descriptor, self._mode_mask, self._refused)
        if self._preserve_timestamp:
            self._root.futimes(file.descriptor, file.job.row.mtime_ns)

    def _ask_device(self, file: LargeFile, blocks: dict[int, bytes]) -> None:
        """Have the device read all these blocks, so that it sees a queue and not one request at a time, and meanwhile
        write what has come since they were synced."""
        for offset, length in _runs(file, blocks):
            page_cache.forget(file.descriptor, offset, length)
            page_cache.want(file.descriptor, offset, length)
        for offset, length in _runs(file, file.waiting()):
            page_cache.write_soon(file.descriptor, offset, length)

    def _reads_back(self, file: LargeFile, index: int, expected: bytes) -> bool:
        length, offset = file.length_of(index), index * file.block
        if len(self._buffer) < length:
            self._buffer = memoryview(bytearray(file.block))
        view = self._buffer[:length]
        read = 0
        while read < length:
            count = self._root.preadv(file.descriptor, [view[read:]], offset + read)
            if not count:
                return False
            read += count
        return block_digest(view) == expected

    def seal(self, file: LargeFile) -> FileSealed:
        """Give a complete file its mode and time, durably, and close it: only its name is missing then."""
        job = file.job
        answer = FileSealed(file)
        try:
            try:
                if job.attributes:
                    # Before the final mode, which may forbid it, and may be there already from an earlier run.
                    self._root.fchmod(file.descriptor, OWNER_ACCESS)
                    give_attributes(self._root, job, file.descriptor, self._refused)
                if not file.sealed:
                    self._give_mode_and_time(file)
                    self._root.fsync(file.descriptor)
            finally:
                descriptor, file.descriptor = file.descriptor, -1
                self._root.close_file(descriptor)
        except OSError as error:
            answer.error = error
        return answer

    def discard(self, file: LargeFile) -> None:
        """Close and remove the temporary of a file that is given up."""
        self._close(file)
        self._remover.remove(file.job.group, file.temporary)

    def abandon(self, item: Abandoned) -> Abandoned:
        """Close the temporary of a file that is tried again; keep it when some of it counts already."""
        file = item.file
        self._close(file)
        if file.done_count:
            row = PartialRow(file.temporary, file.job.row.version, file.block, file.done)
            self._journal.put_partial(*file.job.key, row)
        else:
            self._remover.remove(file.job.group, file.temporary)
            self._journal.drop_partial(*file.job.key)
        return item

    def _close(self, file: LargeFile) -> None:
        if file.descriptor >= 0:
            descriptor, file.descriptor = file.descriptor, -1
            with contextlib.suppress(OSError):
                # A late write error says nothing new about a file that failed: only blocks that were synced count.
                self._root.close_file(descriptor)


def _runs(file: LargeFile, blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Where these blocks lie: offset and length of each run of neighbours."""
    start = end = -1
    for index in sorted(blocks):
        offset = index * file.block
        if offset != end:
            if end > start:
                yield start, end - start
            start = offset
        end = offset + file.length_of(index)
    if end > start:
        yield start, end - start
