"""All lane processes of a worker: which of them gets a lane, what each may receive, and sessions that begin and end.

They are forked before there is anything to do (`agent.transfer.lane_processes.lane_forks`), and wait for a session.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from functools import partial

import trio

from agent.connect.tls import HANDSHAKE_TIMEOUT
from agent.limits.pace import Pace
from agent.transfer.lane_processes import lane_messages as say
from agent.transfer.lane_processes.lane_forks import Child
from agent.transfer.lane_processes.one_process import Arrivals, OneProcess, RemoteLane
from agent.transfer.stalls.lane_watch import TellStandstill
from protocol.errors import RetryLater, TowpathError

# How often (seconds) the shares of a limit are looked at.
SHARE_EVERY = 0.1


class LaneProcesses:
    """All lane processes of one worker; `run` while a task runs."""

    def __init__(self, forked: Sequence[Child], pace: Pace) -> None:
        self.processes = [OneProcess(child, pace, partial(self._stands_still, child)) for child in forked]
        self._pace = pace
        # Told why some of them stand still, and when none does any more.
        self.on_standstill: TellStandstill = lambda _error: None
        self._standing: dict[Child, TowpathError] = {}
        self._keys = itertools.count(1)

    @property
    def alive(self) -> list[OneProcess]:
        return [each for each in self.processes if each.alive]

    @property
    def processor(self) -> float:
        """Seconds of processor time of all of them."""
        return sum(each.processor for each in self.processes)

    async def run(self) -> None:
        """Talk with all of them and keep them to the pace, until cancelled; then they end."""
        async with trio.open_nursery() as nursery:
            for process in self.processes:
                nursery.start_soon(process.run)
            nursery.start_soon(self._keep_pace)

    def _stands_still(self, child: Child, error: TowpathError | None) -> None:
        if error is not None:
            self._standing[child] = error
        elif self._standing.pop(child, None) is None:
            return
        self.on_standstill(next(iter(self._standing.values()), None))

    async def _keep_pace(self) -> None:
        while True:
            self._divide()
            await trio.sleep(SHARE_EVERY)

    def _divide(self) -> None:
        """What all may receive is shared evenly by the processes that have lanes."""
        receiving = [each for each in self.alive if each.lanes]
        rate = self._pace.rate
        for process in receiving:
            share = None if rate is None else max(1, int(rate / len(receiving)))
            if share != process.share:
                process.share = share
                process.post(say.Share(rate=share))
        self._pace.waited_elsewhere = sum(each.waited for each in self.processes)

    def begin_run(self, node_key: bytes, session_id: str, lock: int | None) -> None:
        """A session begins: descriptors and lanes of the one before are closed. ``lock`` holds the task's lock."""
        for process in self.alive:
            process.begin_run(node_key, session_id, lock)

    async def end_run(self) -> None:
        """The session is over; when this returns none of them writes anything of it any more."""
        async with trio.open_nursery() as nursery:
            for process in self.processes:
                nursery.start_soon(process.end_run)

    def attach(self, arrivals: Arrivals | None) -> None:
        """Who hears what comes from now on."""
        for process in self.processes:
            process.arrivals = arrivals

    async def open(self, sock: socket.socket, certificate: str) -> RemoteLane:
        """Hand a connection, on which nothing was sent yet, to the process with the fewest lanes, and have it secured.
        Raises `TowpathError`. The socket is this function's."""
        alive = self.alive
        if not alive:
            sock.close()
            raise RetryLater("No process is left that receives for this task.", code="CONNECT_FAILED")
        process = min(alive, key=lambda each: len(each.lanes))
        key = next(self._keys)
        lane = process.lanes[key] = RemoteLane(process, key, sock)
        try:
            process.post(say.Secure(lane=key, certificate=certificate), sock.fileno())
            self._divide()
            await lane.wait_for(lane.secured, HANDSHAKE_TIMEOUT)
        except BaseException:
            lane.close()
            raise
        return lane
