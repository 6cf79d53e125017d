"""Meets an agent that brings its half of a tunnel: reads it, waits for the other half, and lets go of the outer TLS.

What comes out is a plain TCP socket on which the agents' own TLS begins, and the bytes that were read off it already.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.ticket import TicketVerifier
from protocol.tunnel.greeting import LineReader, Verdict, encode_line, presented_untrusted
from protocol.tunnel.token import Half, half_untrusted
from relay.rendezvous.tunnel.pairing import PairingStatistics, PairingTable

_logger = logging.getLogger("towpath.tunnel")

GREETING_TIMEOUT = 10.0
# A half waits so long for the other one.
WAIT = 30.0
CLOSE_TIMEOUT = 15.0
# More than that behind the end of the outer TLS is not what an agent sends.
MAX_HEAD = 72 * 1024


@dataclass(frozen=True)
class Leg:
    """One side of a pair: its plain socket, what was read off it already, and under which number WebSocket is spoken
    behind it (`protocol.websocket.carrier.Carrier.carry`), 0 where none is."""

    sock: socket.socket
    head: bytes = b""
    number: int = 0


class Joined(Protocol):
    """Who takes over two sockets; it owns them from then on. Raises `TowpathError` when it cannot."""

    async def __call__(self, half: Half, legs: tuple[Leg, Leg]) -> None: ...


class Bearer(Protocol):
    """A connection that brings a half, and what is left of it for the bytes of the agents themselves."""

    @property
    def stream(self) -> trio.abc.Stream:
        """On which the greeting is spoken."""

    async def release(self) -> Leg:
        """On which the inner connection goes on."""


class RawBearer:
    """TLS whose whole purpose is the greeting: it ends in order, and the TCP connection goes on without it."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream

    async def release(self) -> Leg:
        """Sends our close and waits for the agent's, which comes only after it has seen ours."""
        transport = self.stream.transport_stream
        _, rest = await self.stream.unwrap()
        # The caller closes its stream; the connection lives on in the duplicate.
        return Leg(socket.socket(fileno=socket.dup(transport.socket.fileno())), bytes(rest))


class LocalBearer:
    """A local socket behind which WebSocket is spoken for us, under ``number`` if that is not 0."""

    def __init__(self, stream: trio.SocketStream, number: int = 0) -> None:
        self.stream = stream
        self._number = number

    async def release(self) -> Leg:
        """The same socket: nothing of the inner connection is read here."""
        await trio.lowlevel.checkpoint()
        return Leg(socket.socket(fileno=socket.dup(self.stream.socket.fileno())), number=self._number)


class _Guest:
    """A connection whose half has come."""

    def __init__(self) -> None:
        self.joined = trio.Event()
        # Set by the side that came second: where the first one leaves its socket.
        self.meeting: _Meeting | None = None


class _Meeting:
    """Where the two sides of a pair leave their plain sockets; the second one to arrive has both taken over."""

    def __init__(self, half: Half) -> None:
        self.half = half
        self.left: Leg | None = None
        self.failed = False

    def give_up(self) -> None:
        self.failed = True
        if self.left is not None:
            self.left.sock.close()
            self.left = None


class TunnelAcceptor:
    """``verifier`` and ``relay_node`` say which tokens count; ``joined`` takes over what was joined."""

    def __init__(
        self, verifier: TicketVerifier, relay_node: str, joined: Joined, clock: Callable[[], float] = time.time
    ) -> None:
        self._verifier = verifier
        self._relay_node = relay_node
        self._joined = joined
        self._clock = clock
        self._table: PairingTable[_Guest] = PairingTable()
        self.refused = 0

    def statistics(self) -> PairingStatistics:
        """Of the pairing table."""
        return self._table.statistics()

    async def accept(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        """Serve one connection until it is handed over or refused; the caller closes what is left of it.

        Raises what the stream raises when the agent goes away.
        """
        await self.admit(RawBearer(stream))

    async def admit(self, bearer: Bearer) -> None:
        """The same for any kind of connection."""
        stream = bearer.stream
        try:
            half = await self._half(stream)
            meeting = await self._meet(stream, half)
        except TowpathError as error:
            self.refused += 1
            _logger.info("A tunnel connection was refused: %s", error.sentence)
            with trio.move_on_after(CLOSE_TIMEOUT):
                await stream.send_all(encode_line(Verdict(joined=False, error=error.to_document())))
            return
        try:
            await self._hand_over(bearer, half, meeting)
        except BaseException:
            meeting.give_up()
            raise

    async def _half(self, stream: trio.abc.Stream) -> Half:
        reader = LineReader()
        with trio.move_on_after(GREETING_TIMEOUT):
            while True:
                data = await stream.receive_some(4096)
                if not data:
                    raise ProtocolError("The connection was closed before it showed a tunnel token.")
                line = reader.feed_untrusted(data)
                if line is not None:
                    if reader.rest:
                        raise ProtocolError("More was said than the tunnel token.")
                    token = presented_untrusted(line).token
                    return half_untrusted(token, self._verifier, relay_node=self._relay_node, now=self._clock())
        raise ProtocolError("No tunnel token was shown in time.")

    async def _meet(self, stream: trio.abc.Stream, half: Half) -> _Meeting:
        """Wait for the other half. Raises `TunnelRefused`, `TunnelBusy`, `RetryLater` when it does not come."""
        guest = _Guest()
        other = self._table.present(half, guest, self._clock())
        if other is not None:
            meeting = other.connection.meeting = _Meeting(half)
            other.connection.joined.set()
            return meeting
        try:
            with trio.move_on_after(WAIT):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_watch, stream, nursery.cancel_scope)
                    await guest.joined.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._table.gone(half)
        if guest.meeting is None:
            raise RetryLater("The other side of the tunnel did not come in time.", code="TUNNEL_ALONE")
        return guest.meeting

    async def _hand_over(self, bearer: Bearer, half: Half, meeting: _Meeting) -> None:
        released: Leg | None = None
        with trio.move_on_after(CLOSE_TIMEOUT):
            await bearer.stream.send_all(encode_line(Verdict(joined=True)))
            released = await bearer.release()
        if released is None or len(released.head) > MAX_HEAD or meeting.failed:
            if released is not None:
                released.sock.close()
            meeting.give_up()
            return
        released.sock.setblocking(False)
        if meeting.left is None:
            meeting.left = released
            return
        other = meeting.left
        meeting.left = None
        try:
            await self._joined(half, (released, other) if half.side == "source" else (other, released))
        except TowpathError as error:
            _logger.warning("A tunnel could not be handed over: %s", error.sentence)
            released.sock.close()
            other.sock.close()


async def _watch(stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
    """An agent that waits says nothing; whatever comes, its end included, ends the waiting."""
    try:
        await stream.receive_some(1)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()
