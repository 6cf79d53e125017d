"""Connections from a destination to its source: runs races, keeps what they bring, knows the path that is in use.

The thin shell around `agent.connect.race`: sockets, timers and signalling. One for each running task.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import trio

from agent.connect.dialer import dial
from agent.connect.network import Network
from agent.connect.punch import Slot, gather_slot, open_slot, punch
from agent.connect.race import Arrange, Cancel, Dial, Give, Punch, Race, SendOffer
from agent.connect.transport import Connection, Path, Transport, Wish
from protocol.candidates import (
    DIALLED,
    HOST,
    MAPPED_TCP,
    MAX_SLOTS,
    Candidate,
    PathGo,
    PathOffer,
    Rules,
    is_inside,
    parse_address_untrusted,
    usable_untrusted,
)
from protocol.control import SessionAnswer
from protocol.errors import RetryLater, TowpathError
from protocol.keep_alive import keep_alive
from protocol.reversal import new_token
from protocol.round_trip import round_trip

# A source closes connections that say nothing for ten seconds.
KEEP_UNUSED = 8.0
GOOD_PATIENCE = 3.0
OFFER_DELAY = 0.15
# How long an offer waits for what the relay sees of the punching ports.
GATHER_TIME, PATIENT_GATHER_TIME = 0.8, 3.0
# An agent on a path through the relay looks for a better one again after this, and then ever more seldom (seconds).
IMPROVE_FIRST, IMPROVE_MOST = 20.0, 600.0
MAX_POOL = 32


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose connections a finder finds. ``own``: the source is this very node."""

    session_id: str
    task_id: str
    own: bool
    relay: str
    transport: str
    lanes: int


class PathFinder:
    """See the module. `run` must be running; ``send_offer`` tells the relay and answers at once, ``relay_up`` says
    whether it can be told, ``on_better`` is called when a better path than the one in use was found."""

    def __init__(
        self,
        network: Network,
        subject: Subject,
        *,
        send_offer: Callable[[PathOffer], None],
        relay_up: Callable[[], bool],
        on_better: Callable[[Path], None],
        generation: Callable[[], int],
    ) -> None:
        self._network = network
        self._subject = subject
        self._send_offer = send_offer
        self._relay_up = relay_up
        self._on_better = on_better
        self._new_generation = generation
        self._answer: SessionAnswer | None = None
        self._answer_used = False
        self._pool: deque[tuple[float, Connection]] = deque()
        self._news = trio.Event()
        self._good: Candidate | None = None
        self._running: _RunningRace | None = None
        self._nursery: trio.Nursery | None = None
        self._had_direct = False
        self.path: Path | None = None
        self._last_why = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; connections that nobody took are closed then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._improve()
        finally:
            self._nursery = None
            while self._pool:
                self._pool.popleft()[1].sock.close()

    # --- what is told to it --------------------------------------------------------------------------------

    def take_answer(self, answer: SessionAnswer) -> None:
        """Where the source is now, as far as no arrangement is needed."""
        self._answer = answer

    def take_go(self, go: PathGo) -> None:
        """The relay's go for an offer; one for another offer than the newest is ignored."""
        if self._running is not None:
            self._running.take_go(go)

    def begin(self) -> None:
        """Start a race ahead of the first wish, if there is something to race for."""
        if self._answer is not None and self._running is None and not self._pool:
            self._start_race()

    # --- connections ---------------------------------------------------------------------------------------

    async def connect(self) -> Connection:
        """One connection more, the best there is now. Raises `RetryLater` when there is no path."""
        found = await self._connect()
        keep_alive(found.sock)
        return found

    async def _connect(self) -> Connection:
        raced = False
        while True:
            found = await self._available()
            if found is not None:
                self._use(found.path)
                return found
            if self._running is None:
                if raced:
                    raise RetryLater(self._sentence(), code="CONNECT_FAILED", who="source owner")
                self._start_race()
                raced = True
            await self._news.wait()

    async def _available(self) -> Connection | None:
        while self._pool:
            since, connection = self._pool.popleft()
            if trio.current_time() - since < KEEP_UNUSED and _alive(connection.sock):
                return connection
            connection.sock.close()
        if self._good is None:
            return None
        try:
            sock = await dial(self._good, GOOD_PATIENCE)
        except OSError:
            self._good = None
            return None
        return Connection(sock, self._path("direct", sock))

    def _path(self, kind: str, sock: socket.socket, transport: str = "tcp") -> Path:
        return Path(kind=kind, transport=transport, remote=_remote(sock), rtt=round_trip(sock), why="")

    def _use(self, path: Path) -> None:
        if path.kind != "tunnel":
            self._had_direct = True
        self.path = replace(path, why=self.why if path.kind == "tunnel" else "")

    @property
    def why(self) -> str:
        """Why there is no better path: what the race under way has seen, else what the last one had."""
        return (self._running.why() if self._running is not None else "") or self._last_why

    def _sentence(self) -> str:
        reason = f" ({self.why})" if self.why else ""
        if self._relay_allowed():
            return f"No way to the source was found{reason}."
        return (
            f"No direct way to the source was found{reason}, and this task may not go through the relay "
            f"(relay: {self._subject.relay})."
        )

    def _relay_allowed(self) -> bool:
        policies = {self._subject.relay, self._network.relay_policy}
        if "never" in policies:
            return False
        return "until-direct" not in policies or not self._had_direct

    # --- races ---------------------------------------------------------------------------------------------

    def rules(self, observed: str, peer_observed: str) -> Rules:
        """What may be dialled for this source."""
        return self._network.rules(loopback=self._subject.own, observed=observed, peer_observed=peer_observed)

    def _start_race(self, *, improving: bool = False) -> None:
        assert self._nursery is not None
        direct: list[Candidate] = []
        if self._answer is not None:
            rules = self.rules(self._answer.observed, self._answer.peer_observed)
            direct = [row for row in usable_untrusted(self._answer.candidates, rules) if row.kind in DIALLED]
        tunnel = self._relay_allowed() and not improving
        running = self._running = _RunningRace(self, direct, self._relay_up(), tunnel=tunnel)
        self._nursery.start_soon(self._race, running)

    async def _race(self, running: _RunningRace) -> None:
        try:
            await running.run()
        finally:
            self._last_why = running.why() or self._last_why
            if self._running is running:
                self._running = None
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def found(self, connection: Connection, candidate: Candidate | None) -> None:
        """A race brought a connection that may be used. ``candidate`` can be dialled again."""
        if candidate is not None:
            self._good = candidate
        if len(self._pool) >= MAX_POOL:
            connection.sock.close()
            return
        better = self.path is not None and self.path.kind == "tunnel" and connection.path.kind != "tunnel"
        if connection.path.kind == "tunnel":
            self._pool.append((trio.current_time(), connection))
        else:
            self._had_direct = True
            self._pool.appendleft((trio.current_time(), connection))
        self._tell()
        if better:
            self.path = connection.path
            self._on_better(connection.path)

    async def _improve(self) -> None:
        """While data goes through the relay, look for a better path, also whenever the network has changed."""
        pause = IMPROVE_FIRST
        while True:
            with trio.move_on_after(pause) as scope:
                await self._network.changed.wait()
            if not scope.cancelled_caught:
                self._good, pause = None, IMPROVE_FIRST
            if self.path is not None and self.path.kind == "tunnel" and self._running is None:
                self._start_race(improving=True)
                pause = min(pause * 2, IMPROVE_MOST)

    # --- for a race ----------------------------------------------------------------------------------------

    @property
    def network(self) -> Network:
        return self._network

    @property
    def subject(self) -> Subject:
        return self._subject

    def offer(self, offer: PathOffer) -> None:
        """Send an offer through the relay."""
        self._send_offer(offer)

    def next_generation(self) -> int:
        """A generation higher than any before, also over restarts of this agent."""
        return self._new_generation()

    def path_of(self, kind: str, sock: socket.socket) -> Path:
        """How a new connection goes."""
        return self._path(kind, sock)


class _RunningRace:
    """One race and its attempts under way."""

    def __init__(self, finder: PathFinder, direct: list[Candidate], relay_up: bool, *, tunnel: bool) -> None:
        self._finder = finder
        self._network = finder.network
        available = self._network.transports.tunnel is not None
        # Where a task wants QUIC only, TCP is not even tried; the tunnel stays as last resort.
        self._udp_only = finder.subject.transport == "quic" and self._network.transports.quic is not None
        direct = [] if self._udp_only else direct
        self._race = Race(
            now=trio.current_time(),
            direct=direct,
            can_offer=relay_up,
            tunnel=tunnel and available,
            # Where an address can be dialled it mostly answers; then nobody need be troubled.
            offer_delay=OFFER_DELAY if direct else 0.0,
        )
        self._scopes: dict[int, trio.CancelScope] = {}
        self._ready: dict[int, tuple[Connection, Candidate | None]] = {}
        self._slots: list[Slot] = []
        self._hosts: frozenset[str] = frozenset()
        self._generation = -1
        self._go: PathGo | None = None
        self._wake = trio.Event()
        self._expectations = contextlib.ExitStack()
        self._notes: list[str] = []
        if not relay_up:
            self._notes.append("the relay cannot be reached to arrange a path")

    def why(self) -> str:
        """Why there is no better path."""
        return "; ".join(dict.fromkeys([*self._notes, self._race.why])).strip("; ")

    def take_go(self, go: PathGo) -> None:
        """The relay's go; ignored unless it is for the newest offer."""
        if go.generation != self._generation or go.session_id != self._finder.subject.session_id:
            return
        self._go = go
        rules = self._finder.rules(go.observed, go.peer_observed)
        candidates = usable_untrusted(go.answer.candidates if go.answer else [], rules)
        direct = [row for row in candidates if row.kind in DIALLED]
        targets = [row for row in candidates if row.kind == MAPPED_TCP or _outside_v6(row)]
        self._hosts = frozenset(row.host for row in candidates) | {go.peer_observed}
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
        if self._udp_only:
            direct, targets = [], []
        elif not targets:
            self._notes.append("the source's address from outside is not known")
        self._race.go(trio.current_time(), go.start_in, direct, targets, len(self._slots), transports)
        self._wake.set()

    async def run(self) -> None:
        """Race to the end. Connections given out live on; all else is closed."""
        try:
            async with trio.open_nursery() as nursery:
                while not self._race.over(trio.current_time()):
                    self._wake = trio.Event()
                    for action in self._race.poll(trio.current_time()):
                        self._act(nursery, action)
                    deadline = self._race.deadline(trio.current_time())
                    if math.isinf(deadline):
                        break
                    with trio.move_on_at(deadline):
                        await self._wake.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._expectations.close()
            for slot in self._slots:
                slot.close()
            for connection, _ in self._ready.values():
                connection.sock.close()

    def _act(self, nursery: trio.Nursery, action: Any) -> None:
        if isinstance(action, SendOffer):
            nursery.start_soon(self._send_offer)
        elif isinstance(action, Give):
            found = self._ready.pop(action.id, None)
            if found is not None:
                self._finder.found(*found)
        elif isinstance(action, Cancel):
            if (scope := self._scopes.get(action.id)) is not None:
                scope.cancel()
            if (unused := self._ready.pop(action.id, None)) is not None:
                unused[0].sock.close()
        elif isinstance(action, Dial):
            nursery.start_soon(self._attempt, action.id, partial(self._dial, action.candidate), action.candidate)
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

    async def _dial(self, candidate: Candidate) -> Connection:
        if not self._network.may_dial():
            raise OSError("too many addresses were dialled in a short time")
        sock = await dial(candidate)
        return Connection(sock, self._finder.path_of("direct", sock))

    async def _punch(self, action: Punch) -> Connection:
        slot = next((slot for slot in self._slots if slot.number == action.slot), None)
        if slot is None or not self._network.may_dial():
            raise OSError("no punching port")
        sock = await punch(slot, action.targets, self._hosts)
        return Connection(sock, self._finder.path_of("punched", sock))

    async def _arrange(self, action: Arrange) -> Connection:
        transports = self._network.transports
        transport: Transport | None = getattr(transports, action.name)
        assert transport is not None
        assert self._go is not None
        subject = self._finder.subject
        wish = Wish(session_id=subject.session_id, task_id=subject.task_id, kind="control")
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
        slots = [open_slot(number, (socket.AF_INET, socket.AF_INET6)) for number in range(1, count + 1)]
        self._slots = slots
        server = await network.stun_server()
        own_v6 = [host for host in network.interfaces.addresses if ":" in host]
        whys: list[str] = []

        async def gather(slot: Slot) -> None:
            whys.append(await gather_slot(slot, server, own_v6))

        with trio.move_on_after(GATHER_TIME if self._wanted("tunnel") else PATIENT_GATHER_TIME):
            async with trio.open_nursery() as nursery:
                for slot in slots:
                    nursery.start_soon(gather, slot)
        candidates = await network.host_candidates(loopback=subject.own)
        for slot in slots:
            candidates += slot.candidates
        if any(whys):
            self._notes.append(next(why for why in whys if why))
        transports = ["tcp"]
        wish = Wish(session_id=subject.session_id, task_id=subject.task_id, kind="control")
        for name in ("tunnel", "quic"):
            transport: Transport | None = getattr(network.transports, name)
            if transport is not None and self._wanted(name):
                transports.append(name)
                candidates += await transport.offer(wish)
        if generation != self._generation:
            return
        self._finder.offer(
            PathOffer(
                session_id=subject.session_id,
                task_id=subject.task_id,
                generation=generation,
                token=token,
                count=count,
                candidates=candidates,
                transports=transports,
            )
        )

    def _wanted(self, name: str) -> bool:
        if name == "tunnel":
            return self._race.tunnel and not self._race.has_tunnel
        return self._finder.subject.transport != "tcp"

    def _arrived(self, sock: socket.socket) -> None:
        """The source dialled our data port."""
        now = trio.current_time()
        if len(self._ready) >= MAX_POOL:
            sock.close()
            return
        attempt_id = self._race.arrived(now)
        self._ready[attempt_id] = (Connection(sock, self._finder.path_of("reversed", sock)), None)
        self._wake.set()


def _name(work: Any, candidate: Candidate | None) -> str:
    if candidate is not None:
        return f"{candidate.host} port {candidate.port}"
    action = work.args[0]
    return f"punching port {action.slot}" if isinstance(action, Punch) else str(action.name)


def _outside_v6(candidate: Candidate) -> bool:
    if candidate.kind != HOST or ":" not in candidate.host:
        return False
    return not is_inside(parse_address_untrusted(candidate.host))


def _remote(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return ""
    host = str(name[0])
    return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"


def _alive(sock: socket.socket) -> bool:
    """Whether the peer has not closed a connection that nobody used yet. It says nothing before we do."""
    if sock.type == socket.SOCK_DGRAM:
        return True
    sock.setblocking(False)
    try:
        return sock.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        sock.setblocking(True)
