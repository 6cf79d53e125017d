"""Tells agents that speak WebSocket from everybody else who speaks HTTP/1.1, by the first line of their request.

Everybody else goes on to the web server with nothing missing. An agent's link is served here; so is a tunnel whose
connection came another way than straight to this port (`protocol.websocket.carrier`), as through a reverse proxy.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from protocol.errors import ProtocolError
from protocol.places import Places
from protocol.websocket.core import Core
from protocol.websocket.paths import LINK_PATH, PATHS
from protocol.websocket.stream import WebSocketStream, open_stream
from relay.proxies import Proxies

_logger = logging.getLogger("towpath.websocket")

_START = b"GET " + LINK_PATH.rpartition("/")[0].encode() + b"/"
# As long as the web server waits for a request.
_PATIENCE = 75.0
_READ = 16 * 1024

Secured = trio.SSLStream[trio.SocketStream]
WebSocketHandler = Callable[[WebSocketStream], Awaitable[None]]


class Replayed(trio.abc.Stream):
    """A stream with bytes put back in front. What else the web server asks of a TLS stream is passed through."""

    def __init__(self, stream: Secured, first: bytes) -> None:
        self._stream = stream
        self._first = first
        self.transport_stream = stream.transport_stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._first:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        most = len(self._first) if max_bytes is None else max_bytes
        data, self._first = self._first[:most], self._first[most:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def do_handshake(self) -> None:
        """It is done."""
        await self._stream.do_handshake()

    def selected_alpn_protocol(self) -> str | None:
        chosen: str | None = self._stream.selected_alpn_protocol()
        return chosen


class Upgrade:
    """``web`` serves everybody else; ``link`` and ``tunnel`` agents. Without ``tunnel`` that path is not found.
    There are ``places`` for callers who have not said yet what they want;
    ``proxies`` are the operator's own."""

    def __init__(
        self,
        web: Callable[[Secured | Replayed], Awaitable[None]],
        link: WebSocketHandler,
        tunnel: WebSocketHandler | None,
        *,
        places: Places | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self._web = web
        self._link = link
        self._tunnel = tunnel
        self._places = places or Places(20_000)
        self._proxies = proxies or Proxies()

    async def serve(self, stream: Secured) -> None:
        """Serve one connection; closes it."""
        if stream.selected_alpn_protocol() == "h2":
            await self._web(stream)
            return
        caller = self._proxies.caller_at(stream)
        if not self._places.take(caller):
            await trio.aclose_forcefully(stream)
            return
        try:
            first = await _begin(stream)
        finally:
            self._places.leave(caller)
        if first.startswith(_START):
            await self._open(stream, first)
        elif first:
            await self._web(Replayed(stream, first))
        else:
            await trio.aclose_forcefully(stream)

    async def _open(self, stream: Secured, first: bytes) -> None:
        async with stream:
            paths = PATHS if self._tunnel is not None else (LINK_PATH,)
            core = Core.server(paths, trio.current_time())
            try:
                opened = await open_stream(stream, core, first)
            except ProtocolError as error:
                _logger.debug("No WebSocket was opened: %s", error)
                return
            if core.path == LINK_PATH:
                await self._link(opened)
            elif self._tunnel is not None:
                await self._tunnel(opened)


async def _begin(stream: Secured) -> bytes:
    """The first bytes, as many as tell what is wanted; what has come when the caller ends or dawdles."""
    first = b""
    with trio.move_on_after(_PATIENCE):
        while len(first) < len(_START) and _START.startswith(first):
            data = await stream.receive_some(_READ)
            first += bytes(data)
            if not data:
                break
    return first
