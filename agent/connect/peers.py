"""Whether other agents can be reached from here, over TCP, UDP and the relay; nothing is said on what comes up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from agent.connect.finder import PathFinder
from agent.connect.network import Network
from agent.connect.running_race import Subject
from protocol.candidates import PathAnswer, PathGo, PathOffer
from protocol.control import SessionAnswer
from protocol.errors import RetryLater, TowpathError
from protocol.record import Record

MAX_PEERS = 8
# How long one race may take, and how often all may be asked for (seconds).
PATIENCE = 14.0
INTERVAL = 15.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An agent that data came from: the last task it was the source of, its session, and where it was then."""

    node_id: str
    task_id: str
    session_id: str
    collection_id: str
    name: str
    answer: SessionAnswer | None


class PeerPath(Record, frozen=True, kw_only=True):
    """What was found. ``kind`` is that of the direct way over TCP, empty where there is none; ``rtt_ms`` is None where
    it is not known. ``udp``: whether UDP gets through and QUIC comes up on it; ``tunnel``: whether the relay joins the
    two; None where that was not looked at. ``answered``: whether the relay asked the peer and it answered."""

    collection_id: str
    name: str
    task_id: str
    kind: str
    remote: str = ""
    rtt_ms: float | None = None
    why: str = ""
    udp: bool | None = None
    udp_why: str = ""
    tunnel: bool | None = None
    tunnel_why: str = ""
    answered: bool = True


class PeerProbes:
    """One for each agent. ``send_offer`` tells the relay; the relay's go for a probe comes to `take_go`."""

    def __init__(
        self, network: Network, send_offer: Callable[[PathOffer], None], generation: Callable[[], int]
    ) -> None:
        self._network = network
        self._send_offer = send_offer
        self._generation = generation
        self._finders: dict[str, PathFinder] = {}
        # Tasks whose probe was answered through the relay.
        self._answered: set[str] = set()
        self._last = float("-inf")

    def take_go(self, task_id: str, go: PathGo) -> bool:
        """Whether the go was for a probe."""
        finder = self._finders.get(task_id)
        if finder is None:
            return False
        self._answered.add(task_id)
        finder.take_go(go)
        return True

    def take_candidates(self, task_id: str, answer: PathAnswer) -> bool:
        """Whether a source's later candidates were for a probe."""
        finder = self._finders.get(task_id)
        if finder is None:
            return False
        finder.take_candidates(answer)
        return True

    async def probe(self, peers: list[Peer]) -> list[PeerPath]:
        """Race for a path to each of at most `MAX_PEERS`, all at once. Raises `RetryLater` when asked too often."""
        now = trio.current_time()
        if now - self._last < INTERVAL:
            raise RetryLater(f"Peers are looked for at most every {INTERVAL:.0f} seconds.", code="TOO_OFTEN")
        self._last = now
        found: dict[str, PeerPath] = {}

        async def one(peer: Peer) -> None:
            found[peer.node_id] = await self._one(peer)

        async with trio.open_nursery() as nursery:
            for peer in peers[:MAX_PEERS]:
                nursery.start_soon(one, peer)
        return [found[peer.node_id] for peer in peers[:MAX_PEERS]]

    async def _one(self, peer: Peer) -> PeerPath:
        subject = Subject(
            session_id=peer.session_id,
            task_id=peer.task_id,
            own=False,
            relay="never",
            transport="tcp",
            lanes=0,
            probe=True,
        )
        finder = PathFinder(
            self._network,
            subject,
            send_offer=self._send_offer,
            on_better=lambda _path: None,
            generation=self._generation,
        )
        if peer.answer is not None:
            finder.take_answer(peer.answer)
        made = PeerPath(collection_id=peer.collection_id, name=peer.name, task_id=peer.task_id, kind="")
        self._finders[peer.task_id] = finder
        self._answered.discard(peer.task_id)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(finder.run)
                with trio.move_on_after(PATIENCE):
                    made = await self._reached(finder, made)
                    made = _with_others(made, await finder.others())
                if not made.kind and not made.why:
                    made = msgspec.structs.replace(made, why=finder.why or "nothing was found in time")
                nursery.cancel_scope.cancel()
        finally:
            del self._finders[peer.task_id]
        return msgspec.structs.replace(made, answered=peer.task_id in self._answered)

    async def _reached(self, finder: PathFinder, made: PeerPath) -> PeerPath:
        try:
            connection = await finder.connect()
        except TowpathError:
            return msgspec.structs.replace(made, why=finder.why)
        with connection.sock:
            path = connection.path
        trip = None if path.rtt is None else round(path.rtt * 1000, 1)
        return msgspec.structs.replace(made, kind=path.kind, remote=path.remote, rtt_ms=trip)


def _with_others(made: PeerPath, others: dict[str, str]) -> PeerPath:
    udp, tunnel = others.get("quic"), others.get("tunnel")
    return msgspec.structs.replace(
        made,
        udp=None if udp is None else not udp,
        udp_why=udp or "",
        tunnel=None if tunnel is None else not tunnel,
        tunnel_why=tunnel or "",
    )
