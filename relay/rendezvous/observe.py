"""STUN service (RFC 8489): tells whoever asks from which address the question came.

Over TCP on the relay's one port (the dispatcher hands such connections here) and, as help that is not required, over
UDP on two ports, so that a client can tell whether its NAT maps by destination, and whether it lets answers from
another port in.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from protocol import stun
from protocol.errors import ProtocolError
from protocol.places import neighbourhood

_logger = logging.getLogger("relay.observe")

# Streams kept open hold a NAT's mapping for a punch that is about to begin; nobody needs them for longer.
STREAM_LIFE = 60.0
STREAM_IDLE = 40.0
MAX_STREAMS = 2000
MAX_STREAMS_OF_ADDRESS = 64
MAX_QUESTIONS = 64
# Datagrams answered for one address in a window of seconds: enough for every client behind one NAT, too few to flood.
MAX_ANSWERS, WINDOW = 200, 10.0
_MAX_ADDRESSES = 20_000


Noted = Callable[[stun.PortNote, stun.Endpoint], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ObserverStatistics:
    """Questions answered since the start by transport, those refused, and TCP connections open now."""

    tcp: int
    udp: int
    refused: int
    malformed: int
    streams: int


class Observer:
    """One for each relay. ``ports`` are the UDP ports it has, once `open` was called. ``noted`` is told, while `run`
    runs, where a TCP port was seen whose question says whose it is."""

    def __init__(self, noted: Noted | None = None) -> None:
        self._noted = noted
        self._nursery: trio.Nursery | None = None
        self.ports: list[int] = []
        self._sockets: list[trio.socket.SocketType] = []
        self._streams: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self._window = 0.0
        self._tcp = self._udp = self._refused = self._malformed = 0

    def statistics(self) -> ObserverStatistics:
        """Counts since the start."""
        return ObserverStatistics(self._tcp, self._udp, self._refused, self._malformed, self._streams.total())

    # --- TCP -----------------------------------------------------------------------------------------------

    async def serve_stream(self, stream: trio.SocketStream) -> None:
        """Answer questions on one connection until the peer closes, falls silent or asks too often."""
        try:
            peer = _plain(stream.socket.getpeername())
        except OSError:
            return
        caller = neighbourhood(peer[0])
        if self._streams.total() >= MAX_STREAMS or self._streams[caller] >= MAX_STREAMS_OF_ADDRESS:
            self._refused += 1
            return
        self._streams[caller] += 1
        try:
            with trio.move_on_after(STREAM_LIFE):
                await self._answer_stream(stream, peer)
        except ProtocolError:
            self._malformed += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            return
        finally:
            self._streams[caller] -= 1
            if not self._streams[caller]:
                del self._streams[caller]

    async def _answer_stream(self, stream: trio.SocketStream, peer: stun.Endpoint) -> None:
        buffer = bytearray()
        for _ in range(MAX_QUESTIONS):
            while (length := stun.stream_length_untrusted(bytes(buffer[: stun.HEADER]))) is None or len(
                buffer
            ) < length:
                with trio.move_on_after(STREAM_IDLE) as scope:
                    data = await stream.receive_some(stun.MAX_MESSAGE)
                if scope.cancelled_caught or not data:
                    return
                buffer += data
            request = stun.parse_request_untrusted(bytes(buffer[:length]))
            del buffer[:length]
            self._tcp += 1
            answer = (
                stun.encode_unknown(request.transaction, request.unknown)
                if request.unknown
                else stun.encode_answer(request.transaction, peer)
            )
            with trio.fail_after(STREAM_IDLE):
                await stream.send_all(answer)
            if request.note is not None and not request.unknown:
                self._tell_soon(request.note, peer)

    def _tell_soon(self, note: stun.PortNote, peer: stun.Endpoint) -> None:
        """Not waited for: the next question on the same connection may be another meeting's."""
        if self._nursery is not None and self._noted is not None:
            self._nursery.start_soon(self._tell, self._noted, note, peer)

    async def _tell(self, noted: Noted, note: stun.PortNote, peer: stun.Endpoint) -> None:
        try:
            await noted(note, peer)
        except Exception:
            # One meeting's fault must not end the service.
            _logger.exception("A port that was shown came to nothing.")

    # --- UDP -----------------------------------------------------------------------------------------------

    def open(self, host: str, ports: tuple[int, ...]) -> None:
        """Bind the UDP ports (0: any). Ports that cannot be had are left out, with a warning in the log."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in ports:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            try:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind((host, port))
            except OSError as error:
                sock.close()
                _logger.warning("No STUN over UDP on port %d: %s.", port, error.strerror)
                continue
            sock.setblocking(False)
            self._sockets.append(trio.socket.from_stdlib_socket(sock))
            self.ports.append(sock.getsockname()[1])

    async def run(self) -> None:
        """Answer datagrams until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for index in range(len(self._sockets)):
                    nursery.start_soon(self._serve_datagrams, index)
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for sock in self._sockets:
                sock.close()

    async def _serve_datagrams(self, index: int) -> None:
        sock = self._sockets[index]
        while True:
            try:
                data, source = await sock.recvfrom(stun.MAX_MESSAGE + 1)
                await self._answer_datagram(index, data, source)
            except OSError as error:
                # An ICMP error of an earlier answer, or a network that is down: nothing of ours.
                _logger.debug("A STUN datagram came to nothing: %s", error)

    async def _answer_datagram(self, index: int, data: bytes, source: tuple[str, int]) -> None:
        peer = _plain(source)
        try:
            request = stun.parse_request_untrusted(data)
        except ProtocolError:
            self._malformed += 1
            return
        if not self._permit(neighbourhood(peer[0])):
            self._refused += 1
            return
        self._udp += 1
        other = (index + 1) % len(self._sockets)
        if request.unknown:
            answer = stun.encode_unknown(request.transaction, request.unknown)
        else:
            # Which address clients use for this machine it cannot know behind a NAT of its own: only the port counts.
            named = ("0.0.0.0", self.ports[other]) if other != index else None  # noqa: S104 - named, not bound
            answer = stun.encode_answer(request.transaction, peer, named)
        await self._sockets[other if request.change_port else index].sendto(answer, source)

    def _permit(self, caller: str) -> bool:
        now = trio.current_time()
        if now - self._window > WINDOW:
            self._answers.clear()
            self._window = now
        if len(self._answers) >= _MAX_ADDRESSES and caller not in self._answers:
            return False
        self._answers[caller] += 1
        return self._answers[caller] <= MAX_ANSWERS


def _plain(source: tuple[str, int] | tuple[str, int, int, int]) -> stun.Endpoint:
    """An address as people write it; IPv4 on a dual-stack socket as IPv4."""
    return source[0].removeprefix("::ffff:").partition("%")[0], source[1]
