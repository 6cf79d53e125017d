"""Handing out work to lanes: which request goes to which lane, what to do when a lane or a file fails.

Runs in the trio thread. Requests wait in one queue; each lane has a window of bytes under way and takes the next
request when there is room, so lanes can come and go at any time and none waits for another. A lost lane's requests
go back to the front of the queue, less what has arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from agent.transfer.asking.end_game import STALLED, LaneSpeed, Meter, slowest, twin_of
from agent.transfer.asking.lane_work import Elsewhere, LaneWork
from agent.transfer.asking.ranges import Ranges
from agent.transfer.asking.source_session import SessionLost, SourceSession
from agent.transfer.asking.take_ahead import LANE, Awaited
from agent.transfer.basis.jobs import FileJob, LargeFile, PackRequest, RangeRequest, Request
from protocol.errors import TowpathError
from protocol.session import Abandon, PackFile, ReadPack, ReadRange

# A lane with fewer bytes than this under way is about to have nothing to do.
HUNGRY = 512 * 1024
# A source that has had so long (seconds) for a lane, brings nothing and says that there is none, is given up.
UNSERVED_FOR = 20.0


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
        in_memory: bool = False,
    ) -> None:
        self._ranges = Ranges(in_memory=in_memory)
        # Shared with lane threads, which only look requests up.
        self.requests: dict[int, Request | Awaited] = {}
        # What was asked for ahead, and is not decided about; and what was then, for a lane that is still to come.
        self._awaited: Awaited | None = None
        self._adopted: dict[int, PackRequest] = {}
        self._dropped: set[int] = set()
        self._refused: int | None = None
        self._session = session
        self._ready: deque[Request] = deque()
        self._lanes: dict[int, LaneWork] = {}
        # Requests that were delivered on another lane, while the thread of this one may still be at work on them.
        self._leaving: dict[int, tuple[int, Request]] = {}
        # Requests that another process is asked to leave, and the lane that is to have them instead.
        self._withdrawing: dict[int, int] = {}
        # Whether the source has said since the last measurement that it has no lane for something, and since when it
        # has brought nothing and said so.
        self._unserved = False
        self._unserved_since: float | None = None
        # Requests that were asked for a second time, so far.
        self.rescued = 0
        self._on_range_lost = on_range_lost
        self._on_file_idle = on_file_idle
        self._on_job_failed = on_job_failed
        self._on_hungry = on_hungry

    # --- work ------------------------------------------------------------------------------------------

    def submit_pack(self, jobs: list[FileJob]) -> None:
        """Ask for small files, which are all followed through symlinks or none of them, unless they are what was asked
        for ahead."""
        if self._take_awaited(jobs):
            return
        self._ready.append(PackRequest(self._session.number(), jobs, sum(job.row.size for job in jobs)))
        self._dispatch()

    def expect(self, awaited: Awaited) -> None:
        """Something is asked for before it is known what it is."""
        self._awaited = awaited
        self.requests[awaited.r] = awaited

    def discard_awaited(self) -> None:
        """It is not wanted: what comes of it is left lying."""
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            self.requests.pop(awaited.r, None)
            awaited.decide(None)
            self._refused = awaited.r
            if (lane := self._lanes.get(LANE)) is not None:
                self._refuse(lane)

    def _refuse(self, lane: LaneWork) -> None:
        """What was asked for ahead and is not wanted comes on this lane."""
        if lane.elsewhere is not None and lane.number == LANE and self._refused is not None:
            lane.elsewhere.discard(self._refused)
            self._refused = None

    def _take_awaited(self, jobs: list[FileJob]) -> bool:
        awaited = self._awaited
        if awaited is None:
            return False
        ordered = awaited.order(jobs)
        if ordered is None or LANE in self._dropped:
            self.discard_awaited()
            return False
        request = PackRequest(awaited.r, ordered, sum(job.row.size for job in ordered))
        if not awaited.decide(request):
            # The lane did not wait for that.
            self.discard_awaited()
            return False
        self._awaited = None
        self.requests[request.r] = request
        self._adopted[LANE] = request
        if (lane := self._lanes.get(LANE)) is not None:
            self._adopt(lane)
        return True

    def _adopt(self, lane: LaneWork) -> None:
        request = self._adopted.pop(lane.number, None)
        if request is not None:
            lane.outstanding[request.r] = request
            lane.size += request.size
            lane.idle = False
            if lane.elsewhere is not None:
                lane.elsewhere.expect(request)

    def _give_up_adopted(self, number: int) -> None:
        """A lane went before it could be given work: what it was to bring is asked for like anything else."""
        request = self._adopted.pop(number, None)
        if request is not None:
            self.requests.pop(request.r, None)
            # For one of the same number that is still to come.
            self._refused = request.r
            rest = self._rest(request)
            if rest is not None:
                self._ready.appendleft(rest)
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

    def range_bytes(self, budget: int) -> int:
        """How much of a large file to ask for at once, where so much may be on its way."""
        # One that has had nothing to do yet is not known.
        rates = [lane.speed.rate for lane in self._lanes.values() if lane.speed.rate is not None]
        return self._ranges.length(len(self._lanes), min(rates, default=0.0), budget)

    @property
    def idle(self) -> bool:
        """Nothing is under way or waiting."""
        return not self._ready and not any(lane.outstanding for lane in self._lanes.values())

    @property
    def awaits(self) -> bool:
        """What was asked for ahead waits for its files to be collected: all of them, or it has come in vain."""
        return self._awaited is not None and not self._awaited.decided

    @property
    def hungry(self) -> bool:
        """A lane is up and has next to nothing to do, and nothing that was asked for ahead is on its way."""
        return (
            not self._ready
            and not self.awaits
            and any(
                lane.size < HUNGRY and len(lane.outstanding) < 2 and lane.drained is None
                for lane in self._lanes.values()
            )
        )

    @property
    def busy(self) -> bool:
        """Every lane has all the work it may have: another one would not be idle."""
        return bool(self._ready) or all(lane.size > HUNGRY for lane in self._lanes.values())

    @property
    def lanes(self) -> int:
        """How many lanes are open."""
        return len(self._lanes)

    def outstanding(self, number: int) -> list[Request]:
        """What a lane was asked for and has not delivered to its end."""
        lane = self._lanes.get(number)
        return [] if lane is None else list(lane.outstanding.values())

    def add_lane(self, number: int, meter: Meter | None = None, elsewhere: Elsewhere | None = None) -> None:
        """A lane is open: it takes part from now on."""
        lane = self._lanes[number] = LaneWork(number, speed=LaneSpeed(meter), elsewhere=elsewhere)
        self._adopt(lane)
        self._refuse(lane)
        self._dispatch()

    def measure(self, now: float) -> list[int]:
        """Look how fast the lanes are; have slow ones relieved when there is nothing else to do, and ask again for what
        the source had no lane for. Returns the lanes from which nothing comes any more although they have work. Raises
        `SessionLost` where the source says for long that it has no lane."""
        moving = {lane.number for lane in self._lanes.values() if lane.speed.measure(now, works=bool(lane.outstanding))}
        self._look_whether_served(now, moving=bool(moving))
        stalled = [
            lane.number
            for lane in self._lanes.values()
            if lane.outstanding and moving - {lane.number} and now - lane.speed.heard > STALLED
        ]
        for lane in list(self._lanes.values()):
            if lane.idle:
                self._rescue(lane)
            lane.idle = not lane.outstanding
        return stalled

    def _look_whether_served(self, now: float, *, moving: bool) -> None:
        unserved, self._unserved = self._unserved, False
        if moving or self.idle:
            self._unserved_since = None
        elif unserved:
            self._unserved_since = self._unserved_since or now
            if now - self._unserved_since > UNSERVED_FOR:
                raise SessionLost(
                    "The source brings nothing, and says of lanes that are connected to it that it does not have them."
                )
        self._dispatch()

    def _rescue(self, lane: LaneWork) -> None:
        """Have a lane without work ask again for what another one is slow with."""
        if self._ready or lane.outstanding or lane.drained is not None:
            return
        others = [
            (each.speed.rate, each.outstanding.values())
            for each in self._lanes.values()
            if each is not lane and not each.keeps
        ]
        rates = [rate for rate, _ in others if rate is not None]
        request = slowest(others, lane.speed.rate or max(rates, default=None))
        if request is None:
            return
        slow = next(each for each in self._lanes.values() if request.r in each.outstanding)
        if slow.elsewhere is not None:
            self._take_over(slow.elsewhere, request, lane)
            return
        if lane.elsewhere is not None:
            # Two may not write in one file unless one of them can be stopped.
            return
        twin = twin_of(request, self._session.number())
        if isinstance(twin, RangeRequest):
            twin.file.open_ranges += 1
        self.rescued += 1
        self._give(lane, twin)

    def _take_over(self, elsewhere: Elsewhere, request: Request, lane: LaneWork) -> None:
        """Have a lane do what is left of a request of another process, once that is sure to write nothing more of it:
        a file must not change any more when it has its name."""
        if request.r in self._withdrawing:
            return
        self._withdrawing[request.r] = lane.number
        elsewhere.withdraw(request.r)
        self._session.post(Abandon(request.r))

    def relinquished(self, lane_number: int, r: int) -> None:
        """Another process has left a request; what it had written of it was told before."""
        to = self._withdrawing.pop(r, None)
        request = self._take(lane_number, r)
        rest = None if request is None else self._rest(request)
        if rest is not None:
            self.rescued += 1
            lane = self._lanes.get(to) if to is not None else None
            if lane is not None and lane.drained is None:
                self._give(lane, rest)
            else:
                self._ready.appendleft(rest)
        self._dispatch()

    def _give(self, lane: LaneWork, request: Request) -> None:
        lane.outstanding[request.r] = request
        lane.size += request.size
        lane.idle = False
        self.requests[request.r] = request
        if lane.elsewhere is not None:
            lane.elsewhere.expect(request)
        self._send(lane.number, request)

    def _has_living_twin(self, request: Request) -> bool:
        return request.twin is not None and request.twin.r in self.requests

    def _abandon(self, request: Request) -> None:
        """Everything of it came on another lane: what still comes of it is discarded."""
        self.requests.pop(request.r, None)
        for lane in self._lanes.values():
            if lane.outstanding.pop(request.r, None) is not None:
                lane.size -= request.size
                self._leaving[request.r] = (lane.number, request)
                self._session.post(Abandon(request.r))
                self._look_whether_drained(lane)

    def _left(self, r: int) -> None:
        """The lane's thread has nothing to do any more with a request that was abandoned."""
        _, request = self._leaving.pop(r, (0, None))
        if isinstance(request, RangeRequest):
            self._range_ended(request.file)

    async def retire_lane(self, number: int, *, keeps: bool = False) -> None:
        """Give a lane no more work, and wait until it has delivered what was asked of it; with ``keeps`` nothing of
        that is asked of another one meanwhile, however long it takes."""
        lane = self._lanes.get(number)
        if lane is None:
            return
        lane.keeps = keeps
        lane.drained = lane.drained or trio.Event()
        self._look_whether_drained(lane)
        await lane.drained.wait()

    def _look_whether_drained(self, lane: LaneWork) -> None:
        if lane.drained is not None and not lane.outstanding:
            lane.drained.set()

    def drop_lane(self, number: int) -> bool:
        """A lane is gone: what it had not delivered is asked for again, first of all. Whether it was retired."""
        lane = self._lanes.pop(number, None)
        self._dropped.add(number)
        if lane is None:
            self._give_up_adopted(number)
            return False
        for r in [r for r, (on, _) in self._leaving.items() if on == number]:
            self._left(r)
        for request in reversed(lane.outstanding.values()):
            self.requests.pop(request.r, None)
            self._withdrawing.pop(request.r, None)
            rest = self._rest(request)
            if rest is not None:
                self._ready.appendleft(rest)
        self._dispatch()
        return lane.drained is not None

    def _rest(self, request: Request) -> Request | None:
        number = self._session.number()
        if isinstance(request, RangeRequest):
            offset, length = request.offset + request.arrived, request.length - request.arrived
            if not length or self._has_living_twin(request):
                self._range_ended(request.file)
                return None
            # What a twin delivered before it was lost is known by its owner.
            return RangeRequest(number, request.file, offset, length, owners=request.owners)
        if self._has_living_twin(request):
            return None
        jobs = [job for index, job in enumerate(request.jobs) if index not in request.owners]
        if not jobs:
            return None
        return PackRequest(number, jobs, sum(job.row.size for job in jobs))

    def _dispatch(self) -> None:
        while self._ready and not self._unserved:
            open_lanes = (lane for lane in self._lanes.values() if lane.drained is None)
            lane = min(open_lanes, key=self._busy_for, default=None)
            if lane is None or (lane.outstanding and lane.size + self._ready[0].size > self._ranges.window):
                return
            request = self._ready.popleft()
            if isinstance(request, RangeRequest) and request.file.failed:
                self._on_range_lost(request.file, _undelivered(request))
                self._range_ended(request.file)
                continue
            self._give(lane, request)
        if self.hungry:
            self._on_hungry()

    def _busy_for(self, lane: LaneWork) -> float:
        """For how long a lane has work, compared with others."""
        known = [each.speed.rate for each in self._lanes.values() if each.speed.rate]
        usual = sum(known) / len(known) if known else 1.0
        # A slow lane keeps a little work, or nobody would learn when it is faster again.
        return lane.size / max(lane.speed.rate or usual, usual / 16)

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
        if request is None:
            self._left(r)
            return
        if isinstance(request, RangeRequest):
            self._range_ended(request.file)
        twin = request.twin
        if twin is not None:
            self._abandon(twin)
        self._dispatch()
        lane = self._lanes.get(lane_number)
        if twin is not None and lane is not None:
            # The end is near: do not wait for the next measurement.
            self._rescue(lane)

    def failed(self, lane_number: int, r: int, error: TowpathError) -> None:
        """The source could not serve a request (to its end)."""
        request = self._take(lane_number, r)
        if request is None:
            self._left(r)
            return
        alone = not self._has_living_twin(request)
        if isinstance(request, RangeRequest):
            file = request.file
            if alone:
                # Else the other lane brings it, and may have brought the last of it just now.
                file.failed = True
                file.error = file.error or error
                self._on_range_lost(file, _undelivered(request))
            self._range_ended(file)
        elif alone:
            for index, job in enumerate(request.jobs):
                if index not in request.owners:
                    self._on_job_failed(job, error)
        self._dispatch()

    def unserved(self, r: int, error: TowpathError) -> None:
        """The source says, on the control stream, that it has no such lane for a request: one that it does not expect
        so early, or one that is gone there. It is asked for again soon, unless the reason lies in the request."""
        for number in [number for number, request in self._adopted.items() if request.r == r]:
            self._give_up_adopted(number)
        lane = next((each for each in self._lanes.values() if r in each.outstanding), None)
        if lane is None:
            return
        if error.code != "CONNECTION_LOST":
            self.failed(lane.number, r, error)
            return
        request = self._take(lane.number, r)
        rest = None if request is None else self._rest(request)
        if rest is not None:
            # Not at once, which would be as often as the source can say so: until lanes are measured nothing is asked.
            self._ready.appendleft(rest)
            self._unserved = True

    def _take(self, lane_number: int, r: int) -> Request | None:
        self.requests.pop(r, None)
        if self._awaited is not None and self._awaited.r == r:
            self.discard_awaited()
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


def _undelivered(request: RangeRequest) -> int:
    """Bytes of a range that no lane has delivered."""
    block = request.file.block
    offsets = range(request.offset, request.offset + request.length, block)
    return sum(request.file.length_of(offset // block) for offset in offsets if offset not in request.owners)
