"""What becomes of a file that failed: tried again after a while, or given up with an error of its own."""

from __future__ import annotations

import msgspec
import trio

from agent.transfer.items import ItemPlanner
from agent.transfer.jobs import FileJob, LinkWanted
from agent.transfer.patience import attempts, pause
from agent.transfer.run import Run
from protocol.errors import NeedsPerson, TaskFailed, TowpathError
from protocol.session import SYMLINK
from protocol.ticket import TICKET_EXPIRED


class Retries:
    """Decides about failures of one run. Methods are called in the trio thread."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def lasting(self, job: FileJob, error: TowpathError) -> bool:
        """Whether this error ends the job; whole-task errors stop the run."""
        if isinstance(error, NeedsPerson | TaskFailed) or error.code == TICKET_EXPIRED:
            # A ticket is the whole session's; however late the relay is with a new one, no file is to blame.
            self._run.stop(error)
            return False
        job.attempts += 1
        return job.attempts >= attempts(error)

    def job_failed(self, job: FileJob, error: TowpathError) -> None:
        """A file could not be brought over this time."""
        if self.lasting(job, error):
            self._run.give_up(job, error)
        elif not self._run.stopping:
            self.again(job, error)

    def again(self, job: FileJob, error: TowpathError) -> None:
        """Try a file again after a passing fault, with what the source holds then."""
        self._run.nursery.start_soon(self._retry, job, error)

    async def _retry(self, job: FileJob, error: TowpathError) -> None:
        run = self._run
        run.context.on_fault(error)
        await trio.sleep(pause(job.attempts))
        if job.charged:
            run.budget.release(job.charged)
            job.charged = 0
        (result,) = await run.session.stat([job.source_path], follow=job.follow)
        if result.row is None or result.row.kind != job.row.kind:
            run.give_up(job, ItemPlanner.source_error(result))
            return
        job.group.counts.bytes_total += result.row.size - job.row.size
        job.row = msgspec.structs.replace(result.row, name=job.row.name)
        job.attributes, job.attributes_left_out = None, 0
        if job.row.kind == SYMLINK:
            run.settle.put(LinkWanted(job, job.row.target or b""))
            return
        await run.copy(job)
        await run.offer()
