"""TLS of one connection without its socket: what has come is put in, what is to go is taken out.

Two libraries stand behind one interface: Python's `ssl` at the client's end, which checks certificates and names, and
at the relay's, whose work it is, pyOpenSSL (`protocol.websocket.server_tls`).
"""

from __future__ import annotations

import ssl
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Tls(Protocol):
    """One end. Methods raise `ssl.SSLWantReadError` when more must come first, `ssl.SSLError` when it is broken."""

    def shake_hands(self) -> None:
        """Go on with the handshake; returns when it is done."""

    def read_into(self, view: memoryview) -> int:
        """Content that has come, as much as fits or a record of it; 0 at the end, be it one without a goodbye."""

    def write(self, data: Buffer) -> None:
        """Encrypt all of it."""

    def take_in(self, data: Buffer) -> None:
        """What has come off the socket, empty at its end."""

    def take_out(self) -> bytes:
        """What is to go to the socket; empty when there is nothing."""


class LibraryTls:
    """Python's own. With a ``server_hostname`` this is the client's end."""

    def __init__(self, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )

    def shake_hands(self) -> None:
        self._tls.do_handshake()

    def read_into(self, view: memoryview) -> int:
        try:
            return self._tls.read(len(view), view)  # type: ignore[return-value] # a number, with a buffer
        except ssl.SSLEOFError:
            # No goodbye of TLS; what is inside has one of its own.
            return 0

    def write(self, data: Buffer) -> None:
        self._tls.write(data)

    def take_in(self, data: Buffer) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def take_out(self) -> bytes:
        return self._outgoing.read() if self._outgoing.pending else b""
