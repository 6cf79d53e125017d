"""QUIC as one way among others (`agent.connect.transport`): candidates, punching, and the processes that carry it.

A session has one QUIC connection; each wish for a connection is a stream of it. The daemon only punches: the socket
then goes to a process (`process`), which hands back a local stream socket for each stream.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import trio

from agent.connect.network import DialAllowance
from agent.connect.quic import engine
from agent.connect.quic.introduction import MAX_INSTANCE
from agent.connect.quic.process import (
    MAX_PACKET,
    Begin,
    Doubt,
    Move,
    Open,
    Over,
    Ready,
    Stream,
    decode_report,
    encode,
)
from agent.connect.quic.punch import Address
from agent.connect.quic.punch_udp import QuicFailed, punch
from agent.connect.transport import Connection, Greet, Path, Wish
from agent.connect.udp import has_ipv6, open_udp
from protocol.candidates import MAPPED_UDP, Candidate, PathGo, PathOffer
from protocol.identity import NodeKey
from protocol.line_process import line_process

_logger = logging.getLogger("towpath.quic")

MAX_CONNECTIONS = 64
OPEN_TIMEOUT = 10.0
READY_TIMEOUT = 20.0
# A look's handshake may take so long, and so many looks of others are answered with one, at first and in each second.
LOOK_TIMEOUT = 6.0
LOOK_BURST, LOOKS_A_SECOND = 8.0, 0.5
MAX_LOOKS = 2
# An offered socket is kept so long for the go, in seconds.
OFFER_LIFE = 30.0
# One that was opened before an offer came is kept so long for it, and so many of them.
AHEAD_LIFE = 8.0
MAX_AHEAD = 16

# How the relay sees a UDP socket and where else it may be reached; answers within moments, also when nothing does.
Observe = Callable[[trio.socket.SocketType], Awaitable[list[Candidate]]]
# Which of a peer's candidates may be used.
Usable = Callable[[list[Candidate], PathGo], list[Candidate]]
# The certificate (PEM) of the other node of a session, None for a session that is not known here.
PeerOf = Callable[[str], Awaitable[str | None]]


@dataclass(eq=False)
class _Live:
    """One QUIC connection and its process."""

    line: trio.socket.SocketType
    remote: Address
    ready: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)
    sentence: str = ""
    # Streams that the process has opened and nobody has taken yet.
    opened: list[socket.socket] = field(default_factory=list)
    arrived: trio.Event = field(default_factory=trio.Event)
    opening: trio.Lock = field(default_factory=trio.Lock)


@dataclass(eq=False)
class _Ahead:
    """A socket that waits for the offer of its session; ``candidates`` are there once it is ``ready``."""

    sock: trio.socket.SocketType
    candidates: list[Candidate] = field(default_factory=list)
    ready: trio.Event = field(default_factory=trio.Event)


class QuicTransport:
    """See the module. Run `run`; the daemon puts it into `Transports`."""

    name = "quic"

    def __init__(
        self,
        identity: NodeKey,
        peer_of: PeerOf,
        observe: Observe,
        usable: Usable,
        *,
        library: str | None = None,
        instance: str = "",
    ) -> None:
        if library is None and not engine.available():
            raise engine.EngineMissing("No library for QUIC is installed; `pip install qh3` brings one.")
        self._identity = identity
        self._peer_of = peer_of
        self._observe = observe
        self._usable = usable
        self._library = library
        self._instance = instance
        self._sockets: dict[tuple[str, str], tuple[trio.socket.SocketType, str]] = {}
        self._ahead: dict[str, _Ahead] = {}
        self._live: dict[tuple[str, str], _Live] = {}
        self._nursery: trio.Nursery | None = None
        self._looks = trio.CapacityLimiter(MAX_LOOKS)
        self._look_allowance = DialAllowance(0.0, LOOK_BURST, LOOKS_A_SECOND)

    async def run(self) -> None:
        """Keep connections until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for sock, _ in self._sockets.values():
                sock.close()
            self._sockets.clear()

    # --- the destination -------------------------------------------------------------------------------------

    async def offer(self, wish: Wish) -> list[Candidate]:
        """The UDP candidates of a fresh socket; none when the session has a connection already."""
        if self._find(wish.session_id, "client") is not None:
            return []
        secret = secrets.token_hex(16)
        candidates = await self._gather(wish.session_id, "client", secret)
        return [msgspec.structs.replace(candidate, token=secret) for candidate in candidates]

    async def connect(self, wish: Wish, go: PathGo) -> Connection:
        """A stream to the source; the first one brings up the connection."""
        live = self._find(wish.session_id, "client")
        if live is None:
            if go.answer is None:
                raise QuicFailed("The relay gave no candidates of the source.")
            live = await self._bring_up(wish.session_id, "client", go, go.answer.candidates)
        return await self._stream(live)

    async def look(self, wish: Wish, go: PathGo) -> None:
        """Whether UDP gets through, and QUIC on it: the handshake with the source is made, and nothing said."""
        if go.answer is None:
            raise QuicFailed("The relay gave no candidates of the source.")
        with self._take(wish.session_id, "client") as (sock, secret):
            certificate = await self._peer_of(wish.session_id)
            if certificate is None:
                raise QuicFailed("This session is not known here.")
            targets = self._targets(sock, go, go.answer.candidates)
            remote = await punch(sock, client=True, secret=secret, targets=targets)
            try:
                await self._shake_hands(self._begin(wish.session_id, certificate, remote, client=True, look=True), sock)
            except QuicFailed as error:
                raise QuicFailed(f"UDP gets through, but no QUIC came up on it: {error.sentence}") from error

    async def _shake_hands(self, begin: Begin, sock: trio.socket.SocketType) -> None:
        """Have a process make the handshake, and nothing else. At the server's side until the client leaves."""
        with trio.move_on_after(LOOK_TIMEOUT):
            async with line_process("agent.connect.quic.process") as line:
                await _send(line, encode(begin), sock.fileno())
                sock.close()
                while True:
                    packet, _ = await _receive(line)
                    report = decode_report(packet) if packet else Over("The process for it ended.")
                    if isinstance(report, Ready):
                        return
                    if isinstance(report, Over):
                        raise QuicFailed(report.sentence)
        raise QuicFailed("The peer did not answer over QUIC in time.")

    async def _stream(self, live: _Live) -> Connection:
        with trio.move_on_after(OPEN_TIMEOUT):
            async with live.opening:
                await self._tell(live, encode(Open()))
                while not live.opened and not live.over.is_set():
                    await live.arrived.wait()
                if live.opened:
                    return self._connection(live, live.opened.pop(0))
        raise QuicFailed(live.sentence or "The QUIC connection opens no more streams.")

    async def another(self, wish: Wish) -> Connection | None:
        """A stream more of the connection that this session has; None when it has none, or when it opens no more."""
        live = self._find(wish.session_id, "client")
        if live is None or not live.ready.is_set():
            return None
        try:
            return await self._stream(live)
        except QuicFailed:
            return None

    def doubt(self, session_id: str, instance: str) -> None:
        """Have the connection that this session has, if any, end if it leads to an earlier instance of the source's
        agent; where that cannot be told, soon unless the source is heard."""
        live = self._find(session_id, "client")
        if live is not None and live.ready.is_set() and self._nursery is not None:
            self._nursery.start_soon(self._doubt, live, instance)

    async def _doubt(self, live: _Live, instance: str) -> None:
        with contextlib.suppress(QuicFailed):
            await self._tell(live, encode(Doubt(instance[:MAX_INSTANCE])))

    # --- the source ------------------------------------------------------------------------------------------

    def prepare(self, session_id: str) -> None:
        """Look already how a socket is seen that an offer can be answered with."""
        if self._nursery is None or session_id in self._ahead or len(self._ahead) >= MAX_AHEAD:
            return
        if len(self._sockets) < MAX_CONNECTIONS and self._find(session_id, "server") is None:
            # No socket to be had: whoever answers the offer sees.
            with contextlib.suppress(OSError):
                self._ahead[session_id] = ahead = _Ahead(_open())
                self._nursery.start_soon(self._look_ahead, session_id, ahead)

    async def _look_ahead(self, session_id: str, ahead: _Ahead) -> None:
        try:
            ahead.candidates = await self._observe(ahead.sock)
            ahead.ready.set()
            await trio.sleep(AHEAD_LIFE)
        finally:
            ahead.ready.set()
            if self._ahead.get(session_id) is ahead:
                del self._ahead[session_id]
                ahead.sock.close()

    async def answer(self, offer: PathOffer) -> list[Candidate]:
        """The UDP candidates of this side, when the destination has some."""
        secret = next((row.token for row in offer.candidates if row.kind == MAPPED_UDP), "")
        return await self._gather(offer.session_id, "server", secret) if secret else []

    async def serve(self, offer: PathOffer, go: PathGo, greet: Greet) -> None:
        """Punch and answer; streams are greeted as they come, as long as the connection lives."""
        if (offer.session_id, "server") not in self._sockets:
            return
        if offer.probe:
            await self._serve_look(offer, go)
            return
        await self._bring_up(offer.session_id, "server", go, offer.candidates, greet)

    async def _serve_look(self, offer: PathOffer, go: PathGo) -> None:
        with self._take(offer.session_id, "server") as (sock, secret):
            targets = self._targets(sock, go, offer.candidates)
            remote = await punch(sock, client=False, secret=secret, targets=targets)
            # Who looks too often learns that UDP gets through.
            if self._look_allowance.take(trio.current_time()):
                async with self._looks:
                    await self._shake_hands(self._begin(offer.session_id, "", remote, client=False, look=True), sock)

    async def _greet_streams(self, live: _Live, greet: Greet) -> None:
        async with trio.open_nursery() as nursery:
            while not live.over.is_set():
                while live.opened:
                    nursery.start_soon(greet, self._connection(live, live.opened.pop(0)))
                await live.arrived.wait()

    # --- sockets ---------------------------------------------------------------------------------------------

    async def _gather(self, session_id: str, role: str, secret: str) -> list[Candidate]:
        key = (session_id, role)
        if len(self._sockets) >= MAX_CONNECTIONS or self._nursery is None:
            return []
        ahead = await self._looked_ahead(session_id) if role == "server" else None
        try:
            sock = _open() if ahead is None else ahead.sock
        except OSError:
            # Other ways need fewer descriptors.
            return []
        try:
            candidates = await self._observe(sock) if ahead is None else ahead.candidates
        except BaseException:
            sock.close()
            raise
        self._forget(key)
        self._sockets[key] = (sock, secret)
        self._nursery.start_soon(self._expire, key, sock)
        return candidates

    async def _looked_ahead(self, session_id: str) -> _Ahead | None:
        """What waits for this offer, the caller's from now on. While it is looked at nobody takes or closes it: a
        caller may leave."""
        ahead = self._ahead.get(session_id)
        if ahead is None:
            return None
        await ahead.ready.wait()
        if self._ahead.get(session_id) is not ahead:
            return None
        del self._ahead[session_id]
        return ahead

    async def _expire(self, key: tuple[str, str], sock: trio.socket.SocketType) -> None:
        await trio.sleep(OFFER_LIFE)
        if self._sockets.get(key, (None, ""))[0] is sock:
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        known = self._sockets.pop(key, None)
        if known is not None:
            known[0].close()

    @contextlib.contextmanager
    def _take(self, session_id: str, role: str) -> Iterator[tuple[trio.socket.SocketType, str]]:
        """The socket of an offer and its secret, to be used once; closed at the end. Raises `QuicFailed`."""
        known = self._sockets.pop((session_id, role), None)
        if known is None:
            raise QuicFailed("The UDP port of this offer is closed already.")
        with known[0]:
            yield known

    def _targets(self, sock: trio.socket.SocketType, go: PathGo, candidates: list[Candidate]) -> list[Address]:
        return [
            (row.host, row.port)
            for row in self._usable(candidates, go)
            if row.kind == MAPPED_UDP and (":" not in row.host or has_ipv6(sock.family))
        ]

    # --- connections -----------------------------------------------------------------------------------------

    def _find(self, session_id: str, role: str) -> _Live | None:
        live = self._live.get((session_id, role))
        return None if live is None or live.over.is_set() else live

    def _connection(self, live: _Live, sock: socket.socket) -> Connection:
        host, port = live.remote
        remote = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Connection(sock, Path(kind="quic", transport="quic", remote=remote))

    async def _bring_up(
        self, session_id: str, role: str, go: PathGo, candidates: list[Candidate], greet: Greet | None = None
    ) -> _Live:
        with self._take(session_id, role) as (sock, secret):
            certificate = await self._peer_of(session_id)
            if certificate is None:
                raise QuicFailed("This session is not known here.")
            client = role == "client"
            targets = self._targets(sock, go, candidates)
            remote = await punch(sock, client=client, secret=secret, targets=targets)
            begin = self._begin(session_id, certificate, remote, client=client)
            assert self._nursery is not None
            live: _Live = await self._nursery.start(self._keep, (session_id, role), begin, sock.dup(), remote)
        if greet is not None:
            # From the beginning, and whatever becomes of the offer that led here: the client may be up already, and
            # streams that nobody greets would look to it like a source that does not answer.
            self._nursery.start_soon(self._greet_streams, live, greet)
        try:
            with trio.move_on_after(READY_TIMEOUT):
                await live.ready.wait()
        except trio.Cancelled:
            if greet is None:
                # Nobody wants it any more.
                live.line.close()
            raise
        if live.over.is_set() or not live.ready.is_set():
            live.line.close()
            raise QuicFailed(live.sentence or "The peer did not answer over QUIC in time.")
        return live

    def _begin(self, session_id: str, certificate: str, remote: Address, *, client: bool, look: bool = False) -> Begin:
        return Begin(
            session_id=session_id,
            node_key=self._identity.private_key_pem,
            peer_certificate=certificate,
            peer=remote if client else None,
            known=() if client else (remote,),
            look=look,
            library=self._library,
            instance="" if client else self._instance,
        )

    async def _keep(
        self,
        key: tuple[str, str],
        begin: Begin,
        udp: trio.socket.SocketType,
        remote: Address,
        *,
        task_status: trio.TaskStatus[_Live],
    ) -> None:
        """One connection, from its process's start to its end."""
        with udp:
            async with line_process("agent.connect.quic.process") as line:
                await _send(line, encode(begin), udp.fileno())
                udp.close()
                live = _Live(line, remote)
                old = self._live.get(key)
                if old is not None:
                    # The peer begins anew: the connection it had is of no use to anybody.
                    old.line.close()
                self._live[key] = live
                task_status.started(live)
                try:
                    await self._hear(live)
                finally:
                    live.over.set()
                    live.ready.set()
                    live.arrived.set()
                    for sock in live.opened:
                        sock.close()
                    live.opened.clear()
                    if self._live.get(key) is live:
                        del self._live[key]

    async def _hear(self, live: _Live) -> None:
        while True:
            try:
                packet, descriptors = await _receive(live.line)
            except (OSError, trio.ClosedResourceError):
                return
            if not packet:
                return
            report = decode_report(packet)
            if isinstance(report, Ready):
                live.ready.set()
            elif isinstance(report, Over):
                live.sentence = report.sentence
                _logger.info("The QUIC connection with %s ended: %s", live.remote[0], report.sentence)
            elif isinstance(report, Stream) and descriptors:
                live.opened.append(socket.socket(fileno=descriptors[0]))
                live.arrived.set()
                live.arrived = trio.Event()

    async def _tell(self, live: _Live, packet: bytes) -> None:
        try:
            await live.line.send(packet)
        except (OSError, trio.ClosedResourceError) as error:
            raise QuicFailed("The QUIC connection has ended.") from error

    async def moved(self) -> None:
        """The network has changed: connections of which this side is the client go on from fresh sockets."""
        for (_, role), live in list(self._live.items()):
            if role != "client" or live.over.is_set():
                continue
            with contextlib.suppress(OSError, trio.ClosedResourceError), open_udp() as sock:
                await _send(live.line, encode(Move()), sock.fileno())


def _open() -> trio.socket.SocketType:
    plain = open_udp()
    plain.setblocking(False)
    return trio.socket.from_stdlib_socket(plain)


async def _send(line: trio.socket.SocketType, packet: bytes, descriptor: int) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))
    await line.sendmsg([packet], [rights])


async def _receive(line: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    packet, ancillary, _, _ = await line.recvmsg(MAX_PACKET, socket.CMSG_SPACE(4))
    descriptors = [
        int.from_bytes(payload[:4], sys.byteorder)
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(payload) >= 4
    ]
    return packet, descriptors
