"""Large files that changed: blocks the destination has already are taken from its old file instead of sent, and from
what had arrived of the file before it changed, or looked as if it had: a file system that is mounted again may have
another number.

The source says the digests of its blocks, and only where a few of them, spread over the file, agree with the old file:
reading a file for its digests costs the source as much as sending it, less the network. A block is taken over by the
first of three ways that the file system knows: both files share it on the disk (XFS, Btrfs and their like), a file
server copies it by itself, or it is read and written here. A copy by the local kernel would save nothing: what it
copied has to be read for its digest. A block that was taken over goes the way of a received one: it counts when it is
durable and reads back with the source's digest.
"""

from __future__ import annotations

import trio

from agent.storage.base import Root
from agent.storage.clone import NEVER, NOT_THIS
from agent.transfer.asking.source_session import SessionLost
from agent.transfer.basis.compare import missing_ranges
from agent.transfer.basis.jobs import BlocksWritten, LargeFile
from agent.transfer.course.run import Run
from protocol.errors import TowpathError
from protocol.lane import digest as block_digest
from protocol.session import BLOCK_DIGESTS

# Smaller files are sent before the questions are answered.
WORTH_ASKING = 16 * 1024 * 1024
SAMPLES = 8
# So many of the samples must agree for all digests to be asked for.
AGREEING = 2
DIGESTS_AT_ONCE = 32


class Reuse:
    """Fills a temporary with what the old file has of what is missing in it, after what it has itself of an earlier
    version. `run` is called once, before anything is asked for."""

    def __init__(self, run: Run, file: LargeFile) -> None:
        self._run = run
        self._file = file
        # Blocks that need not be asked for: done, or taken over and waiting for their check.
        self.have = bytearray(file.done)
        self.copied = 0
        # Of these bytes the two files share the disk's blocks.
        self.shared = 0
        self._ways = ["clone"] if run.context.root.features.local else ["clone", "copy"]

    async def run(self) -> None:
        """Take over every block that is the same, as far as that can be told. Raises `SessionLost`."""
        if not may_compare(self._run, self._file.job.row.size) or self._file.complete:
            return
        if self._file.earlier and await self._take_from(self._file.descriptor, self._of_earlier()):
            # What is left of them is other content.
            self._file.earlier = b""
        await self._take_old()

    def _of_earlier(self) -> list[range]:
        """The blocks that the temporary itself may have."""
        file = self._file
        # As numbers, since the bitmaps may be very large.
        before, here = (int.from_bytes(bitmap, "little") for bitmap in (file.earlier, self.have))
        every = (1 << 8 * len(self.have)) - 1
        return _blocks((every ^ before | here).to_bytes(len(self.have), "little"), file.job.row.size, file.block)

    async def _take_old(self) -> None:
        file, job, root = self._file, self._file.job, self._run.context.root
        try:
            descriptor = await trio.to_thread.run_sync(job.group.handle.open_read, job.name)
        except OSError:
            # Nothing is there yet, or nothing that can be read: everything is sent.
            return
        try:
            size = (await trio.to_thread.run_sync(root.fstat, descriptor)).st_size
            # The last block of a file that did not shrink or grow may be short; of any other only whole ones compare.
            common = size if size == job.row.size else min(size, job.row.size) // file.block * file.block
            await self._take_from(descriptor, _blocks(self.have, common, file.block))
        except OSError:
            # As below.
            return
        finally:
            # Also at the end of a run, when nothing waits for a thread any more.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(root.close_file, descriptor)

    async def _take_from(self, descriptor: int, blocks: list[range]) -> bool:
        """Take over what is the same in these blocks. Whether all were looked at, or not worth it."""
        root = self._run.context.root
        try:
            if blocks and await self._promises(root, descriptor, blocks):
                for few in blocks:
                    if self._file.failed:
                        return False
                    await self._take_same(root, descriptor, few)
        except SessionLost:
            raise
        except (OSError, TowpathError):
            # Whatever stands in the way of this stands in the way of nothing else: the rest is sent.
            return False
        return True

    async def _promises(self, root: Root, descriptor: int, blocks: list[range]) -> bool:
        places = spread(blocks, SAMPLES)
        agreeing = 0
        for index in places:
            (theirs,) = await self._digests(index, 1)
            block = await trio.to_thread.run_sync(self._read, root, descriptor, index)
            agreeing += block_digest(block) == theirs
        return agreeing >= min(AGREEING, len(places))

    async def _digests(self, first: int, count: int) -> list[bytes]:
        job, file = self._file.job, self._file
        return await self._run.session.block_digests(
            job.source_path, job.row.version, file.block, first, count, follow=job.follow
        )

    async def _take_same(self, root: Root, descriptor: int, blocks: range) -> None:
        file = self._file
        for index, theirs in zip(blocks, await self._digests(blocks.start, len(blocks)), strict=True):
            length = file.length_of(index)
            await self._run.budget.acquire(length)
            same = False
            try:
                if file.failed:
                    # What was taken over counts as far as it was checked; the rest is not worth reading now.
                    return
                same = await trio.to_thread.run_sync(self._take, root, descriptor, index, theirs)
            finally:
                if not same:
                    self._run.budget.release(length)
            if not same:
                continue
            self.have[index >> 3] |= 1 << (index & 7)
            self.copied += length
            file.add_unchecked(index, theirs)
            # One by one: the settler gives back the budget that the next one may wait for.
            self._run.settle.put(BlocksWritten(file))

    def _take(self, root: Root, descriptor: int, index: int, theirs: bytes) -> bool:
        """Take over a block if it is the source's. What is there otherwise is written over when the block comes.
        Blocks."""
        in_place = descriptor == self._file.descriptor
        way = "" if in_place else self._bring(root, descriptor, index)
        # What was brought is looked at, and not the old file, to which somebody may be writing.
        block = self._read(root, self._file.descriptor if way else descriptor, index)
        if block_digest(block) != theirs:
            return False
        if not way and not in_place:
            self._write(root, block, index * self._file.block)
        self.shared += len(block) if way == "clone" else 0
        return True

    def _bring(self, root: Root, descriptor: int, index: int) -> str:
        """Have the system give the temporary a block of the old file: by which way, empty for none. Raises OSError."""
        offset, length = index * self._file.block, self._file.length_of(index)
        for way in tuple(self._ways):
            try:
                if way == "clone":
                    root.clone_range(descriptor, self._file.descriptor, offset, length)
                else:
                    self._copy(root, descriptor, offset, length)
            except OSError as error:
                if error.errno in NEVER:
                    self._ways.remove(way)
                elif error.errno not in NOT_THIS:
                    raise
                continue
            return way
        return ""

    def _copy(self, root: Root, descriptor: int, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            count = root.copy_range(descriptor, self._file.descriptor, offset, end - offset)
            if not count:
                # The old file is shorter by now; its block will not be the source's.
                return
            offset += count

    def _read(self, root: Root, descriptor: int, index: int) -> memoryview:
        view = memoryview(bytearray(self._file.length_of(index)))
        done = 0
        while done < len(view):
            count = root.preadv(descriptor, [view[done:]], index * self._file.block + done)
            if not count:
                return view[:done]
            done += count
        return view

    def _write(self, root: Root, block: memoryview, offset: int) -> None:
        written = 0
        while written < len(block):
            written += root.pwrite(self._file.descriptor, block[written:], offset + written)


def may_compare(run: Run, size: int) -> bool:
    """Whether the source says digests, and a file of so many bytes is worth asking."""
    return BLOCK_DIGESTS in run.session.abilities and size >= WORTH_ASKING


def _blocks(have: bytes | bytearray, size: int, block: int) -> list[range]:
    """The blocks that are missing in the first so many bytes, as many together as are asked for at once."""
    ranges = missing_ranges(have, size, block, DIGESTS_AT_ONCE * block)
    return [range(offset // block, -(-(offset + length) // block)) for offset, length in ranges]


def spread(blocks: list[range], count: int) -> list[int]:
    """At most so many of these blocks, evenly spread, the first and the last among them."""
    total = sum(map(len, blocks))
    wanted = sorted({total * number // count for number in range(count)} | {total - 1})
    found, before = [], 0
    for few in blocks:
        while wanted and wanted[0] < before + len(few):
            found.append(few[wanted.pop(0) - before])
        before += len(few)
    return found
