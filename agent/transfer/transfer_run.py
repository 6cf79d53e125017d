"""One run of a transfer over one session: plan, fetch, settle, side by side, until everything is settled.

A run ends in one of two ways: everything is settled, or an error. After an error nothing is lost that the journal
knows; the task's runner decides whether a new run is worth it. Three kinds of threads work for a run: lanes (one each),
one settler, and trio's workers for planning; all of them end before the run does.
"""

from __future__ import annotations

import os
import queue
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from agent.storage.base import Root
from agent.storage.faults import fault
from agent.transfer.budget import Budget, charge
from agent.transfer.checksum import file_digest
from agent.transfer.compare import block_size, missing_ranges
from agent.transfer.fetch import RANGE_BYTES, Fetcher
from agent.transfer.items import ItemPlanner
from agent.transfer.jobs import (
    FileJob,
    Group,
    GroupListed,
    LargeFile,
    LinkWanted,
    Outcome,
    ToSettle,
    count_done,
    empty_bitmap,
)
from agent.transfer.journal import DirectoryRow, Journal
from agent.transfer.manifest import ManifestWriter
from agent.transfer.plan import DirectoryPlanner, Listing, Planned, count_finished, now_iso, set_directory_times
from agent.transfer.receive import LaneReceiver
from agent.transfer.received import ReceivedCounter
from agent.transfer.settle import Settler, add_counts
from agent.transfer.source_session import SessionLost, SourceSession
from protocol.control import Counters, TaskOrder
from protocol.errors import NeedsPerson, ProtocolError, RetryLater, TaskFailed, TowpathError
from protocol.session import MAX_PACK_FILES

LISTERS = 4
LARGE_AT_ONCE = 4
COMPARISONS_AT_ONCE = 2
# Directories (and their handles) being worked on at once.
OPEN_GROUPS = 200
PACK_BYTES = 1024 * 1024
# How often one file is tried before its passing fault is taken for a lasting one.
ATTEMPTS = 5
# What `skip_source_errors` skips, as in the Globus transfer document.
SKIPPABLE = frozenset({"FILE_NOT_FOUND", "NOT_FOUND", "PERMISSION_DENIED"})

OpenLane = Callable[[], Awaitable[ssl.SSLSocket]]


@dataclass(frozen=True)
class RunContext:
    """What stays the same over all runs of a task."""

    order: TaskOrder
    root: Root
    journal: Journal
    manifests: tuple[ManifestWriter, ManifestWriter]
    received: ReceivedCounter
    temporary_prefix: bytes
    mode_mask: int
    on_fault: Callable[[TowpathError], None]


class TransferRun:
    """Runs once. `counters` may be read at any time."""

    def __init__(
        self, context: RunContext, session: SourceSession, open_lane: OpenLane, lanes: int, *, resumed: bool
    ) -> None:
        self.context = context
        self.options = context.order.options
        self._session = session
        self._open_lane = open_lane
        self._lane_target = lanes
        self.resumed = resumed
        self._temporary_serial = 0
        self._run_tag = os.urandom(3).hex().encode()
        self._groups: set[Group] = set()
        self._slots = trio.Semaphore(OPEN_GROUPS)
        self.budget = Budget()
        self._idle = trio.Event()
        self._planning = True
        self._error: TowpathError | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._settler = Settler(
            context.root,
            context.journal,
            context.manifests,
            verify=self.options.verify_checksum,
            preserve_timestamp=self.options.preserve_timestamp,
            mode_mask=context.mode_mask,
            reports=self,
            temporary_name=self.temporary_name,
            now=now_iso,
        )
        self.settle: queue.SimpleQueue[ToSettle | None] = self._settler.queue
        self._fetcher = Fetcher(
            session,
            on_range_lost=lambda _file, size: self.budget.release(size),
            on_file_idle=self._on_file_idle,
            on_job_failed=self._on_job_failed,
        )
        self._large_in, self._large_out = trio.open_memory_channel[FileJob](64)
        self._compare_in, self._compare_out = trio.open_memory_channel[FileJob](64)
        self._nursery: trio.Nursery

    # --- the run ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Bring everything over. Raises `TowpathError`; cancelling settles what arrived, then stops."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_session)
                await nursery.start(self._run_settler)
                for number in range(1, self._lane_target + 1):
                    nursery.start_soon(self._run_lane, number)
                for _ in range(LARGE_AT_ONCE):
                    nursery.start_soon(self._feed_large)
                for _ in range(COMPARISONS_AT_ONCE):
                    nursery.start_soon(self._feed_comparisons)
                await self._plan()
                self._planning = False
                self._look_whether_done()
                await self._idle.wait()
                nursery.cancel_scope.cancel()
        except* TowpathError as group:
            self._error = self._error or _first(group)
        finally:
            self._close_groups()
        if self._error is not None:
            raise self._error
        if self.options.preserve_timestamp:
            rows = self.context.journal.directories_deepest_first()
            await trio.to_thread.run_sync(set_directory_times, self.context.root, rows)

    def _stop(self, error: TowpathError) -> None:
        self._error = self._error or error
        self._nursery.cancel_scope.cancel()

    async def _run_session(self) -> None:
        try:
            await self._session.run()
        except TowpathError as error:
            self._stop(error)

    async def _run_settler(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(_call_on_cancel, self._settler.stop)
            task_status.started()
            try:
                await trio.to_thread.run_sync(self._settler.run)
            except TowpathError as error:
                self._stop(error)
            nursery.cancel_scope.cancel()

    def _close_groups(self) -> None:
        for group in self._groups:
            group.handle.close()
        self._groups.clear()

    def counters(self) -> Counters:
        """The task's counters now; never more than what is true."""
        counters = self._settler.counters
        for group in self._groups:
            if not group.folded:
                counters = add_counts(counters, group)
        # Blocks of large files count as they settle, not only when their file is whole.
        settled = self._settler.settled_bytes
        again = max(0, self.context.received.value - settled - self.budget.used)
        return msgspec.structs.replace(
            counters,
            bytes_transferred=max(counters.bytes_transferred, settled),
            bytes_sent_again=again,
            scan_complete=not self._planning,
        )

    # --- lanes -----------------------------------------------------------------------------------------

    async def _run_lane(self, number: int) -> None:
        delay = 0.2
        while True:
            try:
                sock = await self._open_lane()
            except RetryLater as error:
                if not self._fetcher.lanes:
                    self._stop(error)
                    return
                await trio.sleep(delay)
                delay = min(delay * 2, 30)
                continue
            await self._use_lane(number, sock)
            self.context.on_fault(SessionLost("A lane to the source broke; its work goes on elsewhere."))

    async def _use_lane(self, number: int, sock: ssl.SSLSocket) -> None:
        """One life of a lane; returns when it broke."""
        receiver = LaneReceiver(
            number,
            sock,
            self.context.root,
            self._fetcher.requests,
            self.settle,
            self,
            self.temporary_name,
            self.context.mode_mask,
            preserve_timestamp=self.options.preserve_timestamp,
        )
        # Shutting down a duplicate ends the blocking read without touching the TLS object, which belongs to the thread.
        duplicate = socket.socket(fileno=os.dup(sock.fileno()))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(_call_on_cancel, lambda: _shut_down(duplicate))
                await trio.to_thread.run_sync(receiver.introduce, self._session.instance)
                self._fetcher.add_lane(number)
                await trio.to_thread.run_sync(receiver.run)
        except* (OSError, RetryLater) as group:
            # A broken lane is not a broken session: what it had goes to the others. Broken rules are another matter.
            broken = group.subgroup(ProtocolError)
            if broken is not None:
                raise _first(broken) from None
        finally:
            self._fetcher.drop_lane(number)
            duplicate.close()
            sock.close()

    def temporary_name(self) -> bytes:
        """A new reserved name. Called from several threads."""
        self._temporary_serial += 1
        return b"%s%s%x" % (self.context.temporary_prefix, self._run_tag, self._temporary_serial)

    # --- planning --------------------------------------------------------------------------------------

    async def _plan(self) -> None:
        await ItemPlanner(self).run(self._session)
        listing = Listing(self.context.journal)
        async with trio.open_nursery() as nursery:
            for _ in range(LISTERS):
                nursery.start_soon(self._list_directories, listing)

    async def _list_directories(self, listing: Listing) -> None:
        while row := await listing.take():
            try:
                await self._list_directory(row, listing)
            finally:
                listing.finished()

    async def _list_directory(self, row: DirectoryRow, listing: Listing) -> None:
        await self.slot()
        sweep = self.context.temporary_prefix if self.resumed else None
        planner = DirectoryPlanner(self.context.root, self.context.journal, self.options, row, sweep=sweep)
        try:
            group = await trio.to_thread.run_sync(planner.open)
        except OSError as error:
            await self._not_opened(row, fault(error, "destination", row.destination))
            return
        self.opened(group)
        follow = self.options.recursive_symlinks == "copy"
        pack: list[FileJob] = []
        try:
            async for rows in self._session.list_directory(row.source, follow=follow):
                planned = await trio.to_thread.run_sync(planner.plan, rows)
                if planned.directories:
                    listing.added()
                await self._hand_out(planned, pack)
        except TowpathError as error:
            if isinstance(error, RetryLater | NeedsPerson | TaskFailed):
                raise
            self._directory_failed(group, row, error)
        else:
            failures = await trio.to_thread.run_sync(planner.delete_extra)
            for job, problem in failures:
                self.give_up(job, problem)
        await self.send_pack(pack)
        self.settle.put(GroupListed(group))

    async def _not_opened(self, row: DirectoryRow, error: TowpathError) -> None:
        """The destination directory cannot be used: an error of its own, unless it concerns the whole task."""
        if isinstance(error, RetryLater | NeedsPerson | TaskFailed):
            self.release_slot()
            raise error
        handle = await trio.to_thread.run_sync(self.context.root.open_directory, ())
        group = Group(row.id, row.source, row.destination, handle, [])
        self.opened(group)
        self._directory_failed(group, row, error)
        self.settle.put(GroupListed(group))

    def _directory_failed(self, group: Group, row: DirectoryRow, error: TowpathError) -> None:
        """A directory of the source cannot be listed: an error of its own, the others go on."""
        job = ItemPlanner.directory_job(group, row.item)
        group.planned += 1
        self.give_up(job, error)

    async def _hand_out(self, planned: Planned, pack: list[FileJob]) -> None:
        for job, error in planned.failures:
            self.give_up(job, error)
        for job in planned.links:
            self.settle.put(LinkWanted(job, job.row.target or b""))
        for job in planned.comparisons:
            await self.compare(job)
        for job in planned.copies:
            await self.copy(job, pack)

    async def copy(self, job: FileJob, pack: list[FileJob]) -> None:
        """Have a file brought over; small ones collect in ``pack`` (see `send_pack`)."""
        if not job.small:
            await self._large_in.send(job)
            return
        pack.append(job)
        if len(pack) >= MAX_PACK_FILES or sum(job.row.size for job in pack) >= PACK_BYTES:
            await self.send_pack(pack)

    async def send_pack(self, pack: list[FileJob]) -> None:
        """Ask for the collected small files."""
        if not pack:
            return
        jobs = list(pack)
        pack.clear()
        for job in jobs:
            job.charged = charge(job.row.size)
        await self.budget.acquire(sum(job.charged for job in jobs))
        self._fetcher.submit_pack(jobs)

    async def slot(self) -> None:
        """Wait until one more group may be open; `opened` must follow."""
        await self._slots.acquire()

    def release_slot(self) -> None:
        """The group could not be opened after all."""
        self._slots.release()

    def opened(self, group: Group) -> None:
        """A group is being worked on until the settler says it is done."""
        self._groups.add(group)

    async def compare(self, job: FileJob) -> None:
        """Have a file compared by digest, and brought over when it differs."""
        await self._compare_in.send(job)

    def count_finished(self, job: FileJob, outcome: int) -> None:
        """A single item that an earlier run settled."""
        count_finished(job.group, job.row, outcome, verified=self.options.verify_checksum)

    def give_up(self, job: FileJob, error: TowpathError, discard: LargeFile | None = None) -> None:
        """End a job with an error: it is listed, counted, and the rest goes on."""
        at_source = error.code in SKIPPABLE and error.who != "destination owner"
        may_skip = self.options.skip_source_errors and at_source
        self.context.on_fault(error)
        self.settle.put(Outcome(job, error.to_document(), skipped=may_skip, discard=discard))

    # --- comparing digests -----------------------------------------------------------------------------

    async def _feed_comparisons(self) -> None:
        async for job in self._compare_out.clone():
            await self._compare(job)

    async def _compare(self, job: FileJob) -> None:
        try:
            theirs = await self._session.digest(job.source_path, "BLAKE3", job.row.version, follow=job.follow)
            ours = await trio.to_thread.run_sync(self._own_digest, job)
        except OSError as error:
            self._on_job_failed(job, fault(error, "destination", job.destination_path))
            return
        except SessionLost:
            raise
        except TowpathError as error:
            self._on_job_failed(job, error)
            return
        if theirs == ours:
            self.settle.put(Outcome(job, None))
            return
        pack: list[FileJob] = []
        await self.copy(job, pack)
        await self.send_pack(pack)

    def _own_digest(self, job: FileJob) -> str:
        descriptor = job.group.handle.open_read(job.name)
        try:
            return file_digest(self.context.root, descriptor, "BLAKE3")
        finally:
            self.context.root.close_file(descriptor)

    # --- large files -----------------------------------------------------------------------------------

    async def _feed_large(self) -> None:
        async for job in self._large_out.clone():
            await self._fetch_large(job)

    async def _fetch_large(self, job: FileJob) -> None:
        try:
            file = await trio.to_thread.run_sync(self._open_large, job)
        except OSError as error:
            self._on_job_failed(job, fault(error, "destination", job.destination_path))
            return
        # Held open while ranges are being handed out, so that the file is not taken for idle in between.
        file.open_ranges += 1
        for offset, length in missing_ranges(file.done, job.row.size, file.block, max(RANGE_BYTES, file.block)):
            await self.budget.acquire(length)
            if file.failed:
                self.budget.release(length)
                break
            self._fetcher.submit_range(file, offset, length)
        file.open_ranges -= 1
        if not file.open_ranges:
            self._on_file_idle(file)

    def _open_large(self, job: FileJob) -> LargeFile:
        """The temporary of a large file: the one an earlier run left, when it holds the same version, or a new one."""
        journal, handle = self.context.journal, job.group.handle
        known = journal.partial(*job.key)
        if known is not None:
            if known.version == job.row.version:
                try:
                    descriptor = handle.open_temporary(known.temporary)
                    return LargeFile(job, known.temporary, descriptor, known.block, known.done, count_done(known.done))
                except OSError:
                    # It is gone or no longer ours: begin this file again.
                    self.context.on_fault(
                        RetryLater(
                            "Part of a file that had arrived is gone; it is transferred again.", code="PART_LOST"
                        )
                    )
            _unlink_quietly(job, known.temporary)
            journal.drop_partial(*job.key)
        name = self.temporary_name()
        descriptor = handle.create_temporary(name)
        block = block_size(job.row.size)
        return LargeFile(job, name, descriptor, block, empty_bitmap(job.row.size), 0)

    def _on_file_idle(self, file: LargeFile) -> None:
        """No range of this file is under way. When it failed, now its temporary can be closed."""
        if not file.failed or file.error is None:
            return
        error, file.error = file.error, None
        if self._lasting(file.job, error):
            self.give_up(file.job, error, discard=file)
            return
        descriptor, file.descriptor = file.descriptor, -1
        self.context.root.close_file(descriptor)
        self._nursery.start_soon(self._retry, file.job, error)

    # --- failures --------------------------------------------------------------------------------------

    def _lasting(self, job: FileJob, error: TowpathError) -> bool:
        """Whether this error ends the job; whole-task errors stop the run."""
        if isinstance(error, NeedsPerson | TaskFailed):
            self._stop(error)
            return False
        job.attempts += 1
        return not isinstance(error, RetryLater | ProtocolError) or job.attempts >= ATTEMPTS

    def _on_job_failed(self, job: FileJob, error: TowpathError) -> None:
        if self._lasting(job, error):
            self.give_up(job, error)
        elif self._error is None:
            self._nursery.start_soon(self._retry, job, error)

    async def _retry(self, job: FileJob, error: TowpathError) -> None:
        """Try a file again after a passing fault, with what the source holds now."""
        self.context.on_fault(error)
        await trio.sleep(0.2 * 4 ** (job.attempts - 1))
        if job.charged:
            self.budget.release(job.charged)
            job.charged = 0
        (result,) = await self._session.stat([job.source_path], follow=job.follow)
        if result.row is None or result.row.kind != job.row.kind:
            self.give_up(job, ItemPlanner.source_error(result))
            return
        job.group.counts.bytes_total += result.row.size - job.row.size
        job.row = msgspec.structs.replace(result.row, name=job.row.name)
        pack: list[FileJob] = []
        await self.copy(job, pack)
        await self.send_pack(pack)

    # --- reports from threads --------------------------------------------------------------------------

    def _soon(self, function: Callable[..., object], *arguments: object) -> None:
        self._token.run_sync_soon(partial(function, *arguments))

    def request_done(self, lane_number: int, r: int) -> None:
        self._soon(self._fetcher.done, lane_number, r)

    def request_failed(self, lane_number: int, r: int, error: TowpathError) -> None:
        self._soon(self._fetcher.failed, lane_number, r, error)

    def job_failed(self, job: FileJob, error: TowpathError) -> None:
        self._soon(self._on_job_failed, job, error)

    def file_failed(self, file: LargeFile, error: TowpathError) -> None:
        self._soon(self._on_file_failed, file, error)

    def _on_file_failed(self, file: LargeFile, error: TowpathError) -> None:
        file.error = file.error or error
        if isinstance(error, NeedsPerson | TaskFailed):
            self._stop(error)
        elif not file.open_ranges:
            self._on_file_idle(file)

    def received(self, size: int) -> None:
        self.context.received.add(size)

    def settled(self, jobs: list[FileJob], released: int) -> None:
        if released:
            self._soon(self.budget.release, released)

    def blocks_settled(self, size: int) -> None:
        self._soon(self.budget.release, size)

    def refetch(self, file: LargeFile, index: int) -> None:
        self._soon(self._on_refetch, file, index)

    def _on_refetch(self, file: LargeFile, index: int) -> None:
        file.job.attempts += 1
        error = RetryLater(
            f"Block {index} reads back from the destination's storage other than it was written; it is fetched again.",
            code="VERIFY_CHECKSUM",
            who="destination owner",
        )
        self.context.on_fault(error)
        if file.job.attempts >= ATTEMPTS:
            file.failed = True
            self._on_file_failed(file, error)
            return
        length = file.length_of(index)
        # Not waited for: the block's share of the budget was given back a moment ago.
        self.budget.used += length
        self._fetcher.submit_range(file, index * file.block, length, first=True)

    def group_done(self, group: Group) -> None:
        self._soon(self._on_group_done, group)

    def _on_group_done(self, group: Group) -> None:
        self._groups.discard(group)
        group.handle.close()
        self._slots.release()
        self._look_whether_done()

    def _look_whether_done(self) -> None:
        if not self._planning and not self._groups:
            self._idle.set()


def _unlink_quietly(job: FileJob, temporary: bytes) -> None:
    try:
        job.group.handle.unlink(temporary)
    except FileNotFoundError:
        return


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The peer was faster.
        return


async def _call_on_cancel(function: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """Wait to be cancelled, then call: how a blocking thread is told to end."""
    task_status.started()
    try:
        await trio.sleep_forever()
    finally:
        function()


def _first(group: BaseExceptionGroup[BaseException]) -> TowpathError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    if isinstance(found, TowpathError):
        return found
    return RetryLater(f"The connection to the source broke: {found}.", code="CONNECTION_LOST")
