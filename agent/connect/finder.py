"""Connections from a destination to its source: runs races, keeps what they bring, knows the path that is in use.

One for each running task; `agent.connect.running_race` runs its races.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import trio

from agent.connect.dialer import dial
from agent.connect.network import Network
from agent.connect.running_race import RunningRace, Subject
from agent.connect.transport import Connection, Path, Wish
from protocol.candidates import (
    DIALLED,
    Arrangement,
    Candidate,
    PathAnswer,
    PathGo,
    PathOffer,
    Rules,
    usable_untrusted,
)
from protocol.control import SessionAnswer
from protocol.errors import RetryLater
from protocol.keep_alive import keep_alive
from protocol.round_trip import round_trip

# A source closes connections that say nothing for ten seconds.
KEEP_UNUSED = 8.0
GOOD_PATIENCE = 3.0
# An agent on a path through the relay looks for a better one again after this, and then ever more seldom (seconds).
IMPROVE_FIRST, IMPROVE_MOST = 20.0, 600.0
MAX_POOL = 32


class PathFinder:
    """See the module. `run` must be running; ``send_offer`` tells the relay and answers at once, ``on_better`` is
    called when a better path than the one in use was found."""

    def __init__(
        self,
        network: Network,
        subject: Subject,
        *,
        send_offer: Callable[[PathOffer], None],
        on_better: Callable[[Path], None],
        generation: Callable[[], int],
    ) -> None:
        self._network = network
        self._subject = subject
        self._send_offer = send_offer
        self._on_better = on_better
        self._new_generation = generation
        self._answer: SessionAnswer | None = None
        self._arranged: Arrangement | None = None
        self._pool: deque[tuple[float, Connection]] = deque()
        self._news = trio.Event()
        self._good: Candidate | None = None
        self._running: RunningRace | None = None
        # Whether that only looks for a better path, beside the one in use.
        self._improving = False
        self._nursery: trio.Nursery | None = None
        self._had_direct = False
        self.path: Path | None = None
        self._last_why = ""
        self._others: dict[str, str] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; connections that nobody took are closed then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                nursery.start_soon(self._follow_link)
                await self._improve()
        finally:
            self._nursery = None
            while self._pool:
                self._pool.popleft()[1].sock.close()

    # --- what is told to it --------------------------------------------------------------------------------

    def take_answer(self, answer: SessionAnswer) -> None:
        """Where the source is now, as far as no arrangement is needed. A source that has been started again says it
        unasked: over UDP nothing else need tell."""
        self._answer = answer
        if (quic := self._network.transports.quic) is not None:
            quic.doubt(self._subject.session_id, answer.instance)
        if self._running is not None:
            self._running.take_direct(self._direct(answer))

    def take_arrangement(self, arranged: Arrangement) -> None:
        """What the relay has arranged with the order; the next race begins with it."""
        self._arranged = arranged

    def take_go(self, go: PathGo) -> None:
        """The relay's go for an offer; one for another offer than the newest is ignored."""
        if self._running is not None:
            self._running.take_go(go)

    def take_candidates(self, answer: PathAnswer) -> None:
        """The source can be reached at more addresses than it has said; those for an older offer are ignored."""
        if self._running is not None:
            self._running.take_candidates(answer)

    async def others(self) -> dict[str, str]:
        """For a probe, once its race is over: what it saw of UDP (``quic``) and the ``tunnel``; an empty text where a
        way is open, else the reason why not."""
        while self._running is not None:
            await self._news.wait()
        return self._others

    def begin(self) -> None:
        """Start a race ahead of the first wish, if there is something to race for."""
        if self._answer is not None and self._running is None and not self._pool:
            self._start_race()

    # --- connections ---------------------------------------------------------------------------------------

    async def connect(self, *, begins: bool = False) -> Connection:
        """One connection more, the best there is now; ``begins``: a session begins with it, so that what an earlier one
        used is gone. Raises `RetryLater` when there is no path."""
        found = await self._connect(begins)
        keep_alive(found.sock)
        return found

    async def _connect(self, begins: bool) -> Connection:
        raced = False
        while True:
            found = await self._available()
            if found is not None:
                self._use(found.path)
                return found
            if self._running is not None and not raced and self._brings_no_more(self._running, begins=begins):
                # It goes on for something better than what it has given, or than what there was: of that it would not
                # ask for another.
                self._running.end()
                self._running = None
            begins = False
            if self._running is None:
                if raced:
                    raise RetryLater(self._sentence(), code="CONNECT_FAILED", who="source owner")
                self._start_race()
                raced = True
            await self._news.wait()

    def _brings_no_more(self, running: RunningRace, *, begins: bool) -> bool:
        """Whether a race has nothing more to give of what is in use; all that is lost where a session begins."""
        if self._improving and not running.has_given:
            return True
        return running.is_spent or (begins and running.has_given)

    async def _available(self) -> Connection | None:
        while self._pool:
            since, connection = self._pool.popleft()
            if trio.current_time() - since < KEEP_UNUSED and _alive(connection.sock):
                return connection
            connection.sock.close()
        if self._good is None:
            return await self._another()
        try:
            sock = await dial(self._good, GOOD_PATIENCE)
        except OSError:
            self._good = None
            return None
        return Connection(sock, self._path("direct", sock))

    async def _another(self) -> Connection | None:
        """Over QUIC a connection more is a stream more."""
        quic = self._network.transports.quic
        if quic is None or self.path is None or self.path.kind != "quic":
            return None
        subject = self._subject
        return await quic.another(Wish(session_id=subject.session_id, task_id=subject.task_id, kind="lane"))

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
        direct = [] if self._answer is None else self._direct(self._answer)
        tunnel = self._relay_allowed() and not improving
        arranged, self._arranged = self._arranged, None
        self._improving = improving
        running = self._running = RunningRace(self, direct, self._network.relay_up(), tunnel=tunnel, arranged=arranged)
        self._nursery.start_soon(self._race, running)

    def _direct(self, answer: SessionAnswer) -> list[Candidate]:
        rules = self.rules(answer.observed, answer.peer_observed)
        return [row for row in usable_untrusted(answer.candidates, rules) if row.kind in DIALLED]

    async def _race(self, running: RunningRace) -> None:
        try:
            await running.run()
        finally:
            self._last_why = running.why() or self._last_why
            self._others = running.others
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
        better = self.path is not None and connection.path.rank < self.path.rank
        if connection.path.kind == "tunnel":
            self._pool.append((trio.current_time(), connection))
        else:
            self._had_direct = True
            self._pool.appendleft((trio.current_time(), connection))
        self._tell()
        if better:
            self.path = connection.path
            self._on_better(connection.path)

    async def _follow_link(self) -> None:
        """A race that began without the relay has it help as soon as it can."""
        while True:
            await self._network.linked.wait()
            if self._running is not None:
                self._running.take_link()

    async def _improve(self) -> None:
        """While data goes through the relay, look for a better path, also whenever the network has changed."""
        pause = IMPROVE_FIRST
        while True:
            changed, mapped = self._network.changed, self._network.mapped
            with trio.move_on_after(pause):
                await either(changed, mapped)
            if changed.is_set():
                self._good = None
            if changed.is_set() or mapped.is_set():
                pause = IMPROVE_FIRST
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


async def either(one: trio.Event, other: trio.Event) -> None:
    """Return when one of two things has happened."""

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)


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
