"""One WebSocket connection in TLS on a non-blocking socket, from the handshakes to the goodbye, and its signs of life.

What is inside goes to whoever drives it (`protocol.websocket.shuttle`, or two of these joined with one another).
"""

from __future__ import annotations

import socket
import ssl

from protocol.congestion import tune_sender
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.interception import certificate_sentence
from protocol.keep_alive import keep_alive
from protocol.websocket.core import Core, WebSocketRefused
from protocol.websocket.frames import Buffer
from protocol.websocket.secured import Secured
from protocol.websocket.tls import Tls

# Seconds for TLS and the opening handshake together.
OPEN_TIMEOUT = 15.0
# A peer that is silent for so long (seconds) is asked, silent for `DEAD` it is gone. Only while it is listened to.
PING, DEAD = 5.0, 13.0


class Over(Exception):
    """The connection has ended in order, or too late to say so; its sockets may be closed."""


class Line:
    """See the module. It owns the socket. ``buffer``, of `protocol.websocket.core.FEED` bytes, takes what comes in and
    ``raw``, of `protocol.websocket.secured.READ`, is TLS's; both are used during calls alone and may be shared.

    ``host`` is the relay's name, at a client's end. Methods raise `TowpathError` when the connection is broken.
    """

    def __init__(
        self,
        sock: socket.socket,
        tls: Tls,
        core: Core,
        now: float,
        *,
        host: str = "",
        buffer: memoryview,
        raw: memoryview,
    ) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        self.secured = Secured(sock, tls, buffer=raw)
        self.core = core
        self._host = host
        self._buffer = buffer
        self._shaken = False
        # Whether WebSocket was open once.
        self.opened = False
        self._deadline = now + OPEN_TIMEOUT
        self._pinged = now

    @property
    def sock(self) -> socket.socket:
        """For waiting, and its number."""
        return self.secured.sock

    def wishes(self, *, reading: bool) -> int:
        """What to wait for, as a mask of `selectors`."""
        return self.secured.wishes(reading or not self._shaken)

    def open(self, now: float) -> bool:
        """A step of both handshakes; whether WebSocket is open now."""
        with _Translated(self._host):
            if not self._shaken:
                self._shaken = self.secured.shake_hands()
                if self._shaken:
                    self.say()
        if self._shaken and not self.opened:
            self.receive(now)
        return self.opened

    def receive(self, now: float, most: int | None = None) -> int:
        """Take in once what has come: content is in ``core.incoming`` then. How much there was, 0 for nothing now.

        Raises `Over` at the end of a connection on which both streams are complete.
        """
        with _Translated(self._host):
            size = self.secured.receive_into(self._buffer[:most])
        if size is None:
            return 0
        core = self.core
        if not size and core.ended and core.peer_ended:
            raise Over("Both sides are done.")
        try:
            core.receive_untrusted(self._buffer[:size], now)
        finally:
            self.say()
        if not size:
            raise WebSocketRefused("The connection ended before its time.")
        if not self.opened and core.is_open:
            self.opened = True
            tune_sender(self.sock)
        return size

    def send(self, data: Buffer) -> None:
        """A part of the stream; it is copied. Call it while nothing is `unsent`, so that little is kept."""
        self.core.send(data)
        self.say()

    def end(self) -> None:
        """The stream that is sent is complete."""
        self.core.end()
        self.say()

    def say(self) -> None:
        """Send what the protocol itself has to say, and what waits."""
        with _Translated(self._host):
            if parts := self.core.take_parts():
                self.secured.send(parts)
            else:
                self.secured.flush()

    @property
    def unsent(self) -> bool:
        """Whether something waits for the socket to take it."""
        return self.secured.unsent

    def keep_time(self, now: float, *, deaf: bool) -> None:
        """Look at the clock. ``deaf``: nothing is read now, so nothing can be heard; but the other side hears that
        this one is there. Raises `WebSocketRefused` where the opening takes too long, `Over` after a silence."""
        if not self.opened:
            if now > self._deadline:
                raise WebSocketRefused("WebSocket to the relay did not open in time.")
            return
        if deaf:
            self.core.heard = now
        elif now - self.core.heard > DEAD:
            raise Over(f"The other side was silent for {DEAD:.0f} seconds.")
        quiet_since = self._pinged if deaf else max(self.core.heard, self._pinged)
        if now - quiet_since > PING and not self.unsent:
            self._pinged = now
            self.core.ping()
            self.say()

    def close(self) -> None:
        """Close at once. What breaks the rules is told so, if that goes at once."""
        try:
            self.say()
        except TowpathError:
            # The connection is broken already.
            pass
        finally:
            self.secured.close()


class _Translated:
    """Errors of the connection in our words."""

    def __init__(self, host: str) -> None:
        self._host = host

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ssl.SSLCertVerificationError):
            sentence = certificate_sentence(self._host, error)
            raise RetryLater(sentence, code="INTERCEPTED", who="you") from error
        if isinstance(error, ssl.SSLError):
            raise ProtocolError("TLS with the other side broke.") from error
        if isinstance(error, OSError):
            words = (error.strerror or str(error)).lower()
            raise WebSocketRefused(f"The connection broke: {words}.") from error
