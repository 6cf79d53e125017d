"""Reads a TLS ClientHello without terminating TLS: server name and application protocols. Sans I/O.

Used wherever one port serves several purposes: the relay's dispatcher and the agent's session port. Only the layout of
RFC 8446 section 4.1.2 (and of RFC 5246 before it) is followed; nothing is decided here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.errors import ProtocolError

# No real ClientHello comes near this, those with post-quantum key shares (about 2 KiB) included.
MAX_CLIENT_HELLO = 16 * 1024

_HANDSHAKE_RECORD = 22
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_ALPN = 16
_HOST_NAME = re.compile(rb"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9.])?")


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a TLS client announced. ``server_name`` is lower case, None when absent; ``alpn`` in the client's order."""

    server_name: str | None
    alpn: tuple[str, ...]


class NotTLS(ProtocolError):
    """The first bytes are not those of a TLS connection."""

    default_code = "NOT_TLS"


class _Reader:
    """Takes length-prefixed pieces off a byte string; whatever does not fit is a `ProtocolError`."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._data):
            raise ProtocolError("The TLS greeting of the peer is malformed: a length is wrong.")
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Reader:
        """A piece with a length of ``size`` bytes before it."""
        return _Reader(self.take(self.number(size)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._position)


def parse_client_hello_untrusted(data: bytes) -> ClientHello | None:
    """Read the ClientHello at the start of ``data``; None when more bytes are needed.

    ``data`` is what the connection carried so far, records and all; the greeting may be spread over several records.
    Raises `NotTLS` when it does not begin as TLS does, `ProtocolError` when it is malformed or too long.
    """
    handshake = bytearray()
    for piece in _records(data):
        handshake += piece
        if (body := _whole_message(handshake)) is not None:
            return _client_hello(_Reader(body))
    return None


def _records(data: bytes) -> Iterator[bytes]:
    """The handshake bytes of each record (RFC 8446 section 5.1); of the last one as much as there is."""
    position = 0
    while position < len(data):
        header = data[position : position + 5]
        if header[0] != _HANDSHAKE_RECORD or (len(header) > 1 and header[1] != 3):
            if position == 0:
                raise NotTLS("The first bytes are not those of a TLS connection.")
            raise ProtocolError("The TLS greeting of the peer is broken off by another record.")
        if len(header) < 5:
            return
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= 16 * 1024:
            raise ProtocolError("The TLS greeting of the peer has a record of a length that is not allowed.")
        yield data[position + 5 : position + 5 + length]
        position += 5 + length


def _whole_message(handshake: bytearray) -> bytes | None:
    """The body of the ClientHello once all of it is there."""
    if len(handshake) < 4:
        return None
    if handshake[0] != _CLIENT_HELLO:
        raise ProtocolError("The peer's first TLS message is not a ClientHello.")
    length = int.from_bytes(handshake[1:4], "big")
    if length > MAX_CLIENT_HELLO:
        raise ProtocolError("The TLS greeting of the peer is too long.")
    return bytes(handshake[4 : 4 + length]) if len(handshake) >= 4 + length else None


def _client_hello(body: _Reader) -> ClientHello:
    body.take(2 + 32)
    body.vector(1)
    body.vector(2)
    body.vector(1)
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    seen: set[int] = set()
    extensions = body.vector(2) if body else _Reader(b"")
    while extensions:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind in seen:
            raise ProtocolError("The TLS greeting of the peer repeats an extension.")
        seen.add(kind)
        if kind == _SERVER_NAME:
            server_name = _read_server_name(content)
        elif kind == _ALPN:
            alpn = _read_alpn(content)
    return ClientHello(server_name, alpn)


def _read_server_name(content: _Reader) -> str | None:
    # RFC 6066 section 3; the only kind of name there is is 0, a host name.
    names = content.vector(2)
    while names:
        kind, name = names.number(1), names.vector(2).rest()
        if kind == 0:
            if not _HOST_NAME.fullmatch(name):
                raise ProtocolError("The TLS greeting of the peer asks for a host name that is none.")
            return name.decode("ascii").lower()
    return None


def _read_alpn(content: _Reader) -> tuple[str, ...]:
    # RFC 7301 section 3.1.
    protocols: list[str] = []
    names = content.vector(2)
    while names:
        name = names.vector(1).rest()
        if not name:
            raise ProtocolError("The TLS greeting of the peer offers a protocol without a name.")
        protocols.append(name.decode("latin-1"))
    return tuple(protocols)
