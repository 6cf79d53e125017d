"""Hours of a relay and two agents in virtual time, with seeded faults: whatever happens, all agree in the end.

Links break and come back, event streams are cut, answers are lost, the relay is started again or restored from a
backup, tasks are submitted and cancelled, and the agents go on with what they were given whether or not anybody hears
of it.
Then everything heals, and: every task that an agent was given is known and over, with the agent's own word for its end;
each event it told is there once, in its order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest
import trio
from sqlalchemy import Connection, select, update
from trio.testing import MockClock

from protocol.control import FINAL_STATES, Counters
from protocol.errors import RetryLater
from protocol.ticket import TicketVerifier
from relay.store import transfer_tables as tables
from relay.store.metadata import metadata
from relay.transfer.duties import CANCEL_GRACE
from relay.transfer.steward import Steward
from tests.relay.fake_agents import FakeAgent, lost_answer, once
from tests.relay.steward_scene import Scene, open_scene
from tests.slices import chosen_seeds

SEEDS = [range(10), range(10, 20)]
MANY_SEEDS = [range(first, first + 15) for first in chosen_seeds(range(1000, 4000))[::15]]
HOUR = 3600.0
# What a fault of the link hits.
CALLS = ("PUT /link/tasks/", "PUT /link/sessions/", "DELETE /link/sessions/", "GET /link/task", "POST /link/events/ack")

Dump = dict[str, list[dict[str, Any]]]


@pytest.fixture
async def scene(world: Any, clock: MockClock) -> AsyncIterator[Scene]:
    async with open_scene(world, clock, run=False) as opened:
        yield opened


class Relay:
    """The relay's process: its steward may be started again, and its database be taken back."""

    def __init__(self, scene: Scene, nursery: trio.Nursery) -> None:
        self.scene = scene
        self._nursery = nursery
        self._scope = trio.CancelScope()
        services = scene.relay.services
        self._verifier = TicketVerifier(services.keys.relay_id, services.keys.root_public_pem)
        self.steward: Steward | None = None
        # Whoever wakes the steward wakes the one there is now.
        services.steward.wake = lambda task_id: self.steward.wake(task_id) if self.steward else None  # type: ignore
        services.steward.cut = lambda task_id: self.steward.cut(task_id) if self.steward else None  # type: ignore

    async def start(self) -> None:
        services = self.scene.relay.services
        registry = self.scene.relay.registry
        self.steward = Steward(
            services.store, registry, services.signer, services.settings, services.clock, verifier=self._verifier
        )
        self._scope = trio.CancelScope()

        async def run(steward: Steward, *, task_status: trio.TaskStatus[None]) -> None:
            with self._scope:
                await steward.run(task_status=task_status)

        await self._nursery.start(run, self.steward)

    def stop(self) -> None:
        for agent in (self.scene.source, self.scene.destination):
            self.scene.relay.registry.down(agent)
        self._scope.cancel()
        self.steward = None


async def dump_of(scene: Scene) -> Dump:
    """What a backup of now would hold of tasks and agents."""
    return await scene.relay.store.read(
        lambda connection: {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in [*_tables(), tables.nodes]
        }
    )


async def restore(scene: Scene, dump: Dump) -> None:
    def put(connection: Connection) -> None:
        for table in reversed(_tables()):
            connection.execute(table.delete())
        for table in _tables():
            if dump[table.name]:
                connection.execute(table.insert(), dump[table.name])
        for row in dump[tables.nodes.name]:
            connection.execute(
                update(tables.nodes)
                .where(tables.nodes.c.id == row["id"])
                .values(last_event=row["last_event"], journal=row["journal"])
            )

    await scene.relay.store.write(put)


def _tables() -> list[Any]:
    """What a relay remembers of tasks and agents; people and collections do not change here."""
    wanted = {tables.tasks.name, tables.task_items.name, tables.task_events.name}
    return [table for table in metadata.sorted_tables if table.name in wanted]


async def work(agent: FakeAgent, random: Random) -> None:
    """What a destination does with its tasks, heard or not."""
    stages: Counter[str] = Counter()
    while True:
        await trio.sleep(random.uniform(1, 40))
        for task_id, known in list(agent.tasks.items()):
            if known.state in FINAL_STATES or random.random() < 0.3:
                continue
            if agent.orders[task_id][-1].desired == "cancel":
                agent.observe(task_id, "CANCELED")
                continue
            stage = stages[task_id]
            stages[task_id] += 1
            if stage == 0:
                agent.say("event", task_id, code="STARTED")
                agent.observe(task_id, "ACTIVE", status_code="OK")
            elif stage < 6:
                agent.say("event", task_id, code=f"STEP{stage}")
                agent.observe(task_id, "ACTIVE", durable=False, counters=Counters(files_transferred=stage))
            else:
                agent.succeed(task_id, files=stage, files_transferred=stage)


async def disturb(scene: Scene, relay: Relay, random: Random, seen: Counter[str]) -> None:
    """An hour or so in which much goes wrong."""
    registry = scene.relay.registry
    dump: Dump | None = None
    for _ in range(random.randint(10, 40)):
        await trio.sleep(random.expovariate(1 / 60))
        agent = random.choice((scene.source, scene.destination))
        what = random.choice(
            ("submit", "submit", "cancel", "down", "up", "up", "cut", "lost", "refused", "restart", "backup", "restore")
        )
        seen[what] += 1
        if what == "submit":
            await scene.relay.transfer(scene.alice, scene.a, scene.b)
        elif what == "cancel":
            tasks = (await scene.alice.get("/task_list", limit="100"))["DATA"]
            if tasks:
                await scene.alice.post(f"/task/{random.choice(tasks)['task_id']}/cancel")
        elif what == "down":
            registry.down(agent)
        elif what == "up":
            if agent.node_id not in registry.agents and relay.steward is not None:
                agent.boot_id = random.choice((agent.boot_id, f"boot-{random.random()}"))
                registry.up(agent)
        elif what == "cut":
            registry.cut_streams(agent)
        elif what == "lost":
            agent.forget = once(lost_answer(), random.choice(CALLS))
        elif what == "refused":
            agent.refuse = once(RetryLater("Busy for a moment.", code="BUSY"), random.choice(CALLS))
        elif what == "backup":
            dump = await dump_of(scene)
        else:
            relay.stop()
            await trio.sleep(random.uniform(0, 700))
            if what == "restore" and dump is not None:
                await restore(scene, dump)
            await relay.start()


async def simulate(scene: Scene, seed: int) -> Counter[str]:
    random = Random(seed)
    seen: Counter[str] = Counter()
    async with trio.open_nursery() as nursery:
        relay = Relay(scene, nursery)
        await relay.start()
        scene.up()
        nursery.start_soon(work, scene.destination, random)
        await disturb(scene, relay, random, seen)
        for agent in (scene.source, scene.destination):
            agent.refuse = agent.forget = None
            if agent.node_id not in scene.relay.registry.agents:
                scene.relay.registry.up(agent)
        await trio.sleep(HOUR / 2 + CANCEL_GRACE)
        await agree(scene, seed)
        seen["tasks"] = len(scene.destination.orders)
        relay.stop()
        nursery.cancel_scope.cancel()
    return seen


async def agree(scene: Scene, seed: int) -> None:
    """What must be true when everything has healed."""
    agent = scene.destination
    listed = await scene.relay.store.read(
        lambda connection: {row.id: row for row in connection.execute(select(tables.tasks))}
    )
    for task_id, row in listed.items():
        assert row.status in ("SUCCEEDED", "FAILED"), f"seed {seed}: {task_id} is still {row.status} ({row.state})"
    for task_id, observed in agent.tasks.items():
        what = f"seed {seed}: {task_id}, {observed.state}"
        assert task_id in listed, f"{what}: the relay does not know it"
        assert observed.state in FINAL_STATES, what
        if listed[task_id].state == "CANCELED":
            # The relay may have ended it alone (nobody confirmed in time, or no order had left before the backup that
            # it was restored from), and the agent have been through by then.
            assert observed.state in ("CANCELED", "SUCCEEDED"), what
        else:
            assert listed[task_id].state == observed.state, f"{what}: {listed[task_id].state}"
        told = [line.code for line in agent.lines if line.task_id == task_id and line.kind == "event"]
        codes = await scene.codes(task_id)
        assert [code for code in codes if code.startswith("STEP")] == told[1:], f"{what}: {codes}, not {told}"
        assert codes.count("STARTED") == min(1, len(told)), what


async def run(scene: Scene, seeds: range) -> Counter[str]:
    """One history after the other in one database: all begin anew each time."""
    total: Counter[str] = Counter()
    empty = await dump_of(scene)
    for seed in seeds:
        total += await simulate(scene, seed)
        for agent in (scene.source, scene.destination):
            for kept in (agent.tasks, agent.orders, agent.closed, agent.lines):
                kept.clear()
            agent.seq = 0
        await restore(scene, empty)
    return total


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
async def test_all_agree_after_whatever_happened(clock: MockClock, scene: Scene, seeds: range) -> None:
    total = await run(scene, seeds)
    print(f"seeds: {len(seeds)}, {dict(total)}")


@pytest.mark.soak
@pytest.mark.parametrize("seeds", MANY_SEEDS, ids=str)
async def test_all_agree_thousands_of_times(clock: MockClock, scene: Scene, seeds: range) -> None:
    total = await run(scene, seeds)
    print(f"seeds: {len(seeds)}, {dict(total)}")
