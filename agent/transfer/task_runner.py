"""A task in its worker process: connect, run, and after every interruption decide whether and when to run again."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import trio

from agent.storage.base import Root
from agent.storage.faults import fault
from agent.transfer.basis.compare import CHECKSUM
from agent.transfer.basis.kept_lists import ListPolicy
from agent.transfer.basis.patience import Patience
from agent.transfer.basis.stopping import run_in_thread
from agent.transfer.basis.times import now_iso
from agent.transfer.begun_place import is_elsewhere
from agent.transfer.books.counted import uncount
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.course.progress import Progress
from agent.transfer.course.received import ReceivedCounter
from agent.transfer.course.run import RunContext
from agent.transfer.daemon_line import DaemonLine
from agent.transfer.deleting.delete import DeleteRun
from agent.transfer.deleting.remove import Stopped
from agent.transfer.events import EventLog
from agent.transfer.planning.filled_places import items_into
from agent.transfer.planning.left_behind import sweep_folders, unfinished_folders
from agent.transfer.processes.channel import Event, RunTask
from agent.transfer.stalls.storage_watch import watch_deletions, watch_opening
from agent.transfer.task_folder import Books, lock_folder, opened_books
from agent.transfer.transfer_run import TransferRun
from protocol.beside import beside
from protocol.control import Counters, Flow, TaskObserved, TaskOrder, TaskState
from protocol.errors import NeedsPerson, TaskFailed, TowpathError
from protocol.names import RESERVED_PREFIX, split_path
from protocol.threads import NoThread

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0
# What `fail_on_quota_errors` turns from something to wait for into the end of the task.
QUOTA_CODES = frozenset({"QUOTA_EXCEEDED", "NO_SPACE"})
# How often to look whether a person has mended what holds a task up.
LOOK_AGAIN = 5.0


class TaskRunner:
    """Runs one task until it is finished, paused or cancelled; returns the message that tells the daemon."""

    def __init__(
        self,
        start: RunTask,
        line: DaemonLine,
        mode_mask: int,
        open_root: Callable[[], Root],
        *,
        numbers: bool = False,
    ) -> None:
        self._start = start
        self._order = start.order
        self._line = line
        self._mode_mask = mode_mask
        self._lists = ListPolicy(mode_mask, numbers=numbers)
        self._directory = Path(start.state_dir)
        self._run: TransferRun | DeleteRun | None = None
        self._counters = Counters()
        # Whether the run before wants another one to follow.
        self._list_again = False
        self._state: TaskState = "ACTIVE"
        self._status: TowpathError | None = None
        # Why the task stands still, though it runs, by who has noticed.
        self._standstills: dict[str, TowpathError] = {}
        if line.processes is not None:
            line.processes.on_standstill = partial(self._stands_still, "lanes")
        # The code of what somebody has to mend, once it was told, and how much had arrived then.
        self._told = ("", -1)
        self._events: EventLog | None = None
        self._journal: Journal
        self._token = trio.lowlevel.current_trio_token()
        self._progress = Progress(self.observed, line.report, self._tell_progress)
        self._open_root = open_root
        self._patience = Patience()

    async def run(self) -> TaskObserved:
        """To a final state, or to PAUSED. Trouble with the state directory is reported and waited for."""
        while True:
            try:
                return await self._with_state()
            except StateTrouble as error:
                self._status = error
                self._line.report(self.observed())
                with self._line.while_desired() as scope:
                    await trio.sleep(LOOK_AGAIN)
                if scope.cancelled_caught:
                    # Nothing can be written down now; what the daemon has is enough to begin again, or to end.
                    if self._line.desired == "cancel":
                        self._state, self._status = "CANCELED", None
                    else:
                        self._state = "PAUSED"
                    return self.observed()

    async def _with_state(self) -> TaskObserved:
        lock = await lock_folder(self._directory)
        self._line.lock = lock
        try:
            async with opened_books(self._directory) as books:
                return await self._with_books(books)
        finally:
            self._line.lock = None
            os.close(lock)

    async def _with_books(self, books: Books) -> TaskObserved:
        self._journal = books.journal
        self._events = EventLog(books.journal, self._tell, after=self._start.last_event)
        try:
            return await self._run_journaled(self._events, books)
        finally:
            self._line.on_event_stored = lambda _seq: None

    def _drop_event(self, seq: int) -> None:
        # What stays in the journal is told again at the next start, and known by its number.
        with contextlib.suppress(StateTrouble):
            self._journal.drop_event(seq)

    async def _run_journaled(self, events: EventLog, books: Books) -> TaskObserved:
        if not books.rebuilt and any(manifest.lost for manifest in books.manifests):
            events.list_damaged()
        self._counters = self._journal.counters()
        events.tell_again()
        self._line.on_event_stored = self._drop_event
        if books.rebuilt:
            self._journal.put("rebuilt", b"1")
            events.journal_rebuilt()
        elif self._journal.get("begun") is None:
            events.add("STARTED", "started")
        resumed = self._journal.get("begun") is not None or books.rebuilt
        if self._journal.get("begun") is None:
            self._journal.put("begun", b"1")
        # Waits for the disk only where something is new: after a kill others may have much to write to it.
        self._journal.commit()
        trouble: StateTrouble | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._progress.run)
            try:
                observed = await self._until_done(books, resumed=resumed)
            except StateTrouble as error:
                trouble = error
            nursery.cancel_scope.cancel()
        if trouble is not None:
            raise trouble
        return observed

    # --- one run after the other -----------------------------------------------------------------------

    async def _until_done(self, books: Books, *, resumed: bool) -> TaskObserved:
        pause = FIRST_PAUSE
        while True:
            progress = self._counters
            try:
                with self._line.while_desired() as scope:
                    await self._one_run(books, resumed=resumed)
                if scope.cancelled_caught:
                    return await self._stopped()
                if not self._list_again:
                    return self._finish()
            except StateTrouble:
                raise
            except TaskFailed as error:
                # What is left of it is of no use to anybody any more.
                await trio.to_thread.run_sync(self._sweep)
                return self._fail(error)
            except TowpathError as error:
                if error.code in QUOTA_CODES and self._order.options.fail_on_quota_errors:
                    return await self._out_of_space(error)
                self._wait_for(error)
                if self._progressed(progress) or error.code == "GC_NOT_CONNECTED":
                    # Whoever waited for the source has waited already.
                    pause = FIRST_PAUSE
                length = LOOK_AGAIN if isinstance(error, NeedsPerson) else pause * random.uniform(0.5, 1.5)  # noqa: S311
                pause = min(pause * 2, LONGEST_PAUSE)
                with self._line.while_desired() as scope:
                    await trio.sleep(length)
                if scope.cancelled_caught:
                    return await self._stopped()
            resumed = True

    def _progressed(self, before: Counters) -> bool:
        return self._counters.bytes_transferred > before.bytes_transferred or self._counters.files > before.files

    async def _one_run(self, books: Books, *, resumed: bool) -> None:
        with await self._opened_root() as root:
            if self._order.type == "DELETE":
                await self._run_delete(root, books.manifests[1])
                return
            if await trio.to_thread.run_sync(is_elsewhere, root, self._journal):
                self._begin_elsewhere(books.received)
                resumed = True
            await trio.to_thread.run_sync(self._reopen)
            async with self._line.session(self._order.session_id) as session:
                context = RunContext(
                    order=self._effective_order(),
                    root=root,
                    journal=self._journal,
                    manifests=books.manifests,
                    received=books.received,
                    temporary_prefix=self._prefix,
                    mode_mask=self._mode_mask,
                    lists=self._lists,
                    on_fault=self._fault,
                    on_standstill=self._stands_still,
                    patience=self._patience,
                    pace=self._line.pace,
                    processes=self._line.processes,
                    key_records=self._start.common.key_records,
                )
                run = TransferRun(context, session, self._line.lane, self._line.lanes, resumed=resumed)
                run.limit(self._line.lanes, self._line.memory)
                self._run = run
                session.when_accepted(self._no_trouble)
                self._line.on_better_path = run.use_better_path
                self._line.on_limits = run.limit
                try:
                    await run.run()
                finally:
                    self._line.on_better_path = lambda: None
                    self._line.on_limits = lambda _lanes, _memory: None
                    self._counters, self._list_again = run.counters(), run.list_again
                    self._run = None
                    self._stands_no_more()

    async def _opened_root(self) -> Root:
        try:
            async with beside(partial(watch_opening, self._on_storage)):
                return await trio.to_thread.run_sync(self._open_root)
        finally:
            self._on_storage(None)

    def _begin_elsewhere(self, received: ReceivedCounter) -> None:
        self._journal.start_over()
        self._journal.put("rebuilt", b"1")
        received.reset()
        if self._events is not None:
            self._events.root_replaced()
        self._journal.commit()

    def _reopen(self) -> None:
        """Have everything listed again that is not done, or was done in folders that have left their places."""
        with self._journal.together():
            for folder in self._journal.moved():
                items = items_into(self._order.items or (), split_path(folder))
                self._journal.reopen_below(folder, items)
                uncount(self._journal, items)
            self._journal.forget_moved()
            self._journal.reopen_directories()

    def _effective_order(self) -> TaskOrder:
        """The order; after the loss of a journal files that are there are compared instead of sent once more."""
        options = self._order.options
        if self._journal.get("rebuilt") is None or options.sync_level is not None:
            return self._order
        return msgspec.structs.replace(self._order, options=msgspec.structs.replace(options, sync_level=CHECKSUM))

    async def _run_delete(self, root: Root, skipped: ManifestWriter) -> None:
        run = DeleteRun(
            root,
            self._journal,
            skipped,
            self._order.items or [],
            self._order.options,
            self._patience,
            on_fault=partial(self._from_thread, self._fault),
            on_begun=partial(self._from_thread, self._no_trouble),
        )
        self._run = run
        try:
            async with beside(partial(watch_deletions, run, root, self._prefix + b"q", self._on_storage)):
                await run_in_thread(run.run, run.stop)
        except Stopped:
            await trio.lowlevel.checkpoint_if_cancelled()
        finally:
            self._counters = run.counters()
            self._run = None
            self._stands_no_more()

    def _from_thread(self, function: Callable[..., None], *arguments: object) -> None:
        self._token.run_sync_soon(function, *arguments)

    def _fault(self, error: TowpathError) -> None:
        if self._events is not None:
            self._events.fault(error)

    def short_of_threads(self) -> None:
        """Say that what needs a thread waits until there is one."""
        self._fault(fault(NoThread(), "destination", b""))

    def _stands_still(self, noticed: str, error: TowpathError | None) -> None:
        if error is None or self._state != "ACTIVE":
            # What ends has no more to say.
            self._standstills.pop(noticed, None)
            return
        if error.sentence not in {each.sentence for each in self._standstills.values()}:
            self._fault(error)
        self._standstills[noticed] = error

    def _on_storage(self, error: TowpathError | None) -> None:
        self._stands_still("storage", error)

    def _stands_no_more(self) -> None:
        """A run has ended."""
        for noticed in ("storage", "source"):
            self._stands_still(noticed, None)

    def _no_trouble(self) -> None:
        self._status = None

    # --- states ----------------------------------------------------------------------------------------

    def _wait_for(self, error: TowpathError) -> None:
        if isinstance(error, NeedsPerson) and not error.who:
            # What concerns no side by name concerns this one: its root, its state.
            error.who = "destination owner"
        if self._status is None or self._status.code != error.code:
            self._tell_trouble(error)
        self._status = error

    def _tell_trouble(self, error: TowpathError) -> None:
        """One event, also of what is looked at again and again until somebody mends it: the next one when more has
        arrived meanwhile, or for something else."""
        arrived = self._counters.bytes_transferred
        if isinstance(error, NeedsPerson):
            if self._told[0] == error.code and arrived <= self._told[1]:
                return
            self._told = (error.code, arrived)
        self._fault(error)

    def _finish(self) -> TaskObserved:
        failed = self._counters.failed
        if failed:
            error = TaskFailed(f"{failed} of the task's items failed; see its skipped errors.", code="ITEMS_FAILED")
            return self._fail(error)
        return self._final("SUCCEEDED", "SUCCEEDED", "succeeded", None)

    def _fail(self, error: TowpathError) -> TaskObserved:
        return self._final("FAILED", "FAILED", "failed", error)

    async def _out_of_space(self, error: TowpathError) -> TaskObserved:
        """End as `fail_on_quota_errors` asks, and give back what unfinished files took."""
        await trio.to_thread.run_sync(self._sweep)
        sentence = (
            f"There was no room for {error.subject or 'the files'} at the destination, and the task was submitted to "
            "fail then. Free some space, then submit it again with a sync level: what has arrived stays."
        )
        return self._fail(TaskFailed(sentence, code=error.code, who=error.who, subject=error.subject))

    async def _stopped(self) -> TaskObserved:
        if self._line.desired == "cancel":
            await trio.to_thread.run_sync(self._sweep)
            return self._final("CANCELED", "CANCELED", "canceled", None)
        self._state = "PAUSED"
        self._journal.commit()
        return self.observed()

    def _sweep(self) -> None:
        """Remove what a task that ends here leaves under reserved names, as far as it can be reached now."""
        if self._order.type == "DELETE":
            return
        # Before the root is opened: trouble with the state is to be waited for.
        folders = unfinished_folders(self._journal, self._order.items or ())
        with contextlib.suppress(OSError, NeedsPerson), self._open_root() as root:
            sweep_folders(root, folders, self._prefix)

    @property
    def _prefix(self) -> bytes:
        return RESERVED_PREFIX + self._order.task_id[:8].encode() + b"."

    def _final(self, state: TaskState, code: str, description: str, error: TowpathError | None) -> TaskObserved:
        self._state, self._status = state, error
        known = self._journal.get("completed")
        completed = known.decode() if known else now_iso()
        self._journal.put("completed", completed.encode())
        if known is None and self._events is not None:
            self._events.add(code, description, error.sentence if error else "", is_error=state == "FAILED")
        self._journal.commit()
        return msgspec.structs.replace(self.observed(), completion_time=completed)

    def observed(self) -> TaskObserved:
        """The task as it is now."""
        if self._run is not None:
            self._counters = self._run.counters()
        active = self._state == "ACTIVE"
        error = self._status or (next(iter(self._standstills.values()), None) if active else None)
        waiting = error is not None and active
        return TaskObserved(
            task_id=self._order.task_id,
            revision=self._line.revision,
            state="WAITING" if waiting else self._state,
            status_code=error.code if error else "OK",
            status_sentence=error.sentence if error else "",
            who=error.who if error else "",
            needs_person=isinstance(error, NeedsPerson),
            counters=msgspec.structs.replace(self._counters, faults=self._events.faults if self._events else 0),
            rate=self._progress.rate if self._state == "ACTIVE" else 0.0,
            error_code=error.code if error and self._state == "FAILED" else "",
            path="direct TCP",
            flow=self._flow(),
        )

    def _flow(self) -> Flow | None:
        flow = self._run.flow if isinstance(self._run, TransferRun) else None
        if flow is None or self._line.pace.rate is None:
            return flow
        return msgspec.structs.replace(
            flow, rate_limit=int(self._line.pace.rate), limit_of=self._line.limited_by or "processor"
        )

    def _tell_progress(self, details: str) -> None:
        if self._events is not None:
            self._events.add("PROGRESS", "progress", details)

    def _tell(self, event: Event) -> None:
        self._line.post(event)
