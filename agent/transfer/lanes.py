"""The lanes of a run: opened, kept open, and opened again when they break."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from agent.transfer.receive import LaneReceiver
from agent.transfer.source_session import SessionLost
from agent.transfer.stopping import call_on_cancel, first_error
from protocol.errors import ProtocolError, RetryLater

if TYPE_CHECKING:
    from agent.transfer.transfer_run import TransferRun

OpenLane = Callable[[], Awaitable[ssl.SSLSocket]]


class Lanes:
    """All lanes of one run; each lives in a thread of its own."""

    def __init__(self, run: TransferRun, open_lane: OpenLane, target: int) -> None:
        self._run = run
        self._open_lane = open_lane
        self._target = target
        self._nursery: trio.Nursery | None = None
        self._better = trio.Event()

    def use_better(self) -> None:
        """New connections go a better way than those there are: open lanes anew, one for each, and let the old ones
        finish what was asked of them."""
        self._better.set()
        self._better = trio.Event()

    def start(self, nursery: trio.Nursery) -> None:
        """Open the lanes; they end with the nursery."""
        self._nursery = nursery
        for number in range(1, self._target + 1):
            nursery.start_soon(self._keep, number)

    async def _keep(self, number: int) -> None:
        delay = 0.2
        while True:
            try:
                sock = await self._open_lane()
            except RetryLater as error:
                if not self._run.fetcher.lanes:
                    self._run.stop(error)
                    return
                await trio.sleep(delay)
                delay = min(delay * 2, 30)
                continue
            if await self._use(number, sock):
                return
            self._run.context.on_fault(SessionLost("A lane to the source broke; its work goes on elsewhere."))

    async def _replace(self, number: int, sock: socket.socket) -> None:
        """When there is a better way: have another lane opened, drain this one, and end it."""
        await self._better.wait()
        if self._nursery is not None:
            # The source tells lanes apart by number; two lives of one lane may overlap.
            other = number + self._target if number <= self._target else number - self._target
            self._nursery.start_soon(self._keep, other)
        await self._run.fetcher.retire_lane(number)
        _shut_down(sock)

    async def _use(self, number: int, sock: ssl.SSLSocket) -> bool:
        """One life of a lane; returns when it broke, or True when it ended because another took its place."""
        run = self._run
        receiver = LaneReceiver(number, sock, run.context.root, run.fetcher.requests, run.settle, run)
        # Shutting down a duplicate ends the blocking read without touching the TLS object, which belongs to the thread.
        duplicate = socket.socket(fileno=os.dup(sock.fileno()))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(call_on_cancel, lambda: _shut_down(duplicate))
                nursery.start_soon(self._replace, number, duplicate)
                await trio.to_thread.run_sync(receiver.introduce, run.session.instance)
                run.fetcher.add_lane(number)
                await trio.to_thread.run_sync(receiver.run)
        except* (OSError, RetryLater) as group:
            # A broken lane is not a broken session: what it had goes to the others. Broken rules are another matter.
            broken = group.subgroup(ProtocolError)
            if broken is not None:
                raise first_error(broken) from None
        finally:
            replaced = run.fetcher.drop_lane(number)
            duplicate.close()
            sock.close()
        return replaced


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The peer was faster.
        return
