"""What is done to large files besides receiving them: blocks made durable and read back, the whole file sealed, a file
that failed discarded. Two side threads of the settler do it, one behind the other (`CheckLine`): the first syncs all
that waits, files together, and has the device read it; the second waits for what is read, digests it, and closes files.
Everything passes both in order, so that a descriptor is closed only behind the checks that were asked for before."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic, Self, TypeVar

from agent.storage import page_cache
from agent.storage.base import Root
from agent.transfer.basis.jobs import Abandoned, BlocksChecked, FileSealed, LargeFile
from agent.transfer.basis.kept_attributes import Refused, give_access_list, give_attributes
from agent.transfer.books.journal import Journal
from agent.transfer.settling.side_thread import Answers, Broken, SideThread
from agent.transfer.settling.small_files import OWNER_ACCESS, Remover, part_lost
from protocol.lane import digest as block_digest

Answer = TypeVar("Answer")


class BlockChecker:
    """Its methods block. One thread calls `begin`; another one, behind it, everything else but what says otherwise."""

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

    def write_soon(self, file: LargeFile) -> None:
        """Have the device write what waits for its check, so that it has something to do meanwhile. Any thread may
        call; raises nothing: what cannot be written, the sync says."""
        if file.failed:
            return
        with contextlib.suppress(OSError):
            for offset, length in _runs(file, file.waiting()):
                page_cache.write_soon(file.descriptor, offset, length)

    def begin(self, files: Iterable[LargeFile]) -> list[Callable[[], BlocksChecked]]:
        """Make blocks that were written durable, and when verifying have the device read them, past the page cache if
        possible. What remains to be done about each of the files, in this order."""
        checks = []
        for file in files:
            blocks = file.take_unchecked()
            answer = BlocksChecked(file, [], [], len(blocks), sum(map(file.length_of, blocks)))
            checks.append((file, {} if file.failed else blocks, answer))
        for step in (self._sync, self._ask_device) if self._verify else (self._sync,):
            for file, blocks, answer in checks:
                try:
                    if blocks and answer.error is None:
                        step(file, blocks, answer)
                except OSError as error:
                    answer.error = error
                    # At once: the system tells a write error to one sync only, so that the next one may find nothing
                    # wrong with blocks that were lost, too, and must not count them.
                    file.failed = True
        return [partial(self._finish, blocks, answer) for _, blocks, answer in checks]

    def _sync(self, file: LargeFile, _blocks: dict[int, bytes], answer: BlocksChecked) -> None:
        file.sealed = self._seal_ahead(file)
        # Before the sync: of what is written meanwhile nothing needs to be there after a power failure.
        answer.mark = self._root.part_mark(file.descriptor)
        self._root.fsync(file.descriptor)

    def _finish(self, blocks: dict[int, bytes], answer: BlocksChecked) -> BlocksChecked:
        """Read back what was synced."""
        if answer.error is not None:
            return answer
        try:
            for index, expected in blocks.items():
                same = not self._verify or self._reads_back(answer.file, index, expected)
                (answer.good if same else answer.bad).append(index)
        except OSError as error:
            answer.error = error
        return answer

    def _seal_ahead(self, file: LargeFile) -> bool:
        """With the last blocks: give the file its mode and time before the sync that it needs anyway, and say whether
        that is done. A block that reads back wrong is written again, and then this is done again."""
        job = file.job
        # What a crash leaves must open again, and what is refused is reported once.
        if not file.all_here or job.attributes or job.access is not None:
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

    def _ask_device(self, file: LargeFile, blocks: dict[int, bytes], _answer: BlocksChecked) -> None:
        """Have the device read all these blocks, so that it sees a queue and not one request at a time."""
        for offset, length in _runs(file, blocks):
            page_cache.forget(file.descriptor, offset, length)
            page_cache.want(file.descriptor, offset, length)

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
                if self._root.part_mark(file.descriptor)[1] != job.row.size:
                    answer.error = part_lost(job)
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
        """Close the temporary of a file that is tried again; `keep` must follow."""
        self._close(item.file)
        return item

    def keep(self, file: LargeFile) -> None:
        """Keep the temporary of an abandoned file when some of it counts, or remove it. In the settler's thread, which
        has seen by then what became of the last checks."""
        if file.done_count or file.earlier:
            self._journal.put_partial(*file.job.key, file.row())
        else:
            self._remover.remove(file.job.group, file.temporary)
            self._journal.drop_partial(*file.job.key)

    def _close(self, file: LargeFile) -> None:
        if file.descriptor >= 0:
            descriptor, file.descriptor = file.descriptor, -1
            with contextlib.suppress(OSError):
                # A late write error says nothing new about a file that failed: only blocks that were synced count.
                self._root.close_file(descriptor)


class CheckLine(Generic[Answer]):
    """What is asked of a checker. A context manager: the two threads live inside the block, which ends when everything
    asked for is done. Answers, one for each thing ``asked``, go to ``answers``; who takes them counts it down."""

    def __init__(self, checker: BlockChecker, answers: Answers[BlocksChecked | Answer | Broken]) -> None:
        self.asked = 0
        self._checker = checker
        self._answers = answers
        self._due: deque[LargeFile] = deque()
        self._second = SideThread[BlocksChecked | Answer]("check", answers)
        self._first = SideThread[list[Callable[[], BlocksChecked | Answer]]]("flush", self)

    def check(self, file: LargeFile) -> None:
        """Have the blocks of a file checked that were written until now; together with what waits of others by the time
        the first thread is free. The device begins to write them at once."""
        self._checker.write_soon(file)
        self._due.append(file)
        self.asked += 1
        self._first.ask(self._begin)

    def ask(self, function: Callable[[], Answer]) -> None:
        """Run this behind all checks that were asked for before."""
        self.asked += 1
        self._first.ask(lambda: [function])

    def finish(self, function: Callable[[], Answer]) -> None:
        """Run this behind all checks that are through the first thread: for a file with nothing left in it."""
        self.asked += 1
        self._second.ask(function)

    def _begin(self) -> list[Callable[[], BlocksChecked | Answer]]:
        files = [self._due.popleft() for _ in range(len(self._due))]
        return [*self._checker.begin(files)]

    def put(self, answer: list[Callable[[], BlocksChecked | Answer]] | Broken, /) -> None:
        """From the first thread to the second."""
        if isinstance(answer, Broken):
            self._answers.put(answer)
            return
        for function in answer:
            self._second.ask(function)

    def __enter__(self) -> Self:
        self._second.__enter__()
        try:
            self._first.__enter__()
        except BaseException:
            # No more threads to be had: the other one must not outlive the process.
            self._second.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._first.__exit__()
        self._second.__exit__()


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
