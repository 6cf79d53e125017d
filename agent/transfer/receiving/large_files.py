"""Large files of a run: opened, asked for in ranges, their blocks fetched again where the storage lost them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import trio

from agent.storage import page_cache
from agent.storage.faults import fault
from agent.transfer.asking.arrivals import damaged
from agent.transfer.asking.ranges import MEMORY_RANGE
from agent.transfer.asking.source_session import SessionLost
from agent.transfer.basis.compare import block_count, block_size, missing_ranges
from agent.transfer.basis.holes import WORTH_ASKING, mark_holes, sparse_block
from agent.transfer.basis.jobs import (
    Abandoned,
    AllThere,
    BlocksWritten,
    FileJob,
    LargeFile,
    PartDropped,
    count_done,
    empty_bitmap,
)
from agent.transfer.basis.journal_rows import PartialRow, bytes_done
from agent.transfer.basis.patience import PART_LOST, VERIFY_CHECKSUM, attempts, counted
from agent.transfer.course.run import Run
from agent.transfer.receiving.common_holes import common_holes
from agent.transfer.receiving.named_files import named_file
from agent.transfer.receiving.reuse import Reuse, may_compare
from agent.transfer.settling.small_files import OWNER_ACCESS
from protocol.errors import ItemFailed, NeedsPerson, RetryLater, TaskFailed, TowpathError
from protocol.names import escape
from protocol.session import EXTENTS

LARGE_AT_ONCE = 4
# Which blocks of a file are there is kept in memory and in the journal: 128 MiB for one of this size.
LARGEST_FILE = 1 << 54


class LargeFiles:
    """All large files of one run. Public methods are called in the trio thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting_in, self._waiting_out = trio.open_memory_channel[FileJob](64)
        # Those whose temporaries may be open.
        self._open_files: set[LargeFile] = set()

    def close(self) -> None:
        """Close what the end of the run has left open, when nobody is at work on it any more. Blocks."""
        files, self._open_files = self._open_files, set()
        for file in files:
            if file.descriptor >= 0:
                descriptor, file.descriptor = file.descriptor, -1
                with suppress(OSError):
                    # Only what was synced before counts.
                    self._run.context.root.close_file(descriptor)

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to take files; ends with the nursery."""
        for _ in range(LARGE_AT_ONCE):
            nursery.start_soon(self._feed)

    async def copy(self, job: FileJob) -> None:
        """Have a large file brought over; waits while enough others are waiting."""
        await self._waiting_in.send(job)

    async def _feed(self) -> None:
        async for job in self._waiting_out.clone():
            await self._fetch(job)

    async def _fetch(self, job: FileJob) -> None:
        run = self._run
        if job.row.size > LARGEST_FILE:
            sentence = f"{escape(job.source_path)} is larger than 16 PiB, the most that is transferred as one file."
            run.give_up(job, ItemFailed(sentence, code="TOO_LARGE", who="source owner"))
            return
        try:
            opened = await trio.to_thread.run_sync(self._open, job)
            file = await self._gone(job, opened) if isinstance(opened, PartialRow) else opened
        except OSError as error:
            run.retries.job_failed(job, fault(error, "destination", job.destination_path))
            return
        if file is None:
            return
        self._open_files = {file, *(each for each in self._open_files if each.descriptor >= 0)}
        if file.complete:
            run.settle.put(AllThere(file))
            return
        await self._leave_holes(file)
        reuse = Reuse(run, file)
        # Held open while ranges are being handed out, so that the file is not taken for idle in between.
        file.open_ranges += 1
        await reuse.run()
        for offset, length in self._ranges(file, reuse.have):
            await run.budget.acquire(length)
            if file.failed:
                run.budget.release(length)
                break
            run.fetcher.submit_range(file, offset, length)
        file.open_ranges -= 1
        if not file.open_ranges:
            self.idle(file)

    def _ranges(self, file: LargeFile, have: bytes | bytearray) -> Iterator[tuple[int, int]]:
        """Offset and length of what is missing, each as long as suits at the time it is asked for."""
        run, block = self._run, file.block
        for offset, length in missing_ranges(have, file.job.row.size, block, max(MEMORY_RANGE, block)):
            end = offset + length
            while offset < end:
                piece = min(end - offset, max(run.fetcher.range_bytes(run.budget.total), block))
                yield offset, piece
                offset += piece

    async def _leave_holes(self, file: LargeFile) -> None:
        """Take the blocks of a sparse file that hold no data as done where the temporary has holes already."""
        job, session = file.job, self._run.session
        if job.row.size < WORTH_ASKING or file.done_count or EXTENTS not in session.abilities:
            return
        try:
            if file.earlier:
                file.done[:] = await common_holes(self._run, job, file.descriptor, file.block)
                file.done_count = count_done(file.done)
                return
            extents = await session.extents(job.source_path, job.row.version, follow=job.follow)
        except SessionLost:
            raise
        except (OSError, TowpathError):
            # Whatever is wrong with the file, reading it says so, and whether it passes.
            return
        if extents is not None:
            # Nothing of it was asked for yet.
            file.block = sparse_block(extents, job.row.size, file.block)
            file.done = empty_bitmap(job.row.size, file.block)
            mark_holes(file.done, extents, job.row.size, file.block)
            file.done_count = count_done(file.done)

    def _open(self, job: FileJob) -> LargeFile | PartialRow:
        """The temporary of a large file: the one an earlier run left, when it holds the same version, or a new one. Of
        one that is gone, what the journal has.

        Runs in a worker thread of trio, as `_begin_again` does.
        """
        known = self._run.context.journal.partial(*job.key)
        if known is None:
            return self._begin(job)
        other = known.version != job.row.version
        if other and not (may_compare(self._run, job.row.size) and known.block == block_size(job.row.size)):
            return self._begin_again(job, known)
        lost = True
        try:
            self._let_write(job, known.temporary)
            descriptor = job.group.handle.open_temporary(known.temporary)
            if self._is_known(descriptor, known):
                with self._closed_after_an_error(descriptor):
                    file = self._opened(job, known, descriptor, other=other)
                if file is not None:
                    return file
                lost = False
                self._run.context.root.close_file(descriptor)
        except FileNotFoundError:
            return self._begin_again(job, known) if other else known
        except OSError as error:
            if _worth_another_try(job, error):
                raise
        return self._begin_again(job, known, lost=lost)

    @contextmanager
    def _closed_after_an_error(self, descriptor: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._run.context.root.close_file(descriptor)
            raise

    def _opened(self, job: FileJob, known: PartialRow, descriptor: int, *, other: bool) -> LargeFile | None:
        """What is in flight. What has arrived of another version counts for nothing until it is compared with this one:
        the journal says so before anything is written into it. None if it is of no use."""
        root = self._run.context.root
        if not other:
            file = LargeFile(
                job, known.temporary, descriptor, known.block, known.done, count_done(known.done), bytes_done(known)
            )
            file.mark, file.earlier = known.mark, known.earlier
        elif self._run.options.preserve_xattrs and root.get_attributes(descriptor).attributes:
            # Complete but for its name, and with attributes that the file may not have any more.
            return None
        else:
            done = empty_bitmap(job.row.size, known.block)
            file = LargeFile(job, known.temporary, descriptor, known.block, done, 0)
            file.earlier = _earlier(known, job.row.size)
            if known.mark is not None:
                file.mark = (known.mark[0], min(known.mark[1], job.row.size))
            self._run.part_taken(file, known)
        if file.earlier:
            self._make_fit(file)
        return file

    def _make_fit(self, file: LargeFile) -> None:
        """Take from a part what another version left of itself there, again after each attempt that ended meanwhile.
        Raises OSError."""
        root, size = self._run.context.root, file.job.row.size
        # Who may read that version may not read this one, perhaps.
        root.fchmod(file.descriptor, OWNER_ACCESS)
        if root.part_mark(file.descriptor)[1] > size:
            root.ftruncate(file.descriptor, size)
        # What was cut off must not be in holes after a power failure, should the file grow again.
        root.fsync(file.descriptor)
        # Blocks that an earlier sync could not write are as they should be in memory alone.
        page_cache.forget(file.descriptor)

    def _let_write(self, job: FileJob, temporary: bytes) -> None:
        """One that was stopped between its last blocks and its name may have a mode that forbids to write. Raises
        OSError."""
        handle = job.group.handle
        node = handle.lstat(temporary)
        # What else lies there by now is refused when it is opened, and is to stay as it is.
        ours = node.kind == "file" and node.nlink == 1
        if ours and node.mode & OWNER_ACCESS != OWNER_ACCESS:
            handle.set_mode(temporary, OWNER_ACCESS)

    def _is_known(self, descriptor: int, known: PartialRow) -> bool:
        """Whether a temporary may be what the journal says of it; it is closed if not. Raises OSError."""
        root = self._run.context.root
        same = False
        try:
            same = known.mark is None or root.is_part(descriptor, known.mark)
        finally:
            if not same:
                root.close_file(descriptor)
        return same

    async def _gone(self, job: FileJob, known: PartialRow) -> LargeFile | None:
        """There is no temporary any more: it has the file's name, so that there is nothing to do but to write that
        down (None), or the file begins anew. Raises OSError, `SessionLost`."""
        try:
            named = await named_file(self._run, job, known)
        except OSError as error:
            if _worth_another_try(job, error):
                raise
            named = None
        if named is None:
            return await trio.to_thread.run_sync(partial(self._begin_again, job, known, lost=True))
        self._run.settle.put(named)
        return None

    def _begin_again(self, job: FileJob, known: PartialRow, *, lost: bool = False) -> LargeFile:
        """A new temporary instead of one that is of no use, or ``lost``: gone, or no longer ours. Raises OSError."""
        if lost:
            sentence = "Part of a file that had arrived is gone; it is transferred again."
            trio.from_thread.run_sync(self._run.context.on_fault, RetryLater(sentence, code=PART_LOST))
        self._unlink(job, known.temporary)
        self._run.settle.put(PartDropped(job, known.temporary))
        return self._begin(job)

    def _unlink(self, job: FileJob, temporary: bytes) -> None:
        try:
            job.group.handle.unlink(temporary)
        except FileNotFoundError:
            return
        except OSError:
            # Something else by now, perhaps: the new one has another name, and what can be done is done in the end.
            self._run.context.journal.add_left_behind(job.group.destination, temporary)

    def _begin(self, job: FileJob) -> LargeFile:
        name = self._run.temporary_name()
        descriptor = job.group.handle.create_temporary(name)
        block = block_size(job.row.size)
        return LargeFile(job, name, descriptor, block, empty_bitmap(job.row.size, block), 0)

    def idle(self, file: LargeFile) -> None:
        """No range of this file is under way. When it failed, now it can be tried again or given up."""
        if not file.failed or file.error is None or file.decided:
            return
        # Several of its checks may be under way and fail, one after the other: two attempts at once would write to one
        # temporary, and to the file when one of them has given it its name.
        file.decided = True
        error, file.error = file.error, None
        if file.waiting():
            # Blocks at the beginning of a range that did not come to its end: they give back what they have of the
            # budget.
            self._run.settle.put(BlocksWritten(file))
        if self._run.retries.lasting(file.job, error):
            self._run.give_up(file.job, error, discard=file)
            return
        # The settler may be at work on it: closing is its business.
        self._run.settle.put(Abandoned(file, error))

    def failed(self, file: LargeFile, error: TowpathError) -> None:
        """The destination could not take this file."""
        file.error = file.error or error
        if isinstance(error, NeedsPerson | TaskFailed):
            self._run.stop(error)
        elif not file.open_ranges:
            self.idle(file)

    def refetch(self, file: LargeFile, index: int) -> None:
        """A block reads back other than it was written: fetch it again, alone."""
        error = RetryLater(
            f"Block {index} of {escape(file.job.destination_path)} reads back from the destination's storage other "
            "than it was written; it is fetched again.",
            code=VERIFY_CHECKSUM,
            who="destination owner",
            subject=escape(file.job.destination_path),
        )
        # Not waited for: the block's share of the budget was given back a moment ago.
        self._run.budget.used += file.length_of(index)
        self._fetch_again(file, index, error)

    def damaged(self, file: LargeFile, index: int) -> None:
        """A block arrived with a digest that is not its own: fetch it again, alone, with the budget it has."""
        self._fetch_again(file, index, damaged(file.job.source_path, f"block ({index})"))

    def _fetch_again(self, file: LargeFile, index: int, error: TowpathError) -> None:
        run, length = self._run, file.length_of(index)
        file.job.attempts += 1
        run.context.on_fault(counted(error, file.job.attempts))
        if file.job.attempts >= attempts(error):
            run.budget.release(length)
            file.failed = True
            self.failed(file, error)
            return
        run.fetcher.submit_range(file, index * file.block, length, first=True)


def _earlier(known: PartialRow, size: int) -> bytes:
    """A bitmap of the blocks that a part of another version may have of a file of this size; the last block of a file
    that has become longer or shorter is another one."""
    then = known.version[2]
    blocks = block_count(size, known.block) if size == then else min(size, then) // known.block
    there = int.from_bytes(known.done, "little") | int.from_bytes(known.earlier, "little")
    return (there & (1 << blocks) - 1).to_bytes(len(empty_bitmap(size, known.block)), "little")


def _worth_another_try(job: FileJob, error: OSError) -> bool:
    """Whether what has arrived may still be there: to begin again may cost days. Only the last attempt is left for
    that, in case the fault is the part's alone."""
    problem = fault(error, "destination", b"")
    if isinstance(problem, RetryLater):
        return job.attempts < attempts(problem) - 1
    return not isinstance(problem, ItemFailed)
