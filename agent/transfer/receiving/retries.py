"""What becomes of a file that failed: tried again after a while, or given up with an error of its own."""

from __future__ import annotations

import msgspec
import trio

from agent.transfer.asking.source_session import stat_error
from agent.transfer.basis.jobs import FileJob, LinkWanted, ListFate
from agent.transfer.basis.kept_attributes import LISTS_CODE
from agent.transfer.basis.patience import attempts, counted, pause
from agent.transfer.course.run import Run
from protocol.errors import ItemFailed, NeedsPerson, RetryLater, TaskFailed, TowpathError
from protocol.names import escape
from protocol.session import FILE, LOOK_AGAIN, SYMLINK
from protocol.ticket import TICKET_EXPIRED

# Files that wait at once for another look at their access lists.
MODES_AT_ONCE = 1000


class Retries:
    """Decides about failures of one run. Methods are called in the trio thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._modes = trio.Semaphore(MODES_AT_ONCE)
        self._told_narrowed = False

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
        else:
            self.again(job, error)

    def again(self, job: FileJob, error: TowpathError) -> None:
        """Try a file again after a passing fault, with what the source holds then. A run that stops tries nothing
        again, and what stopped it is told by the task."""
        if not self._run.stopping:
            self._run.nursery.start_soon(self._retry, job, error)

    def unknown_link(self, job: FileJob) -> None:
        """The source could not look at a link when it listed its folder: ask about it alone."""
        self._run.nursery.start_soon(self._look, job)

    async def _retry(self, job: FileJob, error: TowpathError) -> None:
        run = self._run
        run.context.on_fault(counted(error, job.attempts))
        await trio.sleep(pause(job.attempts))
        if job.charged and job.attributes_error is None:
            run.budget.release(job.charged)
            job.charged = 0
        await self._look(job)

    async def unknown_mode(self, job: FileJob) -> None:
        """The source could not look at a file's access list, and so does not know its mode: ask about it alone until it
        can, or that lasts; then the file is brought over. Waits while many files wait for that."""
        await self._modes.acquire()
        self._run.nursery.start_soon(self._find_mode, job)

    async def _find_mode(self, job: FileJob) -> None:
        run = self._run
        try:
            while job.row.target == LOOK_AGAIN:
                job.attempts += 1
                error = _unseen_list(job)
                if job.attempts >= attempts(error):
                    break
                run.context.on_fault(counted(error, job.attempts))
                await trio.sleep(pause(job.attempts))
                if not await self._refresh(job):
                    return
        finally:
            self._modes.release()
        job.attempts = 0
        if job.row.target is not None:
            job.narrowed = True
            self._tell_narrowed(job)
        await run.copy(job)
        await run.offer()

    def _tell_narrowed(self, job: FileJob) -> None:
        if self._told_narrowed:
            return
        self._told_narrowed = True
        subject = escape(job.source_path)
        sentence = (
            f"The access list of {subject[:1000]} cannot be looked at, or understood, at the source, so that its group "
            "may do here only what everybody may. Such files are counted."
        )
        self._run.context.on_fault(ItemFailed(sentence, code=LISTS_CODE, who="source owner", subject=subject))

    async def _look(self, job: FileJob) -> None:
        if not await self._refresh(job):
            return
        if job.row.kind == SYMLINK:
            self._run.settle.put(LinkWanted(job, job.row.target or b""))
            return
        await self._run.copy(job)
        await self._run.offer()

    async def _refresh(self, job: FileJob) -> bool:
        """Ask what the source holds now; False when the job has ended, or is tried again, without that."""
        run = self._run
        (result,) = await run.session.stat([job.source_path], follow=job.follow)
        row, counts = result.row, job.group.counts_of(job.item)
        if row is None:
            self.job_failed(job, stat_error(result))
            return False
        if row.kind == job.row.kind:
            counts.bytes_total += row.size - job.row.size
        elif row.kind == FILE and job.row.kind == SYMLINK and job.follow:
            # Now it is known where this link leads.
            counts.symlinks -= 1
            counts.add_file(row, shared=False)
        else:
            run.give_up(job, stat_error(result))
            return False
        job.row = msgspec.structs.replace(row, name=job.row.name)
        job.attributes, job.attributes_left_out, job.attributes_error = None, 0, None
        job.access, job.list_fate = None, ListFate.NONE
        return True


def _unseen_list(job: FileJob) -> RetryLater:
    """The error of a source that could not look at a file's access list this time."""
    subject = escape(job.source_path)
    return RetryLater(
        f"The access list of {subject[:1000]} could not be looked at at the source; without it nobody knows its mode.",
        code="IO_ERROR",
        who="source owner",
        subject=subject,
    )
