"""Large files that changed: blocks the destination has already are copied from its old file instead of sent.

The source says the digests of its blocks, and only where a few of them, spread over the file, agree with the old file:
reading a file for its digests costs the source as much as sending it, less the network. A copied block goes the way
of a received one: it counts when it is durable and reads back with the source's digest.
"""

from __future__ import annotations

import trio

from agent.storage.base import Root
from agent.transfer.jobs import BlocksWritten, LargeFile
from agent.transfer.run import Run
from agent.transfer.source_session import SessionLost
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
    """Fills a new temporary with what the old file has. `run` is called once, before anything is asked for."""

    def __init__(self, run: Run, file: LargeFile) -> None:
        self._run = run
        self._file = file
        # Blocks that need not be asked for: done, or copied and waiting for their check.
        self.have = bytearray(file.done)
        self.copied = 0

    async def run(self) -> None:
        """Copy every block that is the same, as far as that can be told. Raises `SessionLost`."""
        file, job = self._file, self._file.job
        if BLOCK_DIGESTS not in self._run.session.abilities or file.done_count or job.row.size < WORTH_ASKING:
            return
        try:
            descriptor = await trio.to_thread.run_sync(job.group.handle.open_read, job.name)
        except OSError:
            # Nothing is there yet, or nothing that can be read: everything is sent.
            return
        root = self._run.context.root
        try:
            size = (await trio.to_thread.run_sync(root.fstat, descriptor)).st_size
            # The last block of a file that did not shrink or grow may be short; of any other only whole ones compare.
            common = file.count if size == job.row.size else min(size, job.row.size) // file.block
            if common and await self._promises(root, descriptor, common):
                for first in range(0, common, DIGESTS_AT_ONCE):
                    await self._copy_same(root, descriptor, first, min(DIGESTS_AT_ONCE, common - first))
        except SessionLost:
            raise
        except (OSError, TowpathError):
            # Whatever stands in the way of this stands in the way of nothing else: the rest is sent.
            return
        finally:
            await trio.to_thread.run_sync(root.close_file, descriptor)

    async def _promises(self, root: Root, descriptor: int, common: int) -> bool:
        places = sorted({common * number // SAMPLES for number in range(SAMPLES)} | {common - 1})
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

    async def _copy_same(self, root: Root, descriptor: int, first: int, count: int) -> None:
        file = self._file
        for index, theirs in enumerate(await self._digests(first, count), first):
            if self.have[index >> 3] >> (index & 7) & 1:
                continue
            block = await trio.to_thread.run_sync(self._read, root, descriptor, index)
            if block_digest(block) != theirs:
                continue
            await self._run.budget.acquire(len(block))
            try:
                await trio.to_thread.run_sync(self._write, root, block, index * file.block)
            except OSError:
                self._run.budget.release(len(block))
                raise
            self.have[index >> 3] |= 1 << (index & 7)
            self.copied += len(block)
            file.add_unchecked(index, theirs)
            # One by one: the settler gives back the budget that the next one may wait for.
            self._run.settle.put(BlocksWritten(file))

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
