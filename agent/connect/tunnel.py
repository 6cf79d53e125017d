"""The agent's way into the relay's tunnel: show one half of a pairing, be joined, and go on with a plain socket.

The outer TLS only carries the token; it is closed in order on both sides before the session's own TLS begins on the
same TCP connection, so the relay moves bytes it cannot read, and moves them cheaply.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import trio

from agent.connect.transport import Connection, Greet, Path, Wish
from protocol.candidates import Candidate, PathGo, PathOffer
from protocol.errors import ProtocolError, RetryLater
from protocol.tunnel.greeting import LineReader, Presented, encode_line, verdict_untrusted
from protocol.tunnel.token import ALPN

Dial = Callable[[str, int], Awaitable[trio.SocketStream]]

# Longer than the relay lets one half wait for the other.
TIMEOUT = 45.0
_CHUNK = 4096


class TunnelFailed(RetryLater):
    """No tunnel to the peer now."""

    default_code = "TUNNEL_FAILED"


def tunnel_context(ca_pem: str | None) -> ssl.SSLContext:
    """TLS to the relay's port; with a pinned CA nothing else is trusted."""
    context = ssl.create_default_context(cadata=ca_pem) if ca_pem else ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context


class TunnelTransport:
    """The tunnel as one way among others (`agent.connect.transport`). ``relay_url`` and ``ca_pem`` are those of the
    link: whatever place a peer or a relay names, only this agent's own relay is dialled."""

    name = "tunnel"

    def __init__(self, relay_url: str, ca_pem: str | None, dial: Dial) -> None:
        parts = urlsplit(relay_url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._context = tunnel_context(ca_pem)
        self._dial = dial

    async def offer(self, wish: Wish) -> list[Candidate]:
        """Nothing: the relay adds both places by itself."""
        return []

    async def answer(self, offer: PathOffer) -> list[Candidate]:
        """Nothing either."""
        return []

    async def connect(self, wish: Wish, go: PathGo) -> Connection:
        """The destination's end."""
        return await self._enter(go)

    async def serve(self, offer: PathOffer, go: PathGo, greet: Greet) -> None:
        """The source's end, which is greeted like a connection that came in at the data port."""
        await greet(await self._enter(go))

    async def _enter(self, go: PathGo) -> Connection:
        if go.tunnel is None or not go.tunnel.token:
            raise TunnelFailed("The relay offers no tunnel for this session now.")
        sock = await open_tunnel(self._dial, self._host, self._port, self._context, go.tunnel.token)
        return Connection(sock, Path(kind="tunnel", remote=f"{self._host}:{self._port}"))


async def dial_plain(host: str, port: int) -> trio.SocketStream:
    """The plain way to the relay: TCP, all its addresses tried."""
    return await trio.open_tcp_stream(host, port)


async def open_tunnel(dial: Dial, host: str, port: int, context: ssl.SSLContext, token: str) -> socket.socket:
    """A connected, non-blocking socket whose other end is the peer's. Waits for the peer up to `TIMEOUT` seconds.

    Raises `TowpathError`: the relay's reason, or that it cannot be reached. Cancelling closes the connection.
    """
    with trio.move_on_after(TIMEOUT):
        try:
            raw = await dial(host, port)
        except OSError as error:
            raise TunnelFailed(f"The relay {host}:{port} cannot be reached: {error}.") from error
        async with raw:
            try:
                return await _joined(raw, context, host, token)
            except ssl.SSLCertVerificationError as error:
                raise TunnelFailed(_certificate_sentence(host, error)) from error
            except (trio.BrokenResourceError, OSError) as error:
                cause = error.__cause__
                if isinstance(cause, ssl.SSLCertVerificationError):
                    raise TunnelFailed(_certificate_sentence(host, cause)) from error
                raise TunnelFailed("The connection to the relay's tunnel broke.") from error
    raise TunnelFailed("The relay's tunnel did not connect the two endpoints in time.")


async def _joined(raw: trio.SocketStream, context: ssl.SSLContext, host: str, token: str) -> socket.socket:
    # Not `https_compatible`: here the orderly close of TLS is part of what is said.
    stream = trio.SSLStream(raw, context, server_hostname=host)
    await stream.do_handshake()
    if stream.selected_alpn_protocol() != ALPN:
        raise TunnelFailed("The relay offers no tunnel, or something between changes the connection to it.")
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
    plain = socket.socket(fileno=os.dup(raw.socket.fileno()))
    plain.setblocking(False)
    return plain


def _certificate_sentence(host: str, error: ssl.SSLCertVerificationError) -> str:
    return (
        f"The certificate shown for the relay {host} is not the expected one: {error.verify_message}. If a proxy on "
        "this network opens encrypted connections, ask its operator to let those to the relay through untouched."
    )
