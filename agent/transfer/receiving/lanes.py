"""The lanes of a run: opened while they make it faster, kept open, and opened again when they break."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from agent.connect.lane_tls import SecuredLane
from agent.meter.lane import LaneMeter
from agent.meter.processors import Processors
from agent.transfer.asking.source_session import SessionLost
from agent.transfer.basis.lane_keys import Succession
from agent.transfer.basis.stopping import call_on_cancel, first_error
from agent.transfer.course.run import Run
from agent.transfer.lane_processes.one_process import RemoteLane
from agent.transfer.lane_processes.remote_meter import RemoteMeter
from agent.transfer.receiving.lane_count import LaneCount
from agent.transfer.receiving.receive import LaneReceiver
from protocol.errors import ProtocolError, RetryLater, TowpathError

# A secured socket, whose thread will be here, or a lane that another process has secured.
OpenLane = Callable[[], Awaitable[SecuredLane | RemoteLane]]

# How often goodput is looked at (seconds).
MEASURE_EVERY = 0.5


class Lanes:
    """All lanes of one run; each lives in a thread of its own or in a lane process. There are as many as pay, up to
    ``limit``."""

    def __init__(self, run: Run, open_lane: OpenLane, limit: int) -> None:
        self._run = run
        self._open_lane = open_lane
        self.limit = limit
        # What is measured of the lanes that are up.
        self.meters: dict[int, LaneMeter | RemoteMeter] = {}
        # Content bytes of those that are gone.
        self._ended = 0
        # What shuts them down, without touching the TLS objects, which belong to others.
        self._shut_down: dict[int, Callable[[], None]] = {}
        # Every lane by its number, with what tells it to finish what was asked of it and go.
        self._leave: dict[int, trio.Event] = {}
        # Numbers that the source may know: requests for another lane of that number would wait at the old one.
        self._known: set[int] = set()
        self._succession = Succession(run.context.key_records)
        # How many lanes were followed by another one because of their keys.
        self.renewed = 0
        self._nursery: trio.Nursery | None = None

    def use_better(self) -> None:
        """New connections go a better way than those there are: open lanes anew, one for each, and let the old ones
        finish what was asked of them."""
        for number, leave in list(self._leave.items()):
            if leave.is_set():
                continue
            leave.set()
            # One whose keys are spent is followed by another already.
            if not self._succession.is_followed(number):
                self._open()

    def start(self, nursery: trio.Nursery) -> None:
        """Open the first lane, and more while they help; they end with the nursery."""
        self._nursery = nursery
        self._open()
        nursery.start_soon(self._measure)

    def _open(self) -> int:
        """Begin to open a lane; its number."""
        # The source tells lanes apart by number; one that leaves keeps its own until it is gone.
        number = next(number for number in itertools.count(1) if number not in self._leave)
        if self._nursery is not None:
            self._leave[number] = trio.Event()
            self._nursery.start_soon(self._keep, number)
        return number

    def _renew(self) -> None:
        """Have lanes whose keys have protected enough followed by others; nothing is asked for twice for that."""
        records = {number: meter.records for number, meter in self.meters.items() if not self._leave[number].is_set()}
        for number in self._succession.due(records):
            self._succession.opening(number, self._open())
            self.renewed += 1
        for number in self._succession.spent(records):
            self._leave[number].set()

    def _is_up(self, number: int) -> None:
        """A lane takes work now; one that it follows may go."""
        for old in self._succession.up(number):
            self._leave[old].set()

    async def _measure(self) -> None:
        run = self._run
        count = LaneCount(self.limit, trio.current_time())
        processors = Processors()
        pace = run.context.pace
        waited = pace.waited
        while True:
            await trio.sleep(MEASURE_EVERY)
            count.limit = self.limit
            # Where a limit holds the lanes back, another one changes nothing.
            before, waited = waited, pace.waited
            busy = run.fetcher.busy and waited - before < MEASURE_EVERY / 10
            for number in run.fetcher.measure(trio.current_time()):
                self._break(number)
            self._renew()
            staying = [
                leave
                for number, leave in self._leave.items()
                if not leave.is_set() and not self._succession.is_followed(number)
            ]
            received = self._ended + sum(meter.content for meter in self.meters.values())
            wanted = count.decide(trio.current_time(), received, len(staying), busy=busy, room=processors.room())
            if wanted > len(staying):
                self._open()
            for leave in staying[wanted:]:
                leave.set()

    def _break(self, number: int) -> None:
        """Nothing comes on this lane any more: another connection takes its place."""
        shut_down = self._shut_down.get(number)
        if shut_down is not None:
            shut_down()

    async def _keep(self, number: int) -> None:
        try:
            await self._keep_open(number)
        finally:
            del self._leave[number]
            self._succession.gone(number)

    async def _keep_open(self, number: int) -> None:
        delay, leave = 0.2, self._leave[number]
        while not leave.is_set():
            try:
                lane = await self._open_lane()
            except RetryLater as error:
                if leave.is_set():
                    break
                if not self._run.fetcher.lanes:
                    self._run.stop(error)
                    return
                await trio.sleep(delay)
                delay = min(delay * 2, 30)
                continue
            if leave.is_set():
                lane.close()
                break
            if await (self._use_elsewhere(number, lane) if isinstance(lane, RemoteLane) else self._use(number, lane)):
                return
            if not leave.is_set():
                self._run.context.on_fault(SessionLost("A lane to the source broke; its work goes on elsewhere."))
        # Told to go before it was up: another one is opened, or none is wanted.
        self._run.fetcher.drop_lane(number)

    async def _end(self, number: int) -> None:
        """When the lane is to go: drain it, and end it."""
        await self._leave[number].wait()
        # One whose keys are spent is as fast as the one that follows it: nothing is asked for twice.
        await self._run.fetcher.retire_lane(number, keeps=self._succession.is_followed(number))
        self._break(number)

    def _waits(self, number: int) -> bool:
        """Whether a lane has to hear from the source before it is asked for anything."""
        wait = not self._run.session.ahead or number in self._known
        self._known.add(number)
        return wait

    async def _use(self, number: int, sock: SecuredLane) -> bool:
        """One life of a lane with a thread here; returns when it broke, or True when it was told to leave."""
        run = self._run
        receiver = LaneReceiver(number, sock, run.context.root, run.fetcher.requests, run.settle, run, run.context.pace)
        # Shutting a duplicate down ends the blocking read.
        duplicate = socket.socket(fileno=os.dup(sock.fileno()))
        self._shut_down[number] = partial(_shut_down, duplicate)
        broken: TowpathError | None = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(call_on_cancel, lambda: _stop(receiver, duplicate))
                nursery.start_soon(self._end, number)
                introduce = partial(receiver.introduce, run.session.instance, wait=self._waits(number))
                await trio.to_thread.run_sync(introduce)
                self.meters[number] = receiver.meter
                run.fetcher.add_lane(number, receiver.meter)
                self._is_up(number)
                await trio.to_thread.run_sync(receiver.run)
        except* (OSError, RetryLater) as group:
            broken = _broken_rules(group)
        finally:
            left = self._drop(number)
            duplicate.close()
            sock.close()
        if broken is not None:
            raise broken
        return left

    async def _use_elsewhere(self, number: int, lane: RemoteLane) -> bool:
        """The same for one that another process receives on."""
        run = self._run
        self._shut_down[number] = lane.shut_down
        broken: TowpathError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, number)
                await lane.introduce(run.session.instance, number, wait=self._waits(number))
                self.meters[number] = lane.meter
                run.fetcher.add_lane(number, lane.meter, lane)
                self._is_up(number)
                await lane.ended()
        except* (OSError, RetryLater) as group:
            broken = _broken_rules(group)
        finally:
            left = self._drop(number)
            lane.close()
        if broken is not None:
            raise broken
        return left

    def _drop(self, number: int) -> bool:
        """A lane is gone; whether it was told to."""
        meter = self.meters.pop(number, None)
        if meter is not None:
            self._ended += meter.content
        self._shut_down.pop(number, None)
        return self._run.fetcher.drop_lane(number)


def _broken_rules(group: BaseExceptionGroup[BaseException]) -> TowpathError | None:
    """A broken lane is not a broken session: what it had goes to the others. Broken rules are another matter, to be
    raised where no `except*` is: before Python 3.11.4, what is raised there is in a group again."""
    broken = group.subgroup(ProtocolError)
    return None if broken is None else first_error(broken)


def _stop(receiver: LaneReceiver, sock: socket.socket) -> None:
    receiver.end()
    _shut_down(sock)


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The peer was faster.
        return
