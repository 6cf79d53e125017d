"""One race for a path under way: the sockets, timers and offers behind `agent.connect.race`."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import msgspec
import trio

from agent.connect.dialer import dial
from agent.connect.looks import Looks
from agent.connect.network import Network
from agent.connect.punch import Slot, gather_slot, open_slot, punch
from agent.connect.race import QUIC_DELAY, TUNNEL_HOLD, Arrange, Cancel, Dial, Give, Punch, Race, SendOffer, ShowPorts
from agent.connect.transport import Connection, Path, Transport, Wish
from protocol.candidates import (
    DIALLED,
    HOST,
    MAPPED_TCP,
    MAX_CANDIDATES,
    MAX_SLOTS,
    MEETING,
    Arrangement,
    Candidate,
    PathAnswer,
    PathGo,
    PathOffer,
    Rules,
    is_inside,
    parse_address_untrusted,
    usable_untrusted,
    verdict_untrusted,
)
from protocol.errors import TowpathError
from protocol.reversal import is_token, new_token

OFFER_DELAY = 0.15
# Addresses that are dialled twice at once.
SPARES = 2
# How long an offer waits for what the relay sees of the punching ports.
GATHER_TIME, PATIENT_GATHER_TIME = 0.8, 3.0
MAX_READY = 32
NO_RELAY = "the relay cannot be reached to arrange a path"
# Characters of the relay's reason that are shown.
MAX_REASON = 400


def why_nobody_is_dialled(offered: Sequence[Candidate], rules: Rules) -> str:
    """What the owners are told where a source offers nothing that leads to it from outside."""
    if rules.same_site and any(verdict_untrusted(row.host, rules) == "own address" for row in offered):
        return "both agents are on one machine, where both need `data.allow_loopback: true` for a direct path"
    return "the source's address from outside is not known"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose connections a finder finds. ``own``: the source is this very node. ``probe``: only to see what there is;
    the relay's tunnel and UDP are looked at beside the race then (`RunningRace.others`), whatever it brings."""

    session_id: str
    task_id: str
    own: bool
    relay: str
    transport: str
    lanes: int
    probe: bool = False


class Finder(Protocol):
    """Whoever runs a race, gets what it brings and speaks with the relay for it (`agent.connect.finder`)."""

    @property
    def network(self) -> Network: ...

    @property
    def subject(self) -> Subject: ...

    def rules(self, observed: str, peer_observed: str) -> Rules:
        """What may be dialled for this source."""

    def found(self, connection: Connection, candidate: Candidate | None) -> None:
        """A connection may be used. ``candidate`` can be dialled again."""

    def offer(self, offer: PathOffer) -> None:
        """Send an offer through the relay."""

    def next_generation(self) -> int:
        """A generation higher than any before."""

    def path_of(self, kind: str, sock: socket.socket) -> Path:
        """How a new connection goes."""


class RunningRace:
    """One race and its attempts under way: `run` until it is over, `take_go` when the relay's go has come."""

    def __init__(
        self,
        finder: Finder,
        direct: list[Candidate],
        relay_up: bool,
        *,
        tunnel: bool,
        arranged: Arrangement | None = None,
    ) -> None:
        self._finder = finder
        self._network = finder.network
        available = self._network.transports.tunnel is not None and not finder.subject.probe
        # Where a task wants QUIC only, TCP is not even tried; the tunnel stays as last resort.
        self._looks = Looks(self._network, self._wish()) if finder.subject.probe and relay_up else None
        self._udp_only = finder.subject.transport == "quic" and self._network.transports.quic is not None
        direct = [] if self._udp_only else direct
        self._race = Race(
            now=trio.current_time(),
            direct=direct,
            can_offer=relay_up,
            tunnel=tunnel and available,
            # Where an address can be dialled it mostly answers; then nobody need be troubled.
            offer_delay=OFFER_DELAY if direct and not self._looks else 0.0,
            quic_delay=0.0 if self._udp_only else QUIC_DELAY,
            spares=0 if finder.subject.probe else SPARES,
            tunnel_hold=0.0 if self._is_relayed(arranged) else TUNNEL_HOLD,
        )
        # What the relay has arranged with the order of the task.
        self._arranged = arranged
        self._scopes: dict[int, trio.CancelScope] = {}
        self._ready: dict[int, tuple[Connection, Candidate | None]] = {}
        self._slots: list[Slot] = []
        # Those that were shown to the relay before any offer.
        self._shown: list[Slot] = []
        # Addresses by which the source is known, from which connections to punching ports are taken.
        self._hosts: frozenset[str] = frozenset()
        self._generation = -1
        self._go: PathGo | None = None
        self._wake = trio.Event()
        self._offered: PathOffer | None = None
        self._expectations = contextlib.ExitStack()
        self._notes: list[str] = []
        self._scope = trio.CancelScope()
        # Whether its finder was given a connection.
        self.has_given = False
        if not relay_up:
            self._notes.append(NO_RELAY)

    @property
    def others(self) -> dict[str, str]:
        """For a probe: what it saw of UDP and the tunnel (`Looks.found`)."""
        return {} if self._looks is None else self._looks.found

    @property
    def is_spent(self) -> bool:
        """Whether it has given all its places at the tunnel, and nothing else: there will be no more of those."""
        return self._race.is_spent and not self._ready

    def why(self) -> str:
        """Why there is no better path."""
        return "; ".join(dict.fromkeys([*self._notes, self._race.why])).strip("; ")

    def end(self) -> None:
        """Give it up: what it has not given out is closed, and `run` returns."""
        self._scope.cancel()

    def take_go(self, go: PathGo) -> None:
        """The relay's go; ignored unless it is for the newest offer, or for the ports that were shown without one."""
        if go.session_id != self._finder.subject.session_id:
            return
        if go.generation == MEETING:
            self._take_meeting(go)
        elif go.generation == self._generation:
            self._take_go(go)

    def _take_meeting(self, go: PathGo) -> None:
        if not self._shown:
            return
        rules = self._finder.rules(go.observed, go.peer_observed)
        usable = usable_untrusted(go.candidates, rules)
        targets = [row for row in usable if row.kind == MAPPED_TCP or _outside_v6(row)]
        self._hosts |= frozenset(row.host for row in targets) | {go.peer_observed}
        self._race.met(trio.current_time(), go.start_in, targets, [slot.number for slot in self._shown])
        self._wake.set()

    def _take_go(self, go: PathGo) -> None:
        self._go = go
        rules = self._finder.rules(go.observed, go.peer_observed)
        candidates = usable_untrusted(go.answer.candidates if go.answer else [], rules)
        direct = [row for row in candidates if row.kind in DIALLED]
        targets = [row for row in candidates if row.kind == MAPPED_TCP or _outside_v6(row)]
        self._hosts |= frozenset(row.host for row in candidates) | {go.peer_observed}
        wanted = self._finder.subject.transport
        transports = []
        if self._network.transports.tunnel is not None:
            transports += ["tunnel"] * len(go.tunnels)
        if (
            wanted != "tcp"
            and self._network.transports.quic is not None
            and go.answer
            and "quic" in go.answer.transports
        ):
            transports.append("quic")
        if go.tunnel_refused and self._wanted("tunnel"):
            # Who has no other path must know it: an amount that is used up, a relay without a tunnel.
            reason = "".join(c if c.isprintable() else " " for c in go.tunnel_refused[:MAX_REASON])
            self._notes.append(reason.rstrip(". "))
        if self._udp_only:
            direct, targets = [], []
        elif not targets:
            self._notes.append(why_nobody_is_dialled(go.answer.candidates if go.answer else [], rules))
        if self._finder.subject.probe:
            transports = []
        self._race.go(trio.current_time(), go.start_in, direct, targets, len(self._slots), transports)
        self._wake.set()
        if self._looks is not None:
            self._looks.take_go(go)

    def take_direct(self, candidates: list[Candidate]) -> None:
        """The source has said where it can be dialled, after the relay did so for it."""
        if not self._udp_only:
            self._race.add(trio.current_time(), candidates)
            self._wake.set()

    def take_link(self) -> None:
        """The relay can be reached, which it perhaps could not when the race began."""
        self._notes = [note for note in self._notes if note != NO_RELAY]
        self._race.relay_came(trio.current_time())
        self._wake.set()

    def _is_relayed(self, arranged: Arrangement | None) -> bool:
        return arranged is not None and self._network.relayed.has(trio.current_time(), arranged.peer_observed)

    def _remember(self) -> None:
        """Whether this peer is one to which only the tunnel leads. Where that was expected only more is news."""
        if self._arranged is None or not (self._race.is_direct or (self._race.is_relayed and self._race.tunnel_hold)):
            return
        peer = self._arranged.peer_observed
        self._network.relayed.note(trio.current_time(), peer, relayed=self._race.is_relayed)

    def _begin_arranged(self) -> None:
        wish, port = self._arranged, self._network.data_port
        if wish is None or self._udp_only or not is_token(wish.token) or not 0 < wish.count <= MAX_SLOTS:
            return
        if port is not None:
            self._expectations.enter_context(port.expecting(wish.token, self._arrived))
        tunnel = self._network.transports.tunnel is not None
        self._race.arranged(
            trio.current_time(),
            wish.count,
            min(len(wish.tunnels), MAX_SLOTS) if tunnel else 0,
            meets=is_token(wish.show),
        )

    def take_candidates(self, answer: PathAnswer) -> None:
        """More of the source's addresses; ignored unless they belong to the newest offer. What needs no arrangement is
        dialled, such as a mapping that the source's router has granted meanwhile."""
        if answer.generation != self._generation or answer.session_id != self._finder.subject.session_id:
            return
        if self._udp_only:
            return
        seen = ("", "") if self._go is None else (self._go.observed, self._go.peer_observed)
        usable = usable_untrusted(answer.candidates, self._finder.rules(*seen))
        self._race.add(trio.current_time(), [row for row in usable if row.kind in DIALLED])
        self._wake.set()

    async def _tell_mappings(self) -> None:
        """Tell the source what the router maps to the data port, as soon as it does: the offer did not wait for it."""
        while True:
            await self._network.mapped.wait()
            if self._offered is not None and self._offered.generation == self._generation:
                # All of it once more: the first one may still wait for the link, and this takes its place.
                known = self._offered.candidates
                fresh = [row for row in self._network.mappings if row not in known]
                self._offered = msgspec.structs.replace(self._offered, candidates=[*fresh, *known][:MAX_CANDIDATES])
                self._finder.offer(self._offered)

    async def run(self) -> None:
        """Race to the end. Connections given out live on; all else is closed."""
        try:
            with self._scope:
                await self._run()
        finally:
            self._remember()
            self._expectations.close()
            for slot in [*self._slots, *self._shown]:
                slot.close()
            for connection, _ in self._ready.values():
                connection.sock.close()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_mappings)
            if self._looks:
                nursery.start_soon(self._looks.run)
            self._begin_arranged()
            while not self._race.over(trio.current_time()):
                self._wake = trio.Event()
                for action in self._race.poll(trio.current_time()):
                    self._act(nursery, action)
                deadline = self._race.deadline(trio.current_time())
                if math.isinf(deadline):
                    break
                with trio.move_on_at(deadline):
                    await self._wake.wait()
            if self._looks:
                await self._looks.over()
            nursery.cancel_scope.cancel()

    def _act(self, nursery: trio.Nursery, action: Any) -> None:
        if isinstance(action, SendOffer):
            nursery.start_soon(self._send_offer)
        elif isinstance(action, ShowPorts):
            nursery.start_soon(self._show_ports)
        elif isinstance(action, Give):
            found = self._ready.pop(action.id, None)
            if found is not None:
                self.has_given = True
                self._finder.found(*found)
        elif isinstance(action, Cancel):
            if (scope := self._scopes.get(action.id)) is not None:
                scope.cancel()
            if (unused := self._ready.pop(action.id, None)) is not None:
                unused[0].sock.close()
        elif isinstance(action, Dial):
            nursery.start_soon(self._attempt, action.id, partial(self._dial, action), action.candidate)
        elif isinstance(action, Punch):
            nursery.start_soon(self._attempt, action.id, partial(self._punch, action))
        else:
            nursery.start_soon(self._attempt, action.id, partial(self._arrange, action))

    async def _attempt(self, attempt_id: int, work: Any, candidate: Candidate | None = None) -> None:
        why = ""
        with trio.CancelScope() as scope:
            self._scopes[attempt_id] = scope
            try:
                connection: Connection = await work()
            except OSError as error:
                why = f"{_name(work, candidate)}: {(error.strerror or str(error)).lower()}"
            except TowpathError as error:
                why = f"{_name(work, candidate)}: {error.sentence}"
            else:
                self._ready[attempt_id] = (connection, candidate)
                self._race.connected(trio.current_time(), attempt_id)
                self._wake.set()
                return
        self._race.failed(trio.current_time(), attempt_id, why)
        self._wake.set()

    async def _dial(self, action: Dial) -> Connection:
        # A spare goes where another connection goes at this moment: what is counted are addresses.
        if not action.spare and not self._network.may_dial():
            raise OSError("too many addresses were dialled in a short time")
        sock = await dial(action.candidate)
        return Connection(sock, self._finder.path_of("direct", sock))

    async def _punch(self, action: Punch) -> Connection:
        slots = self._shown if action.ahead else self._slots
        slot = next((slot for slot in slots if slot.number == action.slot), None)
        if slot is None or not self._network.may_dial():
            raise OSError("no punching port")
        found = await punch(slot, action.targets, self._hosts)
        return Connection(found.sock, replace(self._finder.path_of("punched", found.sock), rtt=found.rtt))

    async def _arrange(self, action: Arrange) -> Connection:
        transports = self._network.transports
        transport: Transport | None = getattr(transports, action.name)
        assert transport is not None
        subject, wish = self._finder.subject, self._wish()
        if action.ahead:
            assert self._arranged is not None
            place = self._arranged.tunnels[action.leg]
            go = PathGo(session_id=subject.session_id, generation=0, start_in=0.0, tunnel=place)
            return await transport.connect(wish, go)
        assert self._go is not None
        go = self._go
        if action.name == "tunnel":
            go = msgspec.structs.replace(go, tunnel=go.tunnels[action.leg])
        return await transport.connect(wish, go)

    # --- offers --------------------------------------------------------------------------------------------

    async def _send_offer(self) -> None:
        """Open fresh punching ports, find out how they are seen, and tell the source through the relay."""
        network, subject = self._network, self._finder.subject
        self._generation = generation = self._finder.next_generation()
        for slot in self._slots:
            slot.close()
        count = min(subject.lanes + 1, MAX_SLOTS)
        token = new_token()
        if network.data_port is not None and not self._udp_only:
            self._expectations.enter_context(network.data_port.expecting(token, self._arrived))
        slots = self._slots = _open_slots(count)
        transports: dict[str, Transport] = {}
        for name in ("tunnel", "quic"):
            transport: Transport | None = getattr(network.transports, name)
            if transport is not None and self._wanted(name):
                transports[name] = transport
        arranged: list[Candidate] = []
        wish = self._wish()

        async def ask(transport: Transport) -> None:
            arranged.extend(await transport.offer(wish))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gather_slots, slots, self._wanted("tunnel"))
            for transport in transports.values():
                nursery.start_soon(ask, transport)
        candidates = await network.host_candidates(loopback=subject.own)
        for slot in slots:
            candidates += slot.candidates
        candidates += arranged
        if generation != self._generation:
            return
        self._offered = PathOffer(
            session_id=subject.session_id,
            task_id=subject.task_id,
            generation=generation,
            token=token,
            count=count,
            candidates=candidates,
            transports=["tcp", *transports],
            probe=subject.probe,
        )
        self._finder.offer(self._offered)
        # Gathering took its time; the relay has as much as ever to answer.
        self._race.offered(trio.current_time(), count)

    async def _show_ports(self) -> None:
        """Open punching ports and show them to the relay, which tells the source where they are, and us its own."""
        wish = self._arranged
        assert wish is not None
        slots = self._shown = _open_slots(wish.count)
        await self._gather_slots(slots, True, bytes.fromhex(wish.show))
        if len(slots) < wish.count or any(not slot.observing for slot in slots):
            self._race.not_shown(trio.current_time())
            self._wake.set()

    async def _gather_slots(self, slots: list[Slot], brief: bool, token: bytes | None = None) -> None:
        server = await self._network.stun_server()
        own_v6 = [host for host in self._network.interfaces.addresses if ":" in host]
        whys: list[str] = []

        async def gather(slot: Slot) -> None:
            whys.append(await gather_slot(slot, server, own_v6, token))

        with trio.move_on_after(GATHER_TIME if brief else PATIENT_GATHER_TIME):
            async with trio.open_nursery() as nursery:
                for slot in slots:
                    nursery.start_soon(gather, slot)
        if any(whys):
            self._notes.append(next(why for why in whys if why))

    def _wish(self) -> Wish:
        subject = self._finder.subject
        return Wish(session_id=subject.session_id, task_id=subject.task_id, kind="control")

    def _wanted(self, name: str) -> bool:
        if self._finder.subject.probe:
            return self._looks is not None and name in self._looks
        if name == "tunnel":
            return self._race.tunnel and not self._race.has_tunnel
        return self._finder.subject.transport != "tcp"

    def _arrived(self, sock: socket.socket) -> None:
        """The source dialled our data port."""
        now = trio.current_time()
        if len(self._ready) >= MAX_READY or self._race.dials_itself:
            # Closed at once: the source holds few connections on which nothing was said yet.
            sock.close()
            return
        attempt_id = self._race.arrived(now)
        self._ready[attempt_id] = (Connection(sock, self._finder.path_of("reversed", sock)), None)
        self._wake.set()


def _open_slots(count: int) -> list[Slot]:
    """As many as there are descriptors for: other ways than punching go on without."""
    slots: list[Slot] = []
    with contextlib.suppress(OSError):
        for number in range(1, count + 1):
            slots.append(open_slot(number, (socket.AF_INET, socket.AF_INET6)))
    return slots


def _name(work: Any, candidate: Candidate | None) -> str:
    if candidate is not None:
        return f"{candidate.host} port {candidate.port}"
    action = work.args[0]
    return f"punching port {action.slot}" if isinstance(action, Punch) else str(action.name)


def _outside_v6(candidate: Candidate) -> bool:
    if candidate.kind != HOST or ":" not in candidate.host:
        return False
    return not is_inside(parse_address_untrusted(candidate.host))
