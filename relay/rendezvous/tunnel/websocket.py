"""Tunnel connections inside WebSocket: they come to the acceptor as local sockets, behind which they are carried.

Usually by the process of `protocol.websocket.carrier`, from the first byte on, so that neither TLS nor framing holds up
the relay; by the relay itself where a connection was known for what it is only behind its TLS.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import trio

from protocol.places import Places
from protocol.websocket.carrier import Carrier, CarrierUnavailable, local_pair
from protocol.websocket.line import PING
from protocol.websocket.orders import Carry
from protocol.websocket.shuttle import FAREWELL
from protocol.websocket.stream import WebSocketStream
from relay.proxies import Proxies
from relay.rendezvous.tunnel.acceptor import LocalBearer, TunnelAcceptor

_logger = logging.getLogger("towpath.tunnel")

# Connections that are being handed over, have not shown a half yet, or wait for the other one.
MAX_PENDING = 2000
_CHUNK = 128 * 1024


class WebSocketTunnels:
    """Hands connections to ``carrier`` (or carries them), and their inside to ``acceptor``. ``proxies`` are the
    operator's own."""

    def __init__(self, acceptor: TunnelAcceptor, carrier: Carrier, proxies: Proxies | None = None) -> None:
        self._acceptor = acceptor
        self._carrier = carrier
        self._proxies = proxies or Proxies()
        self._places = Places(MAX_PENDING)

    async def take(self, stream: trio.SocketStream) -> None:
        """Serve a connection that has said nothing yet; closes this descriptor of it."""
        with self._place(stream) as place:
            if place is None:
                return
            near, far = local_pair()
            async with _stream_of(near) as inside:
                with far:
                    try:
                        number = await self._carrier.carry(Carry(), stream.socket, far)
                    except CarrierUnavailable as error:
                        _logger.warning("A tunnel connection was dropped: %s", error.sentence)
                        return
                await stream.aclose()
                await self._acceptor.admit(LocalBearer(inside, number))

    async def carry(self, stream: WebSocketStream) -> None:
        """Serve a connection on which WebSocket is open already, until its end; closes it."""
        async with stream:
            with self._place(stream) as place:
                if place is not None:
                    await self._carry(stream, place)

    async def _carry(self, stream: WebSocketStream, place: ExitStack) -> None:
        near, far = local_pair()
        try:
            async with _stream_of(far) as outside, trio.open_nursery() as pinging:
                pinging.start_soon(_ping, stream)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._admit_and_close, near, place)
                    nursery.start_soon(_pump, stream, outside)
                    nursery.start_soon(_pump, outside, stream)
                # What nobody reads would turn our close into a reset, and take away what the agent has not read.
                with trio.move_on_after(FAREWELL):
                    await stream.wait_closed()
                pinging.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            _logger.debug("A tunnel connection broke.")

    async def _admit_and_close(self, near: socket.socket, place: ExitStack) -> None:
        async with _stream_of(near) as inside:
            # Who has found the other half keeps nobody waiting.
            with place:
                await self._acceptor.admit(LocalBearer(inside, 0))

    @contextmanager
    def _place(self, stream: trio.abc.Stream) -> Iterator[ExitStack | None]:
        """A place for a connection, which is given back when what this yields is closed, and at the end; None when
        there is none for its caller."""
        caller = self._proxies.caller_at(stream)
        if not self._places.take(caller):
            yield None
            return
        with ExitStack() as place:
            place.callback(self._places.leave, caller)
            yield place


def _stream_of(sock: socket.socket) -> trio.SocketStream:
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def _ping(stream: WebSocketStream) -> None:
    """Tell the agent that the relay is there while the other agent takes nothing, so that nothing is read here."""
    while True:
        await trio.sleep(PING)
        await stream.ping()


async def _pump(source: trio.abc.ReceiveStream, target: trio.abc.HalfCloseableStream) -> None:
    while data := await source.receive_some(_CHUNK):
        await target.send_all(data)
    await target.send_eof()
