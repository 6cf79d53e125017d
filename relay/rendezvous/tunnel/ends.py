"""Pairs of which one leg or both are inside WebSocket, moved by the process that speaks it, without a detour.

Two ends of different kinds have one interface, so that `JoinedDirection` stands beside `splice.Direction` in the
mover's turns. What one direction holds is bounded: nothing is read while its target has not taken what came before.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from protocol.errors import TowpathError
from protocol.websocket.core import FEED
from protocol.websocket.line import Line, Over
from protocol.websocket.shuttle import Shuttle


class End(Protocol):
    """One leg. Methods raise OSError when it is broken. ``readable`` and ``writable`` are what the kernel last said."""

    readable: bool
    writable: bool

    @property
    def sock(self) -> socket.socket:
        """For waiting, and its number."""

    @property
    def parts(self) -> deque[bytes]:
        """What has come and was not passed on yet."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come into ``parts``."""

    @property
    def unsent(self) -> int:
        """Bytes, about, that wait for the socket to take them."""

    def receive(self, most: int, now: float) -> int:
        """Take in up to so many bytes; how many came."""

    def send(self, parts: Iterable[bytes]) -> None:
        """Send what the socket takes, keep the rest."""

    def flush(self) -> None:
        """Send what was kept."""

    def finish(self) -> None:
        """Nothing more will be sent."""

    def keep_time(self, now: float, *, deaf: bool) -> None:
        """Now and then; ``deaf`` when nothing is read from here at the moment."""

    def close(self) -> None:
        """At once."""


class RawEnd:
    """A plain socket. ``head`` was read off it already."""

    def __init__(self, sock: socket.socket, head: bytes, buffer: memoryview) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.parts: deque[bytes] = deque([head] if head else [])
        self.readable = self.writable = True
        self.ended = False
        self._buffer = buffer
        self._unsent: deque[memoryview] = deque()

    @property
    def unsent(self) -> int:
        return sum(map(len, self._unsent))

    def receive(self, most: int, now: float) -> int:
        try:
            size = self.sock.recv_into(self._buffer[: min(most, len(self._buffer))])
        except BlockingIOError:
            self.readable = False
            return 0
        if size:
            self.parts.append(bytes(self._buffer[:size]))
        else:
            self.ended = True
        return size

    def send(self, parts: Iterable[bytes]) -> None:
        self._unsent.extend(memoryview(part) for part in parts)
        self.flush()

    def flush(self) -> None:
        while self._unsent and self.writable:
            first = self._unsent[0]
            try:
                sent = self.sock.send(first)
            except BlockingIOError:
                self.writable = False
                return
            if sent == len(first):
                self._unsent.popleft()
            else:
                self._unsent[0] = first[sent:]

    def finish(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            # Gone altogether, which the other direction reports.
            if error.errno != errno.ENOTCONN:
                raise

    def keep_time(self, now: float, *, deaf: bool) -> None:
        """The kernel looks after it."""

    def close(self) -> None:
        self.sock.close()


class LineEnd:
    """A leg inside WebSocket, taken over from its shuttle, which it goes back to for the goodbye. ``near`` is the far
    end of the shuttle's local socket: what is under way in it, either way, is not lost."""

    def __init__(self, shuttle: Shuttle, near: socket.socket, now: float) -> None:
        self.shuttle = shuttle
        self._line: Line = shuttle.line
        self._broken: OSError | None = None
        near.setblocking(False)
        with near:
            self.parts: deque[bytes] = deque(_all_of(near))
        said, waiting = shuttle.lend()
        self.parts.extend(waiting)
        try:
            for part in said:
                self._line.send(part)
            self._take_in()
        except (TowpathError, Over) as error:
            # It is told with the first step.
            self._broken = OSError(errno.ECONNRESET, str(error))

    @property
    def sock(self) -> socket.socket:
        return self._line.sock

    @property
    def readable(self) -> bool:
        return self._line.secured.readable or self._broken is not None

    @readable.setter
    def readable(self, value: bool) -> None:
        self._line.secured.readable = value

    @property
    def writable(self) -> bool:
        return self._line.secured.writable

    @writable.setter
    def writable(self, value: bool) -> None:
        self._line.secured.writable = value

    @property
    def ended(self) -> bool:
        return self._line.core.peer_ended

    @property
    def unsent(self) -> int:
        return self._line.secured.unsent_bytes

    def receive(self, most: int, now: float) -> int:
        if self._broken is not None:
            raise self._broken
        try:
            size = self._line.receive(now, most)
            if size and not self._line.core.is_open and not self.ended:
                raise OSError(errno.ECONNRESET, "The agent said goodbye before its stream was complete.")
        except (TowpathError, Over) as error:
            raise OSError(errno.ECONNRESET, str(error)) from error
        finally:
            self._take_in()
        return size

    def _take_in(self) -> None:
        self.parts.extend(self._line.core.incoming)
        self._line.core.incoming.clear()

    def send(self, parts: Iterable[bytes]) -> None:
        try:
            for part in parts:
                self._line.core.send(part)
            self._line.say()
        except TowpathError as error:
            raise OSError(errno.EPIPE, error.sentence) from error

    def flush(self) -> None:
        self.send(())

    def finish(self) -> None:
        self._line.core.end()
        self.flush()

    def keep_time(self, now: float, *, deaf: bool) -> None:
        try:
            self._line.keep_time(now, deaf=deaf)
        except (TowpathError, Over) as error:
            raise OSError(errno.ETIMEDOUT, str(error)) from error

    def close(self) -> None:
        self.shuttle.close()


class JoinedDirection:
    """One way through such a pair, as `splice.Direction` is one through a pair of plain sockets."""

    def __init__(self, source: End, target: End) -> None:
        self._source = source
        self._target = target
        self.moved = 0
        self.done = False
        self._finished = False

    @property
    def readable(self) -> bool:
        return self._source.readable

    @readable.setter
    def readable(self, value: bool) -> None:
        self._source.readable = value

    @property
    def writable(self) -> bool:
        return self._target.writable

    @writable.setter
    def writable(self, value: bool) -> None:
        self._target.writable = value

    @property
    def can_move(self) -> bool:
        """Whether another `step` could do something before the kernel says anything new."""
        if self.done:
            return False
        if self._target.unsent:
            return self._target.writable
        return bool(self._source.parts) or self._source.readable or self._source.ended

    @property
    def held(self) -> int:
        """Bytes taken from the source that the target has not got yet."""
        return self._target.unsent + sum(map(len, self._source.parts))

    def step(self, budget: int, now: float) -> int:
        """Move up to ``budget`` bytes; returns the bytes taken in. Raises OSError when either side is broken."""
        source, target = self._source, self._target
        taken = 0
        while self.can_move:
            if target.unsent:
                target.flush()
            elif source.parts:
                parts = list(source.parts)
                source.parts.clear()
                if not self.moved:
                    # What came before the two were joined counts as well.
                    self.moved = taken = sum(map(len, parts))
                target.send(parts)
            elif source.ended:
                if not self._finished:
                    self._finished = True
                    target.finish()
                self.done = not target.unsent
            elif taken >= budget:
                break
            else:
                source.receive(min(budget - taken, FEED), now)
                size = sum(map(len, source.parts))
                taken += size
                self.moved += size
                if size:
                    parts = list(source.parts)
                    source.parts.clear()
                    target.send(parts)
        return taken

    def keep_time(self, now: float) -> None:
        """Look at the source's clock."""
        self._source.keep_time(now, deaf=self._source.readable or bool(self.held))

    def close(self) -> None:
        """Nothing is kept outside of the ends."""


def _all_of(sock: socket.socket) -> list[bytes]:
    """What waits in a local socket."""
    found = []
    try:
        while data := sock.recv(FEED):
            found.append(data)
    except (BlockingIOError, ConnectionError):
        # All of it, or what there was before the other end went.
        pass
    return found
