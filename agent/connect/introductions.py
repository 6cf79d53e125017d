"""The source's part in a race: answers offers, dials the destination back, punches at the go, serves transports.

Every connection that comes of it is greeted as if it had come in at the data port: whoever it is must know a session,
and prove in the TLS handshake to be the node that the session's ticket names.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVarTuple, Unpack

import msgspec
import trio

from agent.connect.dialer import dial
from agent.connect.network import Network, Observation
from agent.connect.punch import PUNCH_TIME, connect_from
from agent.connect.transport import Connection, Transport
from protocol.candidates import (
    DIALLED,
    MAPPED_TCP,
    MAX_CANDIDATES,
    MAX_SLOTS,
    MEETING,
    Candidate,
    PathAnswer,
    PathGo,
    PathOffer,
    usable_untrusted,
)
from protocol.control import SessionOrder
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.reversal import is_token, preamble
from protocol.stun import PortNote

# Introductions under way at once, and how long one lasts at most (seconds).
MAX_SESSIONS = 256
LIFE = 20.0
GATHER_TIME, PATIENT_GATHER_TIME = 0.8, 3.0
MAX_BACK = 8
MAX_TWICE = 2
# An offer for a new session mostly comes within so many seconds; who cannot dial the source makes one at once.
AWAITED = 8.0
MAX_AWAITED = 48
# And the relay's word that it has seen both sides' ports.
MEETING_PATIENCE = 6.0
MAX_TARGETS_A_SLOT = 3
# No relay puts a go off for longer (seconds).
LONGEST_START = 5.0

Ts = TypeVarTuple("Ts")


@dataclass
class _Introduction:
    """One session's newest offer."""

    offer: PathOffer
    usable: list[Candidate]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    releases: list[Callable[[], None]] = field(default_factory=list)
    closed: bool = False
    go: PathGo | None = None
    given: trio.Event = field(default_factory=trio.Event)

    def close(self) -> None:
        self.scope.cancel()
        self.closed = True
        while self.releases:
            self.releases.pop()()

    def hold(self, observation: Observation, network: Network) -> None:
        """Keep an observation until this is over."""
        self.releases.append(partial(network.release, observation))
        if self.closed:
            self.close()


class Introductions:
    """See the module. `run` must be running. ``tell`` gives the destination of a task more candidates, through the
    relay, without waiting."""

    def __init__(self, network: Network, tell: Callable[[str, PathAnswer], None] = lambda _task, _answer: None) -> None:
        self._network = network
        self._tell = tell
        self._current: dict[str, _Introduction] = {}
        # What the relay has arranged with a session. A destination's own offer does not end it.
        self._arranged: dict[str, _Introduction] = {}
        self._awaited = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for introduction in [*self._current.values(), *self._arranged.values()]:
                introduction.close()
            self._current.clear()
            self._arranged.clear()

    def prepare(self, order: SessionOrder) -> None:
        """A session was ordered: find out already how the data port is seen, so that its first offer need not wait, and
        show the relay whose it is where that has arranged a meeting."""
        if self._awaited >= MAX_AWAITED:
            return
        note = None
        if order.session_id in self._arranged and order.arranged is not None and is_token(order.arranged.show):
            note = PortNote(bytes.fromhex(order.arranged.show), 0)
        self._start(self._observe_ahead, note)
        if self._network.transports.quic is not None:
            self._network.transports.quic.prepare(order.session_id)

    async def _observe_ahead(self, note: PortNote | None) -> None:
        self._awaited += 1
        try:
            observation = await self._network.observe_data_port(note)
            if observation is not None:
                try:
                    await trio.sleep(AWAITED)
                finally:
                    self._network.release(observation)
        finally:
            self._awaited -= 1

    async def offer(self, offer: PathOffer, *, own: bool) -> PathAnswer:
        """Answer an offer for a session that the caller has checked; ``own``: the destination is this very node.

        Raises `ProtocolError` for a malformed offer, `RetryLater` when there are too many.
        """
        if not is_token(offer.token) or not 0 < offer.count <= MAX_SLOTS:
            raise ProtocolError("The offer of a path is malformed.")
        known = self._current.get(offer.session_id)
        if known is not None and offer.generation < known.offer.generation:
            raise ProtocolError("The offer of a path is older than one already seen.", code="STALE_OFFER")
        network = self._network
        rules = network.rules(loopback=own, observed=offer.observed, peer_observed=offer.peer_observed)
        usable = usable_untrusted(offer.candidates, rules)
        if known is not None and offer.generation == known.offer.generation:
            fresh = [row for row in usable if row not in known.usable]
            known.usable += fresh
            self._start(self._dial_back, known, fresh)
            return PathAnswer(session_id=offer.session_id, generation=offer.generation)
        if known is None and len(self._current) >= MAX_SESSIONS:
            raise RetryLater("Too many paths are being arranged here at this moment.", code="ENDPOINT_TOO_BUSY")
        # An observation that is under way is taken over: asking anew costs time, on a busy line much of it.
        kept: list[Callable[[], None]] = []
        if known is not None:
            kept, known.releases = known.releases, []
            known.close()
        introduction = self._current[offer.session_id] = _Introduction(offer, usable)
        self._start(self._live, introduction)
        mapped: list[Candidate] = []
        arranged: list[Candidate] = []
        transports = self._transports(offer)
        try:
            async with trio.open_nursery() as nursery:
                if offer.count and any(row.slot for row in usable):
                    nursery.start_soon(self._observe, introduction, mapped)
                for _, transport in transports:
                    nursery.start_soon(_ask, transport, offer, arranged)
        finally:
            for release in kept:
                release()
        return PathAnswer(
            session_id=offer.session_id,
            generation=offer.generation,
            candidates=[*mapped, *await network.host_candidates(loopback=own), *arranged],
            transports=["tcp", *(name for name, _ in transports)],
        )

    def arrange(self, order: SessionOrder) -> None:
        """Do this side's part of what the relay has arranged with a session, which the caller has checked."""
        wish = order.arranged
        if wish is None or not is_token(wish.token) or not 0 < wish.count <= MAX_SLOTS:
            return
        known = self._arranged.get(order.session_id)
        if known is not None:
            known.close()
        elif len(self._arranged) >= MAX_SESSIONS:
            return
        rules = self._network.rules(loopback=False, observed=wish.observed, peer_observed=wish.peer_observed)
        offer = PathOffer(
            session_id=order.session_id,
            task_id=order.task_id,
            generation=MEETING,
            token=wish.token,
            count=wish.count,
            transports=["tunnel"],
        )
        introduction = _Introduction(offer, usable_untrusted(wish.candidates[:MAX_CANDIDATES], rules))
        self._arranged[order.session_id] = introduction
        self._start(self._live_arranged, introduction, wish.tunnels[:MAX_SLOTS], is_token(wish.show))

    async def _live_arranged(self, introduction: _Introduction, places: list[Candidate], meets: bool) -> None:
        offer = introduction.offer
        go = PathGo(session_id=offer.session_id, generation=offer.generation, start_in=0.0)
        try:
            with introduction.scope:
                introduction.scope.deadline = trio.current_time() + LIFE
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._dial_back, introduction, list(introduction.usable))
                    if meets:
                        nursery.start_soon(self._meet, introduction)
                    for _, transport in self._transports(offer):
                        for place in places:
                            nursery.start_soon(self._serve, transport, offer, msgspec.structs.replace(go, tunnel=place))
        finally:
            introduction.close()
            if self._arranged.get(offer.session_id) is introduction:
                del self._arranged[offer.session_id]

    async def _meet(self, introduction: _Introduction) -> None:
        """Punch when the relay has seen both sides' ports."""
        with trio.move_on_after(MEETING_PATIENCE):
            await introduction.given.wait()
        go = introduction.go
        if go is None:
            return
        rules = self._network.rules(loopback=False, observed=go.observed, peer_observed=go.peer_observed)
        introduction.usable = usable_untrusted(go.candidates, rules)
        await trio.sleep(max(0.0, min(go.start_in, LONGEST_START)))
        await self._punch(introduction)

    async def _observe(self, introduction: _Introduction, mapped: list[Candidate]) -> None:
        # Nobody waits where the relay carries the data already, and a busy line answers late.
        relayed = "tunnel" in introduction.offer.transports
        with trio.move_on_after(GATHER_TIME if relayed else PATIENT_GATHER_TIME):
            observation = await self._network.observe_data_port()
            if observation is not None:
                mapped.append(observation.candidate)
                introduction.hold(observation, self._network)

    def go(self, go: PathGo) -> None:
        """The relay's go; ignored unless it is for the newest offer of its session, or for what is arranged with it."""
        kept = self._arranged if go.generation == MEETING else self._current
        introduction = kept.get(go.session_id)
        if introduction is not None and introduction.offer.generation == go.generation:
            introduction.go = go
            introduction.given.set()

    def cut(self, session_id: str) -> None:
        """The session was withdrawn."""
        for kept in (self._current, self._arranged):
            introduction = kept.pop(session_id, None)
            if introduction is not None:
                introduction.close()

    def _transports(self, offer: PathOffer) -> list[tuple[str, Transport]]:
        found: list[tuple[str, Transport]] = []
        for name in ("tunnel", "quic"):
            transport: Transport | None = getattr(self._network.transports, name)
            if transport is None or name not in offer.transports:
                continue
            if name == "tunnel" and self._network.relay_policy == "never":
                continue
            found.append((name, transport))
        return found

    def _start(self, work: Callable[[Unpack[Ts]], Awaitable[object]], *arguments: *Ts) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(work, *arguments)

    async def _live(self, introduction: _Introduction) -> None:
        """From the offer to the end of all its attempts."""
        session_id = introduction.offer.session_id
        try:
            with introduction.scope:
                introduction.scope.deadline = trio.current_time() + LIFE
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._dial_back, introduction, list(introduction.usable))
                    # Goes on to the end of the introduction's life: some routers take seconds.
                    nursery.start_soon(self._tell_mappings, introduction.offer)
                    await introduction.given.wait()
                    go = introduction.go
                    assert go is not None
                    for name, transport in self._transports(introduction.offer):
                        legs = [None] if name != "tunnel" else go.tunnels[:MAX_SLOTS]
                        for leg in legs:
                            one = msgspec.structs.replace(go, tunnel=leg)
                            nursery.start_soon(self._serve, transport, introduction.offer, one)
                    await trio.sleep(max(0.0, min(go.start_in, LONGEST_START)))
                    await self._punch(introduction)
        finally:
            introduction.close()
            if self._current.get(session_id) is introduction:
                del self._current[session_id]

    async def _tell_mappings(self, offer: PathOffer) -> None:
        """Tell the destination what the router maps to the data port, as soon as it does: no answer waits for it."""
        while True:
            await self._network.mapped.wait()
            mappings = list(self._network.mappings)
            answer = PathAnswer(session_id=offer.session_id, generation=offer.generation, candidates=mappings)
            self._tell(offer.task_id, answer)

    # --- dialling back -------------------------------------------------------------------------------------

    async def _dial_back(self, introduction: _Introduction, candidates: list[Candidate]) -> None:
        """Dial the destination's data port: the first address that answers gets all connections that are wanted.

        Of a few addresses each is dialled twice at once, for the control stream and the first lane.
        """
        addresses = [row for row in candidates if row.slot == 0 and row.kind in DIALLED][:MAX_BACK]
        addresses = [row for row in addresses if self._network.may_dial()]
        count = introduction.offer.count
        twice = count > 1 and len(addresses) <= MAX_TWICE
        # The address that answered first, once for each connection to it.
        winner: list[Candidate] = []
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + LIFE

            async def one(candidate: Candidate) -> None:
                try:
                    sock = await dial(candidate)
                except OSError:
                    return
                if winner and (winner[0] != candidate or len(winner) >= count):
                    sock.close()
                    return
                winner.append(candidate)
                self._start(self._introduce, sock, introduction.offer.token)

            async with trio.open_nursery() as nursery:
                for candidate in addresses * 2 if twice else addresses:
                    nursery.start_soon(one, candidate)
        if not winner:
            return

        async def another() -> None:
            try:
                sock = await dial(winner[0])
            except OSError:
                return
            self._start(self._introduce, sock, introduction.offer.token)

        async with trio.open_nursery() as nursery:
            for _ in range(count - len(winner)):
                nursery.start_soon(another)

    async def _introduce(self, sock: socket.socket, token: str) -> None:
        sock.setblocking(False)
        with trio.socket.from_stdlib_socket(sock) as stream:
            try:
                await stream.send(preamble(token))
            except OSError:
                return
            await self._greet_socket(stream)

    # --- punching ------------------------------------------------------------------------------------------

    async def _punch(self, introduction: _Introduction) -> None:
        """From the data port to every slot of the destination at once. What comes in there, its listener takes."""
        port = self._network.data_port
        if port is None:
            return
        with trio.move_on_after(PUNCH_TIME + 1.0):
            async with trio.open_nursery() as nursery:
                for number in range(1, introduction.offer.count + 1):
                    rows = [row for row in introduction.usable if row.slot == number]
                    rows.sort(key=lambda row: row.kind != MAPPED_TCP)
                    for row in rows[:MAX_TARGETS_A_SLOT]:
                        family = socket.AF_INET6 if ":" in row.host else socket.AF_INET
                        if family in port.families and self._network.may_dial():
                            nursery.start_soon(self._punch_one, port.port, row)

    async def _punch_one(self, port: int, target: Candidate) -> None:
        try:
            sock = (await connect_from(port, (target.host, target.port))).sock
        except OSError:
            return
        sock.setblocking(False)
        self._start(self._greet_socket, trio.socket.from_stdlib_socket(sock))

    # --- connections ---------------------------------------------------------------------------------------

    async def _greet_socket(self, sock: trio.socket.SocketType) -> None:
        with sock:
            if self._network.data_port is not None:
                await self._network.data_port.greet(sock)

    async def _serve(self, transport: Transport, offer: PathOffer, go: PathGo) -> None:
        try:
            await transport.serve(offer, go, self._greet)
        except (TowpathError, OSError):
            # The destination finds nobody there and says so to its user. Also where no process or descriptor is to be
            # had here.
            return

    async def _greet(self, connection: Connection) -> None:
        connection.sock.setblocking(False)
        # It outlives its introduction: a leg that stands by is greeted when it is needed.
        self._start(self._greet_socket, trio.socket.from_stdlib_socket(connection.sock))


async def _ask(transport: Transport, offer: PathOffer, found: list[Candidate]) -> None:
    found += await transport.answer(offer)
