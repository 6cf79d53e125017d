"""Handing out work to lanes: which request goes to which lane, what to do when a lane or a file fails.

Runs in the trio thread. Requests wait in one queue; each lane has a window of bytes under way and takes the next
request when there is room, so lanes can come and go at any time and none waits for another. A lost lane's requests
go back to the front of the queue, less what has arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from agent.transfer.jobs import FileJob, LargeFile, PackRequest, RangeRequest, Request
from agent.transfer.source_session import SourceSession
from protocol.errors import TowpathError
from protocol.session import PackFile, ReadPack, ReadRange

# Bytes asked for on one lane and not yet arrived: enough that a lane always has work, at any round-trip time.
LANE_WINDOW = 24 * 1024 * 1024
RANGE_BYTES = 4 * 1024 * 1024
# A lane with fewer bytes than this under way is about to have nothing to do.
HUNGRY = 512 * 1024


@dataclass(eq=False)
class LaneWork:
    """What one lane has to do."""

    number: int
    outstanding: dict[int, Request] = field(default_factory=dict)
    size: int = 0
    # Set for a lane that gets no more work; the event says that it has nothing left.
    drained: trio.Event | None = None


class Fetcher:
    """Assigns requests to lanes. All methods are called in the trio thread and return at once."""

    def __init__(
        self,
        session: SourceSession,
        *,
        on_range_lost: Callable[[LargeFile, int], None],
        on_file_idle: Callable[[LargeFile], None],
        on_job_failed: Callable[[FileJob, TowpathError], None],
        on_hungry: Callable[[], None],
    ) -> None:
        # Shared with lane threads, which only look requests up.
        self.requests: dict[int, Request] = {}
        self._session = session
        self._ready: deque[Request] = deque()
        self._lanes: dict[int, LaneWork] = {}
        self._on_range_lost = on_range_lost
        self._on_file_idle = on_file_idle
        self._on_job_failed = on_job_failed
        self._on_hungry = on_hungry

    # --- work ------------------------------------------------------------------------------------------

    def submit_pack(self, jobs: list[FileJob]) -> None:
        """Ask for small files, which are all followed through symlinks or none of them."""
        self._ready.append(PackRequest(self._session.number(), jobs, sum(job.row.size for job in jobs)))
        self._dispatch()

    def submit_range(self, file: LargeFile, offset: int, length: int, *, first: bool = False) -> None:
        """Ask for blocks of a large file."""
        request = RangeRequest(self._session.number(), file, offset, length)
        file.open_ranges += 1
        if first:
            self._ready.appendleft(request)
        else:
            self._ready.append(request)
        self._dispatch()

    @property
    def idle(self) -> bool:
        """Nothing is under way or waiting."""
        return not self._ready and not any(lane.outstanding for lane in self._lanes.values())

    @property
    def hungry(self) -> bool:
        """A lane is up and has next to nothing to do."""
        return not self._ready and any(
            lane.size < HUNGRY and len(lane.outstanding) < 2 and lane.drained is None for lane in self._lanes.values()
        )

    @property
    def busy(self) -> bool:
        """Every lane has all the work it may have: another one would not be idle."""
        return bool(self._ready) or all(lane.size > HUNGRY for lane in self._lanes.values())

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def add_lane(self, number: int) -> None:
        self._lanes[number] = LaneWork(number)
        self._dispatch()

    async def retire_lane(self, number: int) -> None:
        """Give a lane no more work, and wait until it has delivered what was asked of it."""
        lane = self._lanes.get(number)
        if lane is None:
            return
        lane.drained = lane.drained or trio.Event()
        self._look_whether_drained(lane)
        await lane.drained.wait()

    def _look_whether_drained(self, lane: LaneWork) -> None:
        if lane.drained is not None and not lane.outstanding:
            lane.drained.set()

    def drop_lane(self, number: int) -> bool:
        """A lane is gone: what it had not delivered is asked for again, first of all. Whether it was retired."""
        lane = self._lanes.pop(number, None)
        if lane is None:
            return False
        for request in reversed(lane.outstanding.values()):
            self.requests.pop(request.r, None)
            rest = self._rest(request)
            if rest is not None:
                self._ready.appendleft(rest)
        self._dispatch()
        return lane.drained is not None

    def _rest(self, request: Request) -> Request | None:
        number = self._session.number()
        if isinstance(request, RangeRequest):
            offset, length = request.offset + request.arrived, request.length - request.arrived
            if not length:
                self._range_ended(request.file)
                return None
            return RangeRequest(number, request.file, offset, length)
        jobs = [job for index, job in enumerate(request.jobs) if index not in request.seen]
        if not jobs:
            return None
        return PackRequest(number, jobs, sum(job.row.size for job in jobs))

    def _dispatch(self) -> None:
        while self._ready:
            open_lanes = (lane for lane in self._lanes.values() if lane.drained is None)
            lane = min(open_lanes, key=lambda lane: lane.size, default=None)
            if lane is None or (lane.outstanding and lane.size + self._ready[0].size > LANE_WINDOW):
                return
            request = self._ready.popleft()
            if isinstance(request, RangeRequest) and request.file.failed:
                self._on_range_lost(request.file, request.length)
                self._range_ended(request.file)
                continue
            lane.outstanding[request.r] = request
            lane.size += request.size
            self.requests[request.r] = request
            self._send(lane.number, request)
        if self.hungry:
            self._on_hungry()

    def _send(self, lane: int, request: Request) -> None:
        if isinstance(request, RangeRequest):
            job, file = request.file.job, request.file
            self._session.post(
                ReadRange(
                    request.r,
                    lane,
                    job.source_path,
                    job.row.version,
                    request.offset,
                    request.length,
                    file.block,
                    job.follow,
                )
            )
            return
        first = request.jobs[0]
        directory = first.group.source
        if all(job.group is first.group for job in request.jobs):
            files = [PackFile(job.source_name, job.row.version) for job in request.jobs]
        else:
            directory, files = b"", [PackFile(job.source_path, job.row.version) for job in request.jobs]
        self._session.post(ReadPack(request.r, lane, directory, files, first.follow))

    # --- answers ---------------------------------------------------------------------------------------

    def done(self, lane_number: int, r: int) -> None:
        """A request has arrived whole."""
        request = self._take(lane_number, r)
        if isinstance(request, RangeRequest):
            self._range_ended(request.file)
        self._dispatch()

    def failed(self, lane_number: int, r: int, error: TowpathError) -> None:
        """The source could not serve a request (to its end)."""
        request = self._take(lane_number, r)
        if isinstance(request, RangeRequest):
            file = request.file
            file.failed = True
            file.error = file.error or error
            self._on_range_lost(file, request.length - request.arrived)
            self._range_ended(file)
        elif request is not None:
            for index, job in enumerate(request.jobs):
                if index not in request.seen:
                    self._on_job_failed(job, error)
        self._dispatch()

    def _take(self, lane_number: int, r: int) -> Request | None:
        self.requests.pop(r, None)
        lane = self._lanes.get(lane_number)
        request = lane.outstanding.pop(r, None) if lane else None
        if lane and request:
            lane.size -= request.size
            self._look_whether_drained(lane)
        return request

    def _range_ended(self, file: LargeFile) -> None:
        file.open_ranges -= 1
        if not file.open_ranges:
            self._on_file_idle(file)
