"""Two linked machines of one person, between which tasks run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.relay.fake_agents import FakeAgent
from tests.relay.transfer_world import (
    Person,
    TransferWorld,
    open_world,
    until,
)


class Pair:
    """Alice with two machines, both linked."""

    def __init__(self, relay: TransferWorld, alice: Person, a: str, b: str, source: FakeAgent, dest: FakeAgent) -> None:
        self.relay, self.alice, self.a, self.b, self.source, self.destination = relay, alice, a, b, source, dest

    async def running(self, **more: Any) -> str:
        task_id = await self.relay.transfer(self.alice, self.a, self.b, **more)
        await until(lambda: task_id in self.destination.tasks)
        return task_id

    async def finished(self, task_id: str) -> dict[str, Any]:
        await self.relay.steward.wait_finished(task_id, 5)
        return await self.alice.get(f"/task/{task_id}")


@pytest.fixture
async def pair(world: Any) -> AsyncIterator[Pair]:
    async with open_world(world) as relay:
        alice = await relay.person("alice")
        a, source = await relay.collection(alice, "A")
        b, destination = await relay.collection(alice, "B")
        relay.registry.up(source)
        relay.registry.up(destination)
        yield Pair(relay, alice, a, b, source, destination)
