"""TLS over a non-blocking socket, in as few system calls as there can be: many records with one, and no call in vain.

The library's own TLS sockets read each record (16 KiB) with two calls and write each with one.
"""

from __future__ import annotations

import selectors
import socket
import ssl
from collections import deque
from collections.abc import Iterable

from protocol.websocket.tls import Buffer, Tls

# Bytes read off a socket at once.
READ = 256 * 1024
# Pieces handed to one system call.
_MOST_PIECES = 16
# TLS's own messages cost a peer 27 bytes each, and us new keys and an answer. So what comes has to be content, by one
# byte in so many at least, but for so many bytes, which hold the longest record four times.
_LEAST_CONTENT, _MOST_OTHER = 32, 64 * 1024
# What may wait for a peer that asks and takes no answers; content is held back long before.
_MOST_UNSENT = 4 * 1024 * 1024


class Secured:
    """One connection. It owns the socket. ``buffer``, of `READ` bytes, is used during calls alone and may be shared.

    Methods raise `ssl.SSLError` and OSError when the connection is broken.
    """

    def __init__(self, sock: socket.socket, tls: Tls, *, buffer: memoryview) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._tls = tls
        self._buffer = buffer
        self._unsent: deque[memoryview] = deque()
        self._unsent_size = 0
        # Bytes that came and were no content, as `_LEAST_CONTENT` counts them.
        self._other = 0
        # What the kernel last said: reading or writing in vain costs more than a read.
        self.readable = self.writable = True
        self._ended = False

    @property
    def unsent(self) -> bool:
        """Whether something waits for the socket to take it."""
        return bool(self._unsent)

    @property
    def unsent_bytes(self) -> int:
        """How much that is, encrypted."""
        return self._unsent_size

    def wishes(self, reading: bool) -> int:
        """What to wait for, as a mask of `selectors`."""
        return (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if self._unsent else 0)

    def ready(self, mask: int) -> None:
        """The kernel says so."""
        self.readable |= bool(mask & selectors.EVENT_READ)
        self.writable |= bool(mask & selectors.EVENT_WRITE)

    def shake_hands(self) -> bool:
        """A step of the handshake; whether it is done."""
        while True:
            try:
                self._tls.shake_hands()
            except ssl.SSLWantReadError:
                self._flush_tls()
                if not self._fill():
                    return False
            except ssl.SSLError:
                # The alert tells the other side why.
                self._flush_tls()
                raise
            else:
                self._flush_tls()
                # Certificates may be long.
                self._other = 0
                return True

    def send(self, parts: Iterable[Buffer]) -> None:
        """Encrypt and send as much as the socket takes now; the rest waits. What is handed over is copied."""
        for part in parts:
            self._tls.write(part)
        self._flush_tls()

    def receive_into(self, view: memoryview) -> int | None:
        """Content, as much as has come and fits; 0 at the end of the connection, None when there is nothing now."""
        size = 0
        while size < len(view):
            try:
                more = self._tls.read_into(view[size:])
            except ssl.SSLWantReadError:
                if self._other > _MOST_OTHER:
                    raise ssl.SSLError("The other side has TLS work and says nothing.") from None
                if not self._fill():
                    break
                continue
            if not more:
                return size
            size += more
            self._other = max(0, self._other - _LEAST_CONTENT * more)
        # TLS itself may have something to say, as after a change of keys.
        self._flush_tls()
        return size or None

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._unsent and self.writable:
            pieces = [self._unsent[number] for number in range(min(len(self._unsent), _MOST_PIECES))]
            try:
                sent = self.sock.send(pieces[0]) if len(pieces) == 1 else self.sock.sendmsg(pieces)
            except BlockingIOError:
                self.writable = False
                return
            self._unsent_size -= sent
            while sent:
                first = self._unsent[0]
                if sent < len(first):
                    self._unsent[0] = first[sent:]
                    break
                sent -= len(first)
                self._unsent.popleft()

    def close(self) -> None:
        """Close the socket at once."""
        self.sock.close()

    def _fill(self) -> bool:
        """Read off the socket once; whether anything came, be it the end."""
        if self._ended or not self.readable:
            return False
        try:
            size = self.sock.recv_into(self._buffer)
        except BlockingIOError:
            self.readable = False
            return False
        self._ended = not size
        self._other += size
        self._tls.take_in(self._buffer[:size])
        return True

    def _flush_tls(self) -> None:
        if out := self._tls.take_out():
            self._unsent.append(memoryview(out))
            self._unsent_size += len(out)
        self.flush()
        if self._unsent_size > _MOST_UNSENT:
            raise ssl.SSLError("The other side asks and takes no answers.")
