"""What a run does about what its lane processes have received: the other half of
`agent.transfer.receiving.receive` where the thread of a lane is a process."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Sequence
from typing import Any

import trio

from agent.storage.faults import fault
from agent.transfer.asking.arrivals import BlockBooks, Reports, damaged
from agent.transfer.asking.fetch import Fetcher
from agent.transfer.basis.jobs import FileJob, Group, LargeFile, PackRequest, RangeRequest, Request
from agent.transfer.lane_processes import lane_messages as say
from agent.transfer.lane_processes.one_process import OneProcess, RemoteLane
from agent.transfer.lane_processes.pool import LaneProcesses
from agent.transfer.processes.message_buffer import Message
from agent.transfer.settling.held import HeldChecked, Holder, HolderLost, PackHeld, Places
from agent.transfer.settling.small_files import OWNER_READS
from agent.transfer.stalls.storage_probe import StorageProbe
from protocol.errors import TowpathError, error_from_document_untrusted


class _Holder:
    """A process as the settler knows it."""

    def __init__(self, process: OneProcess, token: trio.lowlevel.TrioToken) -> None:
        self._process = process
        self._token = token

    def check(self, batch: int, places: Places, *, in_memory: bool) -> None:
        self._ask(say.Check(batch=batch, files=places, in_memory=in_memory))

    def release(self, places: Places) -> None:
        self._ask(say.Release(files=places))

    def _ask(self, message: Message) -> None:
        self._token.run_sync_soon(self._process.post, message)


class RemoteArrivals:
    """Of one run. All methods but those of holders are called in the trio thread."""

    def __init__(
        self,
        processes: LaneProcesses,
        fetcher: Fetcher,
        settle: queue.SimpleQueue[Any],
        reports: Reports,
        *,
        done: Callable[[int, int], object],
        names: bytes,
        verify: bool,
        mode_mask: int,
        preserve_timestamp: bool,
    ) -> None:
        self._processes = processes
        self._fetcher = fetcher
        self._settle = settle
        self._reports = reports
        # Told of the lane and the number of a request that has arrived whole.
        self._done = done
        self._names = names
        self._verify = verify
        self._mode_mask = mode_mask
        self._preserve_timestamp = preserve_timestamp
        self._books = BlockBooks(settle, reports)
        self._probe = StorageProbe(names + b"p")
        token = trio.lowlevel.current_trio_token()
        self._holders: dict[OneProcess, Holder] = {each: _Holder(each, token) for each in processes.processes}

    # --- what is told to a process ----------------------------------------------------------------------

    def expectation(self, process: OneProcess, lane: int, request: Request) -> Message:
        """How a request is told to a process. Raises OSError when a handle cannot be given to it."""
        if isinstance(request, RangeRequest):
            number = process.file(request.file)
            return say.ExpectRange(r=request.r, lane=lane, file=number, offset=request.offset, length=request.length)
        mask, preserve, hold = self._mode_mask, self._preserve_timestamp, self._verify
        files = []
        group: Group | None = None
        folder = 0
        for job in request.jobs:
            if job.group is not group:
                group, folder = job.group, process.folder(job.group)
                # To close a file of a server writes what is left of it, for which the lane would wait.
                hold = hold or not group.local
            row = job.row
            mtime_ns = row.mtime_ns if preserve else None
            files.append(say.ExpectedFile(folder, row.size, row.mode & mask | OWNER_READS, mtime_ns))
        return say.ExpectPack(r=request.r, lane=lane, names=self._names, files=files, hold=hold)

    def forget_groups(self, groups: Sequence[Group]) -> None:
        """Groups are done; their folders are about to be closed."""
        for process in self._processes.alive:
            process.forget_groups(groups)

    def forget_file(self, file: LargeFile) -> None:
        """No range of a file is under way."""
        for process in self._processes.alive:
            process.forget_file(file)

    # --- what a process says ---------------------------------------------------------------------------

    def pack_written(self, lane: RemoteLane, message: say.PackWritten) -> None:
        request = self._fetcher.requests.get(message.r)
        self._reports.received(message.received)
        holder = self._holders[lane.process]
        if not isinstance(request, PackRequest):
            # Nobody wants it any more, and nobody will know of it.
            holder.release([(message.r, [index for index, _ in message.done])])
            return
        indices, jobs = [index for index, _ in message.done], request.jobs
        held = PackHeld(
            holder if message.held else None,
            message.r,
            [jobs[index] for index in indices],
            indices,
            say.temporary_names(self._names, message.r, indices),
            [digest for _, digest in message.done],
        )
        request.seen.update(indices)
        request.owners.update(dict.fromkeys(indices, request.r))
        for each in message.failed:
            request.seen.add(each.index)
            request.owners[each.index] = request.r
            self._not_written(request, each, held)
        self._settle.put(held)
        if message.last:
            self._done(lane.number, message.r)

    def _not_written(self, request: PackRequest, failure: say.NotWritten, held: PackHeld) -> None:
        job = request.jobs[failure.index]
        if failure.error is not None:
            self._reports.job_failed(job, error_from_document_untrusted(failure.error))
        elif not failure.number:
            self._reports.job_failed(job, damaged(job.source_path))
        else:
            name = say.temporary_name(self._names, request.r, failure.index)
            held.failed.append((job, name, _system_fault(job, failure.number)))

    def block_written(self, lane: RemoteLane, message: say.BlockWritten) -> None:
        request = self._fetcher.requests.get(message.r)
        self._reports.received(message.length)
        if not isinstance(request, RangeRequest):
            return
        request.owners[message.offset] = request.r
        file = request.file
        if message.number and not file.failed:
            file.failed = True
            self._reports.file_failed(file, _system_fault(file.job, message.number))
        index = message.offset // file.block
        self._books.arrived(request, index, message.length, message.digest, good=not message.damaged, last=message.last)
        self._books.ended(lane.number, request, last=message.last)

    def request_failed(self, lane: RemoteLane, message: say.RequestFailed) -> None:
        self._fetcher.failed(lane.number, message.r, error_from_document_untrusted(message.error))

    def withdrawn(self, lane: RemoteLane, message: say.Withdrawn) -> None:
        self._fetcher.relinquished(lane.number, message.r)

    def checked(self, process: OneProcess, message: say.Checked) -> None:
        self._settle.put(HeldChecked(self._holders[process], message.batch, message.bad))

    async def storage_answers(self, folder: Group) -> bool | None:
        descriptor = folder.handle.fileno()
        return True if descriptor is None else await self._probe.answers(descriptor)

    def process_lost(self, process: OneProcess) -> None:
        orphans: list[tuple[Group, bytes]] = []
        for lane in process.lanes.values():
            for request in self._fetcher.outstanding(lane.number):
                if isinstance(request, PackRequest):
                    orphans += [
                        (job.group, say.temporary_name(self._names, request.r, index))
                        for index, job in enumerate(request.jobs)
                        if index not in request.seen
                    ]
        self._settle.put(HolderLost(self._holders[process], orphans))


def _system_fault(job: FileJob, number: int) -> TowpathError:
    return fault(OSError(number, os.strerror(number)), "destination", job.destination_path)
