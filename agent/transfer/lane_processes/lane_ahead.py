"""The first lane of a session, dialled and secured while its control stream is still being secured and introduced: on a
long path its round trips take no time of their own."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable

import trio

from agent.connect.lane_tls import SecuredLane
from agent.transfer.lane_processes.one_process import RemoteLane
from protocol.errors import TowpathError

# Opens a lane; the function it is given is to be called with the dialled socket before it is secured.
Open = Callable[[Callable[[socket.socket], None]], Awaitable[SecuredLane | RemoteLane]]


class LaneAhead:
    """One lane that is opened ahead. `run` in a task, `take` once at most, `close` in any case."""

    def __init__(self, open_lane: Open) -> None:
        self._open = open_lane
        self._ready = trio.Event()
        self._scope = trio.CancelScope()
        self._secured: SecuredLane | RemoteLane | None = None
        # To end a handshake that a thread is waiting in.
        self._dialled: socket.socket | None = None

    async def run(self) -> None:
        """Open it. What goes wrong is no error: whoever opens another one learns of it."""
        try:
            with self._scope, contextlib.suppress(TowpathError):
                self._secured = await self._open(self._note)
        finally:
            self._ready.set()
            if self._scope.cancel_called:
                self._drop()

    def _note(self, sock: socket.socket) -> None:
        self._dialled = socket.socket(fileno=os.dup(sock.fileno()))

    async def take(self) -> SecuredLane | RemoteLane | None:
        """The lane, which is the caller's then, or None when it could not be opened."""
        await self._ready.wait()
        secured, self._secured = self._secured, None
        self._drop()
        return secured

    def close(self) -> None:
        """End what is not taken. Returns at once, safe to call twice."""
        self._scope.cancel()
        if not self._ready.is_set() and self._dialled is not None:
            with contextlib.suppress(OSError):
                self._dialled.shutdown(socket.SHUT_RDWR)
        elif self._ready.is_set():
            self._drop()

    def _drop(self) -> None:
        for sock in (self._dialled, self._secured):
            if sock is not None:
                sock.close()
        self._dialled = self._secured = None
