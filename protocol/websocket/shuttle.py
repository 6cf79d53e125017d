"""Joins one TLS connection with WebSocket inside to one local stream socket, neither ever blocking.

The local side's bytes are the stream; its half-close is the stream's end. Nothing is read from one side while the
other takes nothing, so a slow receiver holds its sender back and little is kept here.
"""

from __future__ import annotations

import errno
import selectors
import socket
import ssl
from collections import deque

from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.interception import certificate_sentence
from protocol.keep_alive import keep_alive
from protocol.tunnel.greeting import Verdict, encode_line
from protocol.websocket.core import FEED, MESSAGE, Core, WebSocketRefused

# Seconds for TLS and the opening handshake together.
OPEN_TIMEOUT = 15.0
# A peer that is silent for so long (seconds) is asked, silent for `DEAD` it is gone. Only while it is listened to.
PING, DEAD = 5.0, 13.0
# Bytes one connection may move in one go before others have their turn.
QUANTUM = 512 * 1024
# How long (seconds) the last bytes may take where the other side lives but takes nothing.
FAREWELL = 120.0


class Over(Exception):
    """The shuttle has ended; both its sockets may be closed."""


class Shuttle:
    """One connection. Call `step` whenever a socket is ready for what `wishes` says, and now and then.

    It owns both sockets. ``buffer``, of `FEED` bytes, is used during `step` alone and may be shared. With a
    ``server_hostname`` this is the client's end, and the local side first gets one line
    (`protocol.tunnel.greeting.Verdict`) that says whether the way is open, or why not.
    """

    def __init__(
        self,
        outside: socket.socket,
        context: ssl.SSLContext,
        local: socket.socket,
        core: Core,
        now: float,
        *,
        server_hostname: str | None,
        buffer: memoryview,
    ) -> None:
        outside.setblocking(False)
        outside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(outside)
        local.setblocking(False)
        self._tells = server_hostname is not None
        self._tls = context.wrap_socket(
            outside,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=True,
        )
        self._host = server_hostname or ""
        self._local = local
        self._core = core
        self._shaken = False
        self._opened = False
        self._deadline = now + OPEN_TIMEOUT
        self._pinged = now
        self._leaving = False
        # Why nothing more goes to or comes from outside, while the local side still has to take what came before.
        self._broken: TowpathError | None = None
        # What waits to be sent either way.
        self._out: deque[memoryview] = deque()
        self._in: deque[memoryview] = deque()
        self._local_ended = self._told_end = False
        self._tls_wants = 0
        # Reading in vain costs more than a read: each side is read again only when it is said to have something.
        self._tls_quiet = self._local_quiet = False
        self._buffer = buffer
        self.again = False

    # --- for the loop ----------------------------------------------------------------------------------------

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The one with TLS, and the local one."""
        return self._tls, self._local

    def wishes(self) -> tuple[int, int]:
        """What to wait for, as masks of `selectors`: on the outside, and on the local side."""
        outside = self._tls_wants
        if self._broken is not None:
            return 0, selectors.EVENT_WRITE if self._in else 0
        if self._shaken:
            outside |= (selectors.EVENT_WRITE if self._out else 0) | (selectors.EVENT_READ if not self._in else 0)
        local = selectors.EVENT_WRITE if self._in else 0
        if self._opened and not self._out and not self._local_ended:
            local |= selectors.EVENT_READ
        return outside, local

    def ready(self, sock: object) -> None:
        """One of `sockets` is ready for something of what `wishes` said."""
        if sock is self._tls:
            self._tls_quiet = False
        else:
            self._local_quiet = False

    def step(self, now: float) -> None:
        """Do what can be done. Raises `Over` when nothing is left to do."""
        self.again = False
        self._tls_wants = 0
        try:
            if self._broken is not None:
                self._deliver_rest()
            elif not self._shaken:
                self._shake_hands()
            if self._shaken and self._broken is None:
                self._move(now)
        except TowpathError as error:
            self._break(error, now)
        except ssl.SSLError as error:
            self._break(_tls_trouble(self._host, error), now)
        except OSError as error:
            self._break(WebSocketRefused(f"The connection broke: {(error.strerror or str(error)).lower()}."), now)
        self._keep_time(now)

    def close(self) -> None:
        """Close both sockets at once."""
        self._tls.close()
        self._local.close()

    # --- opening and ending ----------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._tls_wants = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            self._tls_wants = selectors.EVENT_WRITE
        else:
            self._shaken = True
            self._queue()

    def _break(self, error: TowpathError, now: float) -> None:
        """The connection is over. What had come before is the local side's all the same, however slowly it takes it."""
        if self._broken is not None or not self._opened or not self._in:
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
        if self._tells and not self._opened:
            try:
                self._local.send(encode_line(Verdict(joined=False, error=error.to_document())))
            except OSError:
                pass
        try:
            # What breaks the rules is told so, if that goes at once.
            self._tls.send(self._core.take())
        except (OSError, ValueError):
            pass
        raise Over(error.sentence)

    def _keep_time(self, now: float) -> None:
        if not self._opened:
            if now > self._deadline:
                self._fail(WebSocketRefused("WebSocket to the relay did not open in time."))
            return
        if (self._leaving or self._broken is not None) and now > self._deadline:
            raise Over("The last bytes were not taken in time.")
        if self._broken is not None:
            return
        if self._in:
            # Nothing is read, so nothing can be heard; but the other side hears that this one is there.
            self._core.heard = now
        elif now - self._core.heard > DEAD:
            raise Over(f"The other side was silent for {DEAD:.0f} seconds.")
        quiet_since = self._pinged if self._in else max(self._core.heard, self._pinged)
        if now - quiet_since > PING and not self._out:
            self._pinged = now
            self._core.ping()
            self._queue()
            self._send_ping()

    def _send_ping(self) -> None:
        try:
            self._send()
        except (ssl.SSLError, OSError):
            # The next step meets it again, and knows what to do.
            self.again = True

    # --- bytes -----------------------------------------------------------------------------------------------

    def _queue(self) -> None:
        data = self._core.take()
        if data:
            self._out.append(memoryview(data))

    def _move(self, now: float) -> None:
        moved = 0
        while moved < QUANTUM:
            before = moved
            self._send()
            if self._core.is_open and not (self._out or self._local_ended or self._local_quiet):
                moved += self._read_local()
            self._send()
            moved += self._deliver()
            if not self._in and not self._tls_quiet:
                moved += self._receive(now)
            if moved == before:
                break
        else:
            self.again = True
        self._end_if_done(now)

    def _send(self) -> None:
        while self._out:
            view = self._out[0]
            try:
                size = self._tls.send(view)
            except ssl.SSLWantWriteError:
                self._tls_wants |= selectors.EVENT_WRITE
                return
            except ssl.SSLWantReadError:
                self._tls_wants |= selectors.EVENT_READ
                return
            if size == len(view):
                self._out.popleft()
            else:
                self._out[0] = view[size:]

    def _read_local(self) -> int:
        try:
            data = self._local.recv(MESSAGE)
        except BlockingIOError:
            self._local_quiet = True
            return 0
        if data:
            self._core.send(data)
        else:
            self._local_ended = True
            self._core.end()
        self._queue()
        return len(data) + 1

    def _receive(self, now: float) -> int:
        data = self._read_outside()
        if data is None:
            return 0
        if not data and (self._leaving or (self._core.ended and self._core.peer_ended)):
            raise Over("Both sides are done.")
        try:
            self._core.receive_untrusted(data, now)
        finally:
            self._in.extend(memoryview(part) for part in self._core.incoming)
            self._core.incoming.clear()
        self._queue()
        if not data:
            raise WebSocketRefused("The connection ended before its time.")
        if self._core.is_open and not self._opened:
            self._opened = True
            if self._tells:
                self._in.appendleft(memoryview(encode_line(Verdict(joined=True))))
        return len(data)

    def _read_outside(self) -> bytes | None:
        """Some records' content, empty at the end of the connection, None when there is nothing now."""
        size = 0
        while size < FEED:
            try:
                more = self._tls.recv_into(self._buffer[size:])
            except ssl.SSLWantReadError:
                self._tls_quiet = True
                break
            except ssl.SSLWantWriteError:
                self._tls_wants |= selectors.EVENT_WRITE
                self._tls_quiet = True
                break
            if not more:
                return bytes(self._buffer[:size])
            size += more
        return bytes(self._buffer[:size]) if size else None

    def _deliver(self) -> int:
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
        if self._core.peer_ended and not self._told_end:
            self._told_end = True
            try:
                self._local.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
        return size

    def _end_if_done(self, now: float) -> None:
        if self._opened and not self._core.is_open:
            self._send()
            if not self._in and not self._out:
                raise Over("The other side closed the connection.")
        if self._told_end and self._core.ended and not self._out and not self._leaving:
            # Both streams are complete; the client says goodbye and the server's answer ends it.
            self._leaving = True
            self._deadline = now + FAREWELL
            if self._tells:
                self._core.close()
                self._queue()
                self._send()


def _tls_trouble(host: str, error: ssl.SSLError) -> TowpathError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return RetryLater(certificate_sentence(host, error), code="INTERCEPTED", who="you")
    return ProtocolError("TLS with the other side broke.")
