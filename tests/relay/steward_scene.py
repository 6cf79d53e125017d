"""One person with two machines in virtual time, for the steward's stories.

Time is virtual and the database has no threads here, so a day passes in a moment and always in the same order.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio
from sqlalchemy import Connection, select
from trio.testing import MockClock

from relay.store import transfer_tables as tables
from tests.relay.fake_agents import FakeAgent
from tests.relay.relay_world import START
from tests.relay.transfer_world import InlineStore, Person, TransferWorld, open_world

T = TypeVar("T")
# Long enough for everything that needs no waiting.
MOMENT = 2.0


class CountingStore(InlineStore):
    """Counts transactions that write."""

    written = 0

    async def write(self, work: Callable[[Connection], T], *, aside: bool = False) -> T:
        self.written += 1
        return await super().write(work, aside=aside)


class Scene:
    """Alice with a source and a destination; nobody is linked yet."""

    def __init__(
        self, relay: TransferWorld, clock: MockClock, alice: Person, places: list[tuple[str, FakeAgent]]
    ) -> None:
        self.relay, self.clock, self.alice = relay, clock, alice
        (self.a, self.source), (self.b, self.destination) = places

    async def person(self, name: str) -> Person:
        """Somebody else; people are made in threads, for which the clock has to wait."""
        self.clock.autojump_threshold = math.inf
        person = await self.relay.person(name)
        self.clock.autojump_threshold = 0
        return person

    async def sign_in_again(self) -> None:
        """Alice gets new tokens."""
        self.clock.autojump_threshold = math.inf
        client_id, _ = await self.relay.base.client("another program")
        self.relay.base.clock.now = self.relay.services.clock()
        self.alice.headers = await self.relay.base.bearer(self.alice.id, client_id)
        self.clock.autojump_threshold = 0

    def up(self) -> None:
        self.relay.registry.up(self.source)
        self.relay.registry.up(self.destination)

    async def task(self, **more: Any) -> str:
        task_id = await self.relay.transfer(self.alice, self.a, self.b, **more)
        await trio.sleep(MOMENT)
        return task_id

    async def show(self, task_id: str) -> dict[str, Any]:
        return await self.alice.get(f"/task/{task_id}")

    async def codes(self, task_id: str) -> list[str]:
        events = await self.alice.get(f"/task/{task_id}/event_list", limit="1000")
        return [event["code"] for event in events["DATA"]][::-1]

    async def row(self, task_id: str) -> Any:
        return await self.relay.store.read(
            lambda connection: connection.execute(select(tables.tasks).where(tables.tasks.c.id == task_id)).one()
        )

    async def position(self, agent: FakeAgent) -> int:
        node = tables.nodes.c
        return await self.relay.store.read(
            lambda connection: int(
                connection.execute(select(node.last_event).where(node.id == agent.node_id)).scalar_one()
            )
        )


@asynccontextmanager
async def open_scene(world: Any, clock: MockClock, *, run: bool = True) -> AsyncIterator[Scene]:
    """The scene, with its steward at work or (``run`` false) not."""
    started = trio.current_time()
    store = CountingStore(world.settings.database_url)

    def now() -> float:
        return START + trio.current_time() - started

    async with open_world(world, store=store, clock=now, run=run) as relay:
        alice = await relay.person("alice")
        places = [await relay.collection(alice, name) for name in ("A", "B")]
        clock.autojump_threshold = 0
        yield Scene(relay, clock, alice, places)
    store.close()
