"""Joins one TLS connection with WebSocket inside to one local stream socket, neither ever blocking.

The local side's bytes are the stream; its half-close is the stream's end. Nothing is read from one side while the
other takes nothing, so a slow receiver holds its sender back and little is kept here.
"""

from __future__ import annotations

import errno
import selectors
import socket
from collections import deque

from protocol.errors import TowpathError
from protocol.tunnel.greeting import Verdict, encode_line
from protocol.websocket.core import MESSAGE
from protocol.websocket.line import Line, Over

# Bytes one connection may move in one go before others have their turn.
QUANTUM = 512 * 1024
# How long (seconds) the last bytes may take where the other side lives but takes nothing.
FAREWELL = 120.0


class Shuttle:
    """One connection. Call `step` whenever a socket is ready for what `wishes` says, and now and then.

    It owns both sockets. ``buffer``, of at least `MESSAGE` bytes, is used during `step` alone and may be shared. With
    ``tells`` the local side first gets one line (`protocol.tunnel.greeting.Verdict`) that says whether the way is open,
    or why not.
    """

    def __init__(self, line: Line, local: socket.socket, *, tells: bool, buffer: memoryview) -> None:
        local.setblocking(False)
        self.line = line
        self._tells = tells
        self._local = local
        self._buffer = buffer
        self._deadline = float("inf")
        self._leaving = False
        # Why nothing more goes to or comes from outside, while the local side still has to take what came before.
        self._broken: TowpathError | None = None
        # What waits for the local side.
        self._in: deque[memoryview] = deque()
        self._local_ended = self._told_end = False
        # Reading in vain costs more than a read: it is read again only when it is said to have something.
        self._local_quiet = False
        self._greeted = False
        self.again = False

    # --- for the loop ----------------------------------------------------------------------------------------

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The one outside, and the local one."""
        return self.line.sock, self._local

    def wishes(self) -> tuple[int, int]:
        """What to wait for, as masks of `selectors`: on the outside, and on the local side."""
        local = selectors.EVENT_WRITE if self._in else 0
        if self._broken is not None:
            return 0, local
        if self.line.opened and not self.line.unsent and not self._local_ended:
            local |= selectors.EVENT_READ
        return self.line.wishes(reading=not self._in), local

    def ready(self, sock: object, mask: int) -> None:
        """One of `sockets` is ready for something of what `wishes` said."""
        if sock is self.line.sock:
            self.line.secured.ready(mask)
        else:
            self._local_quiet = False

    def step(self, now: float) -> None:
        """Do what can be done. Raises `Over` when nothing is left to do."""
        self.again = False
        try:
            if self._broken is not None:
                self._deliver_rest()
            elif self.line.opened or self._open(now):
                self._move(now)
        except TowpathError as error:
            self._break(error, now)
        except OSError as error:
            # The local side's.
            raise Over(f"The local side broke: {(error.strerror or str(error)).lower()}.") from error
        self._keep_time(now)

    def close(self) -> None:
        """Close both sockets at once."""
        self.line.close()
        self._local.close()

    # --- for somebody else -----------------------------------------------------------------------------------

    def lend(self) -> tuple[list[bytes], list[bytes]]:
        """Let somebody else use the line. What the local side has said and was not sent yet, and what has come and the
        local side has not got yet. The local socket is not used after that."""
        said: list[bytes] = []
        try:
            while data := self._local.recv(MESSAGE):
                said.append(data)
        except OSError:
            # All of it, or what there was before its other end went.
            pass
        self._take_in()
        waiting = [bytes(view) for view in self._in]
        self._in.clear()
        return said, waiting

    def take_back(self) -> None:
        """Both streams are complete: what is left is the goodbye."""
        self._local_ended = self._told_end = True

    # --- opening and ending ----------------------------------------------------------------------------------

    def _open(self, now: float) -> bool:
        return self.line.open(now)

    def _break(self, error: TowpathError, now: float) -> None:
        """The connection is over. What had come before is the local side's all the same, however slowly it takes it."""
        self._take_in()
        if self._broken is not None or not self.line.opened or not self._in:
            self._fail(error)
        self._broken = error
        self._deadline = now + FAREWELL

    def _deliver_rest(self) -> None:
        assert self._broken is not None
        self._deliver()
        if not self._in:
            self._fail(self._broken)

    def _fail(self, error: TowpathError) -> None:
        """The end before its time; the local side learns why while it does not know yet whether the way is open."""
        if self._tells and not self._greeted:
            try:
                self._local.send(encode_line(Verdict(joined=False, error=error.to_document())))
            except OSError:
                pass
        raise Over(error.sentence)

    def _keep_time(self, now: float) -> None:
        if (self._leaving or self._broken is not None) and now > self._deadline:
            raise Over("The last bytes were not taken in time.")
        if self._broken is None:
            try:
                self.line.keep_time(now, deaf=bool(self._in))
            except TowpathError as error:
                self._break(error, now)

    # --- bytes -----------------------------------------------------------------------------------------------

    def _move(self, now: float) -> None:
        moved = 0
        if self.line.unsent:
            self.line.say()
        while moved < QUANTUM:
            before = moved
            if self.line.core.is_open and not (self.line.unsent or self._local_ended or self._local_quiet):
                moved += self._read_local()
            moved += self._deliver()
            if not self._in:
                moved += self._receive(now)
            if moved == before:
                break
        else:
            self.again = True
        self._end_if_done(now)

    def _read_local(self) -> int:
        size = 0
        try:
            while size < MESSAGE:
                more = self._local.recv_into(self._buffer[size:MESSAGE])
                if not more:
                    self._local_ended = True
                    break
                size += more
        except BlockingIOError:
            self._local_quiet = True
        if size:
            self.line.send(self._buffer[:size])
        if self._local_ended:
            self.line.end()
            return size + 1
        return size

    def _receive(self, now: float) -> int:
        size = self.line.receive(now)
        self._take_in()
        return size

    def _take_in(self) -> None:
        if self.line.opened and not self._greeted:
            self._greeted = True
            if self._tells:
                self._in.append(memoryview(encode_line(Verdict(joined=True))))
        incoming = self.line.core.incoming
        self._in.extend(memoryview(part) for part in incoming)
        incoming.clear()

    def _deliver(self) -> int:
        self._take_in()
        size = 0
        while self._in:
            view = self._in[0]
            try:
                sent = self._local.send(view)
            except BlockingIOError:
                return size
            size += sent
            if sent == len(view):
                self._in.popleft()
            else:
                self._in[0] = view[sent:]
        if self.line.core.peer_ended and not self._told_end:
            self._told_end = True
            try:
                self._local.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
        return size

    def _end_if_done(self, now: float) -> None:
        line = self.line
        if not line.core.is_open and not self._in and not line.unsent:
            raise Over("The other side closed the connection.")
        if self._told_end and line.core.ended and not line.unsent and not self._leaving:
            # Both streams are complete; the client says goodbye and the server's answer ends it.
            self._leaving = True
            self._deadline = now + FAREWELL
            if self._tells:
                line.core.close()
                line.say()
