"""Comparing files by digest, where that was asked for."""

from __future__ import annotations

import trio

from agent.storage.faults import fault
from agent.storage.node import mtime_of
from agent.transfer.asking.source_session import SessionLost
from agent.transfer.basis.checksum import file_digest
from agent.transfer.basis.jobs import FileJob, Outcome
from agent.transfer.course.run import Run
from protocol.errors import TowpathError

COMPARISONS_AT_ONCE = 2


class Comparisons:
    """Compares files with the source by digest; those that differ are brought over."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting_in, self._waiting_out = trio.open_memory_channel[FileJob](64)

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to take files; ends with the nursery."""
        for _ in range(COMPARISONS_AT_ONCE):
            nursery.start_soon(self._feed)

    async def compare(self, job: FileJob) -> None:
        """Have a file compared; waits while enough others are waiting."""
        await self._waiting_in.send(job)

    async def _feed(self) -> None:
        async for job in self._waiting_out.clone():
            await self._compare(job)

    async def _compare(self, job: FileJob) -> None:
        run = self._run
        try:
            theirs = await run.session.digest(job.source_path, "BLAKE3", job.row.version, follow=job.follow)
            ours = await trio.to_thread.run_sync(self._own_digest, job)
        except OSError as error:
            run.retries.job_failed(job, fault(error, "destination", job.destination_path))
            return
        except SessionLost:
            raise
        except TowpathError as error:
            run.retries.job_failed(job, error)
            return
        if theirs == ours:
            run.settle.put(Outcome(job, None))
            return
        job.place = None
        await run.copy(job)
        await run.offer()

    def _own_digest(self, job: FileJob) -> str:
        root = self._run.context.root
        descriptor = job.group.handle.open_read(job.name)
        try:
            digest = file_digest(root, descriptor, "BLAKE3")
            if job.shared:
                status = root.fstat(descriptor)
                job.place = (status.st_dev, status.st_ino, status.st_size, mtime_of(status))
            return digest
        finally:
            root.close_file(descriptor)
