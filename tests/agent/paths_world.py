"""A source and a destination on loopback that find each other, joined by the real signalling."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from agent.connect.finder import PathFinder
from agent.connect.introductions import Introductions
from agent.connect.listener import DataPort, bind
from agent.connect.network import Network
from agent.connect.running_race import Subject
from agent.connect.transport import Path
from protocol.candidates import Candidate, PathAnswer, PathGo, PathOffer
from protocol.control import SessionAnswer, encode
from protocol.errors import TowpathError
from protocol.stun import Endpoint, PortNote
from relay.rendezvous.observe import Observer
from relay.rendezvous.signalling import Signalling

SESSION = "00000000-0000-4000-8000-0000000000b2"
TASK = "00000000-0000-4000-8000-0000000000b1"


@dataclass
class Node:
    """One agent's network on loopback. ``delivered`` holds the first bytes of every connection that was greeted."""

    network: Network
    introductions: Introductions
    delivered: list[str] = field(default_factory=list)


@dataclass
class World:
    source: Node
    destination: Node
    finder: PathFinder
    signalling: Signalling
    offers: list[PathOffer] = field(default_factory=list)
    better: list[Path] = field(default_factory=list)
    generation: int = 0
    failures: list[TowpathError] = field(default_factory=list)


@asynccontextmanager
async def node(
    stun_port: int, tell: Callable[[str, PathAnswer], None] = lambda _task, _answer: None, **options: Any
) -> AsyncIterator[Node]:
    network = Network(relay=("127.0.0.1", stun_port), allow_loopback=True, **options)
    made = Node(network, Introductions(network, tell))

    async def deliver(session_id: str, kind: str, _sock: trio.socket.SocketType) -> None:
        await trio.lowlevel.checkpoint()
        made.delivered.append(f"{session_id} {kind}")

    network.data_port = DataPort(bind("127.0.0.1", 0), deliver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.data_port.serve)
        await nursery.start(made.introductions.run)
        yield made
        nursery.cancel_scope.cancel()


class Places:
    """Two places at the tunnel for whoever asks."""

    def places(self, offer: PathOffer, destination: str, source: str, owner_id: str) -> tuple[Candidate, Candidate]:
        place = Candidate(kind="relay-tunnel", host="relay", port=443, token="0")
        return place, place


class Links:
    """The links of both agents, as the signalling calls them."""

    def __init__(self) -> None:
        self.made: World

    def address(self, _node_id: str) -> str:
        return "127.0.0.1"

    def round_trip(self, _node_id: str) -> float | None:
        return 0.001

    async def call(self, node_id: str, _method: str, path: str, *, document: Any, timeout: float) -> bytes:
        await trio.lowlevel.checkpoint()
        if isinstance(document, PathGo):
            if node_id == "source":
                self.made.source.introductions.go(document)
            else:
                self.made.finder.take_go(document)
            return b""
        return encode(await self.made.source.introductions.offer(document, own=False))


@asynccontextmanager
async def stun_service(seen: Callable[[PortNote, Endpoint], Awaitable[None]]) -> AsyncIterator[int]:
    """The relay's, over TCP on loopback; its port."""
    observer = Observer(seen)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def observe(stream: trio.SocketStream) -> None:
        async with stream:
            await observer.serve_stream(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(observer.run)
        nursery.start_soon(trio.serve_listeners, observe, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def world(*, relay: str = "allow", relay_up: bool = True, lanes: int = 1) -> AsyncIterator[World]:
    links = Links()
    signalling = Signalling(links, Places())

    def tell(task_id: str, answer: PathAnswer) -> None:
        assert task_id == TASK
        links.made.finder.take_candidates(answer)

    async def introduce(offer: PathOffer) -> None:
        try:
            await signalling.introduce(offer, "destination", "source")
        except TowpathError as error:
            links.made.failures.append(error)

    def send(offer: PathOffer) -> None:
        links.made.offers.append(offer)
        nursery.start_soon(introduce, offer)

    def next_generation() -> int:
        links.made.generation += 1
        return links.made.generation

    async with (
        stun_service(signalling.seen) as port,
        trio.open_nursery() as nursery,
        node(port, tell) as source,
        node(port) as destination,
    ):
        destination.network.relay_up = lambda: relay_up
        found = PathFinder(
            destination.network,
            Subject(session_id=SESSION, task_id=TASK, own=False, relay=relay, transport="tcp", lanes=lanes),
            send_offer=send,
            on_better=lambda path: links.made.better.append(path),
            generation=next_generation,
        )
        links.made = World(source, destination, found, signalling)
        await nursery.start(found.run)
        yield links.made
        nursery.cancel_scope.cancel()


def answer(*candidates: Candidate) -> SessionAnswer:
    return SessionAnswer(session_id=SESSION, generation=1, candidates=list(candidates), certificate="")


def at(port: int) -> Candidate:
    return Candidate(kind="host", host="127.0.0.1", port=port)


def keep_addresses_back(*sides: Node) -> None:
    """As behind firewalls: none of these can be dialled."""

    async def none(**_options: Any) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return []

    for side in sides:
        side.network.host_candidates = none  # type: ignore[method-assign]
