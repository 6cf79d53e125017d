"""The agent's way into the relay's tunnel: show one half of a pairing, be joined, and go on with a plain socket.

The outer TLS only carries the token; it is closed in order on both sides before the session's own TLS begins on the
same TCP connection, so the relay moves bytes it cannot read, and moves them cheaply. Where only real HTTPS passes
(`agent.connect.relay_way`), the same is said inside WebSocket, and all that follows stays in it; then the socket is a
local one, whose bytes a process carries.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Protocol
from urllib.parse import urlsplit

import trio

from agent.connect.relay_way import Blocked, RelayWay, Way, tls_context
from agent.connect.transport import Connection, Greet, Path, Wish
from protocol.candidates import Candidate, PathGo, PathOffer
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.interception import CODE, certificate_error, certificate_sentence
from protocol.tunnel.greeting import MAX_LINE, LineReader, Presented, encode_line, verdict_untrusted
from protocol.tunnel.token import ALPN
from protocol.websocket.carrier import Carrier, local_pair
from protocol.websocket.orders import Carry

Dial = Callable[[str, int], Awaitable[trio.SocketStream]]

# Longer than the relay lets one half wait for the other.
TIMEOUT = 45.0
_CHUNK = 4096
_LATE = "The relay's tunnel did not connect the two endpoints in time."


class TunnelFailed(RetryLater):
    """No tunnel to the peer now."""

    default_code = "TUNNEL_FAILED"


def tunnel_context(ca_pem: str | None) -> ssl.SSLContext:
    """TLS to the relay's port for raw tunnels."""
    return tls_context(ca_pem, ALPN)


class TunnelTransport:
    """The tunnel as one way among others (`agent.connect.transport`). ``relay_url`` and ``ca_pem`` are those of the
    link: whatever place a peer or a relay names, only this agent's own relay is dialled."""

    name = "tunnel"

    def __init__(
        self,
        relay_url: str,
        ca_pem: str | None,
        dial: Dial,
        way: RelayWay | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        parts = urlsplit(relay_url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._context = tunnel_context(ca_pem)
        self._ca_pem = ca_pem
        self._dial = dial
        self._way = way or RelayWay("raw")
        self._carrier = carrier
        self._hint = True

    async def offer(self, wish: Wish) -> list[Candidate]:
        """Nothing: the relay adds both places by itself."""
        return []

    def prepare(self, session_id: str) -> None:
        """Nothing."""

    async def answer(self, offer: PathOffer) -> list[Candidate]:
        """Nothing either."""
        return []

    async def connect(self, wish: Wish, go: PathGo) -> Connection:
        """The destination's end."""
        return await self._enter(go)

    async def look(self, wish: Wish, go: PathGo) -> None:
        """Whether the relay joins the two sides."""
        (await self._enter(go)).sock.close()

    async def serve(self, offer: PathOffer, go: PathGo, greet: Greet) -> None:
        """The source's end, which is greeted like a connection that came in at the data port."""
        await greet(await self._enter(go))

    def doubt(self, session_id: str, instance: str) -> None:
        """Nothing: the relay ends the legs of a source that is gone."""

    async def another(self, wish: Wish) -> Connection | None:
        """None: each leg has a place of its own at the relay."""

    async def _enter(self, go: PathGo) -> Connection:
        if go.tunnel is None or not go.tunnel.token:
            raise TunnelFailed("The relay offers no tunnel for this session now.")
        sock, way = await self._open(go.tunnel.token)
        transport = "websocket" if way == "websocket" else "tcp"
        return Connection(sock, Path(kind="tunnel", transport=transport, remote=f"{self._host}:{self._port}"))

    async def _open(self, token: str) -> tuple[socket.socket, Way]:
        with trio.move_on_after(TIMEOUT):
            entry, way = await self._way.first(self._raw, self._websocket, lambda late: late.drop())
            return await entry.join(token), way
        raise TunnelFailed(_LATE)

    async def _raw(self) -> Entry:
        return await enter_raw(self._dial, self._host, self._port, self._context)

    async def _websocket(self) -> Entry:
        if self._carrier is None:
            raise TunnelFailed("This agent has nobody to carry WebSocket.")
        place = self._dial, self._host, self._port, self._ca_pem, self._carrier
        if self._hint:
            try:
                return await enter_websocket(*place)
            except Blocked:
                # Something on the way may know http/1.1 and nothing else.
                self._hint = False
        return await enter_websocket(*place, hint=False)


async def dial_plain(host: str, port: int) -> trio.SocketStream:
    """The plain way to the relay: TCP, all its addresses tried."""
    return await trio.open_tcp_stream(host, port)


class Entry(Protocol):
    """A connection to the relay's tunnel on which no token was shown yet."""

    async def join(self, token: str) -> socket.socket:
        """Show one half, wait for the peer, and let go: a connected, non-blocking socket whose other end is the peer's.

        Raises `TowpathError`. Nothing stays open when it fails or is cancelled.
        """

    def drop(self) -> None:
        """Close it."""


async def open_tunnel(dial: Dial, host: str, port: int, context: ssl.SSLContext, token: str) -> socket.socket:
    """A raw tunnel: a connected, non-blocking socket whose other end is the peer's. Waits for the peer up to `TIMEOUT`
    seconds.

    Raises `TowpathError`: the relay's reason, or that it cannot be reached. Cancelling closes the connection.
    """
    with trio.move_on_after(TIMEOUT):
        entry = await enter_raw(dial, host, port, context)
        return await entry.join(token)
    raise TunnelFailed(_LATE)


async def _dialled(dial: Dial, host: str, port: int) -> trio.SocketStream:
    try:
        return await dial(host, port)
    except OSError as error:
        raise TunnelFailed(f"The relay {host}:{port} cannot be reached: {error}.") from error


# --- raw -----------------------------------------------------------------------------------------------------


async def enter_raw(dial: Dial, host: str, port: int, context: ssl.SSLContext) -> Entry:
    """TLS with the tunnel's own protocol. Raises `Blocked` where something in between does not let that pass."""
    raw = await _dialled(dial, host, port)
    # Not `https_compatible`: here the orderly close of TLS is part of what is said.
    stream = trio.SSLStream(raw, context, server_hostname=host)
    try:
        await stream.do_handshake()
        if stream.selected_alpn_protocol() != ALPN:
            raise Blocked("The relay offers no tunnel, or something between changes the connection to it.")
    except (trio.BrokenResourceError, OSError) as error:
        raw.socket.close()
        refused = certificate_error(error)
        if refused is not None:
            raise TunnelFailed(certificate_sentence(host, refused), code=CODE) from error
        raise Blocked("The connection to the relay's tunnel broke.") from error
    except BaseException:
        raw.socket.close()
        raise
    return _RawEntry(stream, raw)


class _RawEntry:
    def __init__(self, stream: trio.SSLStream[trio.SocketStream], raw: trio.SocketStream) -> None:
        self._stream, self._raw = stream, raw

    def drop(self) -> None:
        self._raw.socket.close()

    async def join(self, token: str) -> socket.socket:
        async with self._raw:
            try:
                return await self._join(token)
            except (trio.BrokenResourceError, OSError) as error:
                raise TunnelFailed("The connection to the relay's tunnel broke.") from error

    async def _join(self, token: str) -> socket.socket:
        stream = self._stream
        await stream.send_all(encode_line(Presented(token=token)))
        reader = LineReader()
        line: bytes | None = None
        while line is None:
            data = await stream.receive_some(_CHUNK)
            if not data:
                raise TunnelFailed("The relay closed the tunnel without a word.")
            line = reader.feed_untrusted(data)
        verdict_untrusted(line)
        if reader.rest or await stream.receive_some(_CHUNK):
            raise ProtocolError("The relay said more than that the tunnel is joined.")
        # The relay's close has come and nothing can be behind it, because it waits for ours.
        _, rest = await stream.unwrap()
        if rest:
            raise ProtocolError("The relay sent something before the tunnel began.")
        plain = socket.socket(fileno=os.dup(self._raw.socket.fileno()))
        plain.setblocking(False)
        return plain


# --- inside WebSocket ----------------------------------------------------------------------------------------


async def enter_websocket(
    dial: Dial, host: str, port: int, ca_pem: str | None, carrier: Carrier, *, hint: bool = True
) -> Entry:
    """WebSocket to the relay, carried by another process. Raises `Blocked` where it does not open."""
    carrier.want()
    raw = await _dialled(dial, host, port)
    try:
        near, far = local_pair()
    except OSError as error:
        raw.socket.close()
        raise TunnelFailed(f"This agent cannot carry WebSocket now: {error}.") from error
    with far, raw.socket:
        try:
            await carrier.carry(Carry(host=host, port=port, ca_pem=ca_pem, hint=hint), raw.socket, far)
        except BaseException:
            near.close()
            raise
    near.setblocking(False)
    local = trio.socket.from_stdlib_socket(near)
    try:
        verdict_untrusted(await _line(local))
    except TowpathError as error:
        local.close()
        if error.code == CODE:
            raise TunnelFailed(error.sentence, code=CODE) from error
        raise Blocked(error.sentence) from error
    except BaseException:
        local.close()
        raise
    return _LocalEntry(local)


class _LocalEntry:
    def __init__(self, local: trio.socket.SocketType) -> None:
        self._local = local

    def drop(self) -> None:
        self._local.close()

    async def join(self, token: str) -> socket.socket:
        with self._local as local:
            try:
                await trio.SocketStream(local).send_all(encode_line(Presented(token=token)))
                verdict_untrusted(await _line(local))
            except (trio.BrokenResourceError, OSError) as error:
                raise TunnelFailed("The connection to the relay's tunnel broke.") from error
            plain = socket.socket(fileno=os.dup(local.fileno()))
        plain.setblocking(False)
        return plain


async def _line(sock: trio.socket.SocketType) -> bytes:
    """One line and not a byte more: what is behind it belongs to whoever gets the socket."""
    reader = LineReader()
    while True:
        try:
            data = await sock.recv(MAX_LINE, socket.MSG_PEEK)
            data = await sock.recv(data.find(b"\n") + 1 or len(data)) if data else b""
        except OSError as error:
            raise TunnelFailed("The connection to the relay's tunnel broke.") from error
        if not data:
            raise TunnelFailed("The relay closed the tunnel without a word.")
        line = reader.feed_untrusted(data)
        if line is not None:
            return line
