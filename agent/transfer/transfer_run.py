"""One run of a transfer over one session: plan, fetch, settle, side by side, until everything is settled.

A run ends in one of two ways: everything is settled, or an error. After an error nothing is lost that the journal
knows; the task's runner decides whether a new run is worth it. Three kinds of threads work for a run: lanes (one each),
the settler with its side threads, and trio's workers for planning; all of them end before the run does.
"""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from agent.storage.base import Directory
from agent.storage.faults import fault
from agent.transfer.asking.budget import Budget, charge
from agent.transfer.asking.fetch import Fetcher
from agent.transfer.asking.source_session import SourceSession
from agent.transfer.basis.jobs import AllArrived, FileJob, Group, LargeFile, ListFate, Outcome
from agent.transfer.basis.journal_rows import PartialRow
from agent.transfer.basis.kept_attributes import attributes_size
from agent.transfer.basis.patience import counted, named
from agent.transfer.basis.stopping import call_on_cancel, first_error, first_system_error
from agent.transfer.basis.times import now_iso
from agent.transfer.begun_place import check_place, watch_root
from agent.transfer.books.counted import add_counts, count_finished
from agent.transfer.books.record import FolderMoved
from agent.transfer.course.run import RunContext
from agent.transfer.deleting.mirror import Mirror
from agent.transfer.lane_processes.pool import LaneProcesses
from agent.transfer.last_steps import last_steps
from agent.transfer.planning.attributes import Attributes
from agent.transfer.planning.comparisons import Comparisons
from agent.transfer.planning.directories import DirectoryWalk
from agent.transfer.planning.hard_links import HardLinks
from agent.transfer.planning.items import ItemPlanner
from agent.transfer.planning.left_behind import sweep_temporaries
from agent.transfer.planning.packs import PACK_BYTES, packs
from agent.transfer.planning.plan import UNSUPPORTED
from agent.transfer.receiving.flow_watch import FlowWatch
from agent.transfer.receiving.lane_arrivals import RemoteArrivals
from agent.transfer.receiving.lanes import Lanes, OpenLane
from agent.transfer.receiving.large_files import LargeFiles
from agent.transfer.receiving.retries import Retries
from agent.transfer.settling.settle import Settler
from agent.transfer.stalls.storage_watch import watch_storage
from protocol.control import Counters, Flow
from protocol.errors import TaskFailed, TowpathError
from protocol.names import format_path, split_path
from protocol.session import MAX_PACK_FILES

# Directories (and their handles) being worked on at once.
OPEN_GROUPS = 200
MIB = 1024 * 1024
# What `skip_source_errors` skips, as in the Globus transfer document.
SKIPPABLE = frozenset({"FILE_NOT_FOUND", "NOT_FOUND", "PERMISSION_DENIED"})


class TransferRun:
    """Runs once. `counters` may be read at any time."""

    def __init__(
        self, context: RunContext, session: SourceSession, open_lane: OpenLane, lanes: int, *, resumed: bool
    ) -> None:
        self.context = context
        self.options = context.order.options
        self.session = session
        self.resumed = resumed
        self._temporary_serials = itertools.count(1)
        self._temporary_names = context.temporary_prefix + os.urandom(3).hex().encode()
        # Of earlier runs, whichever of its folders and items they are of: several may lead to one folder.
        self._parts = context.journal.all_partial_temporaries() if resumed else frozenset()
        # In the order in which they were opened.
        self._groups: dict[Group, None] = {}
        self._slots = trio.Semaphore(OPEN_GROUPS)
        self.budget = Budget()
        self._idle = trio.Event()
        self._planning = True
        self._error: TowpathError | None = None
        self.list_again = False
        self.missed = False
        self._put_off: TowpathError | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._settler = self._new_settler()
        self.settle: queue.SimpleQueue[Any] = self._settler.queue
        self._pack: list[FileJob] = []
        self._pack_bytes = 0
        self._mirror = Mirror(
            context.root,
            context.journal,
            self._settler.record,
            self.options,
            context.patience,
            partial(self._soon, context.on_fault),
            context.order.items or (),
            one_machine=context.one_machine,
        )
        self.attributes = Attributes(self)
        self.hard_links = HardLinks(self)
        self.retries = Retries(self)
        self.large = LargeFiles(self)
        self._comparisons = Comparisons(self)
        self._lanes = Lanes(self, open_lane, lanes)
        self._flow = FlowWatch(self, self._lanes, lambda: self.counters().files_transferred)
        self.fetcher = Fetcher(
            session,
            on_range_lost=lambda _file, size: self.budget.release(size),
            on_file_idle=self._on_file_idle,
            on_job_failed=self.retries.job_failed,
            on_hungry=self._on_hungry,
            in_memory=context.root.features.in_memory,
        )
        session.on_unserved = self.fetcher.unserved
        self._arrivals = None if context.processes is None else self._arrivals_from(context.processes)
        self.nursery: trio.Nursery

    def _new_settler(self) -> Settler:
        context = self.context
        return Settler(
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

    def _arrivals_from(self, processes: LaneProcesses) -> RemoteArrivals:
        return RemoteArrivals(
            processes,
            self.fetcher,
            self.settle,
            self,
            done=self._on_request_done,
            names=self._temporary_names,
            verify=self.options.verify_checksum,
            mode_mask=self.context.mode_mask,
            preserve_timestamp=self.options.preserve_timestamp,
        )

    def use_better_path(self) -> None:
        """Lanes opened from now on go a better way; move to them, one by one."""
        self._lanes.use_better()

    def limit(self, lanes: int, memory: int) -> None:
        """From now on there may be so many lanes, and so many MiB on their way."""
        self._lanes.limit = lanes
        self.budget.resize(memory * MIB)

    # --- the run ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Bring everything over. Raises `TowpathError`; cancelling settles what arrived, then stops. Afterwards
        ``list_again`` says that another run is to follow, for folders that changed at the source meanwhile."""
        if self.context.processes is not None:
            self.context.processes.attach(self._arrivals)
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                nursery.start_soon(self._run_session)
                await nursery.start(self._run_settler)
                self._lanes.start(nursery)
                nursery.start_soon(self._flow.run)
                nursery.start_soon(watch_root, self.context.root, self.stop)
                nursery.start_soon(
                    watch_storage,
                    lambda: (self.context.received.value, self.counters()),
                    lambda: [group.handle for group in self._groups],
                    self._temporary_names + b"q",
                    partial(self.context.on_standstill, "storage"),
                )
                self.large.start(nursery)
                self._comparisons.start(nursery)
                await ItemPlanner(self).run(self.session)
                walk = DirectoryWalk(self)
                await walk.run()
                self.session.forget_ahead()
                self._planning = False
                self._look_whether_all_arrived()
                self._look_whether_done()
                await self._idle.wait()
                check = partial(check_place, self.context.root, self.context.journal, disks=self._put_off is None)
                await trio.to_thread.run_sync(check)
                self._error = self._error or self._put_off
                self.list_again = self._error is None and await walk.second_look.look()
                nursery.cancel_scope.cancel()
        except* TowpathError as group:
            self._error = self._error or first_error(group)
        except* OSError as system:
            # What no single file or folder answers for concerns the task as a whole.
            self._error = self._error or fault(first_system_error(system), "destination", b"")
        finally:
            await self._end_elsewhere()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.large.close)
            self._close_groups()
        if self._error is not None:
            raise self._error
        if self.list_again:
            return
        await last_steps(self.context, self._mirror, self._temporary_names + b"q")

    async def _end_elsewhere(self) -> None:
        """Afterwards no other process writes anything of this run."""
        processes = self.context.processes
        if processes is not None:
            with trio.CancelScope(shield=True):
                await processes.end_run()
            processes.attach(None)

    def stop(self, error: TowpathError) -> None:
        """End the run with this error, or with the one it is ending with already."""
        self._error = self._error or error
        self.nursery.cancel_scope.cancel()

    def put_off(self, error: TowpathError) -> None:
        """Leave a folder to a later run: the others go on, and when they are done this run ends with the error."""
        self._put_off = self._put_off or error

    @property
    def flow(self) -> Flow | None:
        """How content flows at the moment, None before that is known."""
        return self._flow.flow

    @property
    def stopping(self) -> bool:
        return self._error is not None

    async def _run_session(self) -> None:
        try:
            await self.session.run()
        except TowpathError as error:
            self.stop(error)

    async def _run_settler(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(call_on_cancel, self._settler.stop)
            task_status.started()
            try:
                await trio.to_thread.run_sync(self._settler.run)
            except FolderMoved as error:
                self._settler.record.forget_below(error.folders, self._groups)
                # Below no path: other faults of the folder have a budget of their own.
                passes = self.context.patience.is_passing(b"\1" + error.folders[0], error)
                self.stop(error if passes else TaskFailed(error.sentence, code=error.code, who=error.who))
            except TowpathError as error:
                self.stop(error)
            nursery.cancel_scope.cancel()

    def _close_groups(self) -> None:
        # What was counted in them still counts.
        for group in self._groups:
            group.handle.close()

    def counters(self) -> Counters:
        """The task's counters now; never more than what is true."""
        going = (group for group in self._groups if not group.folded)
        counters = add_counts(self._settler.record.counters, [each for group in going for each in group.all_counts])
        # Blocks of large files count as they settle, not only when their file is whole.
        settled = self._settler.record.settled_bytes
        again = max(0, self.context.received.value - settled - self.budget.used)
        return msgspec.structs.replace(
            counters,
            bytes_transferred=max(counters.bytes_transferred, settled),
            bytes_sent_again=again,
            scan_complete=not self._planning,
        )

    def part_taken(self, file: LargeFile, known: PartialRow) -> None:
        self._settler.record.part_taken(file, known)

    def temporary_name(self) -> bytes:
        """A new reserved name. Called from several threads; a counter gives no number twice."""
        return b"%s%x" % (self._temporary_names, next(self._temporary_serials))

    def sweep(self, handle: Directory) -> None:
        """Remove what earlier runs have left in a folder; called in other threads."""
        prefix = self.context.temporary_prefix
        sweep_temporaries(handle, prefix, self._parts, own=self._temporary_names)

    # --- for the planners -------------------------------------------------------------------------------

    async def copy(self, job: FileJob) -> None:
        """Have a file brought over. Small ones collect, also across directories, until a pack is full or a lane has
        nothing to do; `offer` must follow."""
        if job.row.target is not None and not job.narrowed:
            await self.retries.unknown_mode(job)
            return
        if self.attributes.wanted and job.attributes is None:
            await self.attributes.read([job])
        if job.narrowed and job.access is None:
            job.list_fate = ListFate.NOT_KEPT
        if job.attributes_error is not None:
            # Until they are read it counts as if it were on its way: what waits for another attempt is bounded.
            if not job.charged:
                job.charged = charge(0)
                await self.budget.acquire(job.charged)
            self.retries.job_failed(job, job.attributes_error)
            return
        if job.charged:
            self.budget.release(job.charged)
            job.charged = 0
        if not job.small:
            await self.large.copy(job)
            return
        if self._pack and self._pack[0].follow != job.follow:
            await self._send_pack()
        self._pack.append(job)
        self._pack_bytes += job.row.size
        if job.attributes or job.access is not None:
            self._pack_bytes += attributes_size(job)
        if len(self._pack) >= MAX_PACK_FILES or self._pack_bytes >= PACK_BYTES:
            await self._send_pack()

    async def copy_all(self, jobs: Iterable[FileJob]) -> None:
        """`copy` for many: where a tree has small files, this is what its planning costs for each of them."""
        wanted = self.attributes.wanted
        for job in jobs:
            if (
                wanted
                or not job.small
                or job.row.target is not None
                or (self._pack and self._pack[0].follow != job.follow)
            ):
                await self.copy(job)
                continue
            self._pack.append(job)
            self._pack_bytes += job.row.size
            if self._pack_bytes >= PACK_BYTES or len(self._pack) >= MAX_PACK_FILES:
                await self._send_pack()

    async def read_attributes(self, jobs: Sequence[FileJob]) -> int:
        """Ask for extended attributes if the task wants them: how many of the jobs, from the first, have them now."""
        return await self.attributes.read(jobs)

    async def read_folder_attributes(self, group: Group) -> TowpathError | None:
        """Take over those of a folder itself, and its access lists; why the source could not look at them."""
        return await self.attributes.folder(group)

    async def offer(self) -> None:
        """Nothing more comes for the moment: hand out what has been collected if a lane waits for it."""
        if not self._pack:
            # What was asked for ahead has been taken, or nobody wants it.
            self.fetcher.discard_awaited()
        elif self.fetcher.hungry or self.fetcher.awaits:
            await self._send_pack()

    async def _send_pack(self) -> None:
        """Ask for the collected small files."""
        jobs, self._pack, self._pack_bytes = self._pack, [], 0
        for pack, cost in packs(jobs, attributes=self.attributes.wanted):
            await self.budget.acquire(cost)
            self.fetcher.submit_pack(pack)

    def _on_hungry(self) -> None:
        """A lane has nothing to do: what has been collected must not wait for more."""
        if self._pack:
            self.nursery.start_soon(self._send_pack)

    async def slot(self) -> None:
        """Wait until one more group may be open; `opened` must follow."""
        try:
            # Without a turn of the event loop, which costs as much as planning ten files.
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()

    def release_slot(self) -> None:
        """The group could not be opened after all."""
        self._slots.release()

    def opened(self, group: Group) -> None:
        """A group is being worked on until the settler says it is done."""
        self._groups[group] = None

    async def compare(self, job: FileJob) -> None:
        """Have a file compared by digest, and brought over when it differs."""
        await self._comparisons.compare(job)

    def count_finished(self, job: FileJob, outcome: int) -> None:
        """A single item that an earlier run settled."""
        counts = job.group.counts_of(job.item)
        count_finished(counts, job.row, outcome, verified=self.options.verify_checksum, shared=job.shared)

    def brought_again(self, items: Collection[int]) -> None:
        self._settler.record.reopen_items(items)

    def settled_is_gone(self, size: int) -> None:
        self._settler.record.gone(size)

    def give_up(self, job: FileJob, error: TowpathError, discard: LargeFile | None = None) -> None:
        """End a job with an error: it is listed, counted, and the rest goes on."""
        at_source = error.code in SKIPPABLE and error.who != "destination owner"
        self.missed |= at_source
        may_skip = self.options.skip_source_errors and at_source
        # What has no content is no loss in a folder, where nobody asked for it by name.
        may_skip = may_skip or (error.code == UNSUPPORTED and job.group.id > 0)
        error = counted(error, job.attempts)
        self.context.on_fault(named(error, format_path(split_path(job.source_path))))
        self.settle.put(Outcome(job, error.to_document(), skipped=may_skip, discard=discard))

    # --- reports from threads --------------------------------------------------------------------------

    def _soon(self, function: Callable[..., object], *arguments: object) -> None:
        self._token.run_sync_soon(self._call, function, arguments)

    def _call(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        """What such a call raises would end the process. The session may be lost just now, while its lanes still bring
        what is on its way."""
        try:
            function(*arguments)
        except TowpathError as error:
            self.stop(error)

    def request_done(self, lane_number: int, r: int) -> None:
        self._soon(self._on_request_done, lane_number, r)

    def _on_request_done(self, lane_number: int, r: int) -> None:
        self.fetcher.done(lane_number, r)
        self._look_whether_all_arrived()

    def _look_whether_all_arrived(self) -> None:
        if not self._planning and not self._pack and self.fetcher.idle:
            self.settle.put(AllArrived())

    def request_failed(self, lane_number: int, r: int, error: TowpathError) -> None:
        self._soon(self.fetcher.failed, lane_number, r, error)

    def job_failed(self, job: FileJob, error: TowpathError) -> None:
        self._soon(self.retries.job_failed, job, error)

    def attribute_refused(self, job: FileJob, error: OSError, code: str) -> None:
        self._soon(self.attributes.refused, job.destination_path, error, code)

    def hard_link_failed(self, job: FileJob, error: OSError) -> None:
        self._soon(self.hard_links.failed, job, error)

    def file_failed(self, file: LargeFile, error: TowpathError) -> None:
        self._soon(self.large.failed, file, error)

    def received(self, size: int) -> None:
        self.context.received.add(size)

    def settled(self, jobs: list[FileJob], released: int) -> None:
        if released:
            self._soon(self.budget.release, released)
        shared = [job for job in jobs if job.shared] if self.options.preserve_hard_links else []
        if shared:
            self._soon(self.hard_links.settled, shared)

    def blocks_settled(self, size: int) -> None:
        self._soon(self.budget.release, size)

    def block_damaged(self, file: LargeFile, index: int) -> None:
        self._soon(self.large.damaged, file, index)

    def refetch(self, file: LargeFile, index: int) -> None:
        self._soon(self.large.refetch, file, index)

    def abandoned(self, file: LargeFile, error: TowpathError) -> None:
        self._soon(self.retries.again, file.job, error)

    def groups_done(self, groups: list[Group]) -> None:
        self._soon(self._on_groups_done, groups)

    def _on_file_idle(self, file: LargeFile) -> None:
        if self._arrivals is not None:
            self._arrivals.forget_file(file)
        self.large.idle(file)

    def _on_groups_done(self, groups: list[Group]) -> None:
        if self._arrivals is not None:
            self._arrivals.forget_groups(groups)
        for group in groups:
            self._groups.pop(group, None)
            group.handle.close()
            self._slots.release()
        self._look_whether_done()

    def _look_whether_done(self) -> None:
        if not self._planning and not self._groups:
            self._idle.set()
