"""Ten minutes without a relay, in virtual time: what an agent tells meanwhile is there in full and in order afterwards.

On one side the agent's real store of event lines and its real readers, on the other the relay's real steward and
database; the link between them breaks and comes back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.transfer.tasks import outbox
from agent.transfer.tasks.outbox import Outbox
from agent.transfer.tasks.task_store import TaskStore
from protocol.control import AgentEvent, Counters, TaskObserved, encode
from relay.times import iso
from tests.relay.steward_scene import MOMENT, Scene

OUTAGE = 600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TaskStore]:
    made = TaskStore(tmp_path / "tasks.sqlite")
    yield made
    made.close()


async def _at_once(function: Any, *arguments: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*arguments)


class Teller:
    """The destination of a scene, whose event lines are kept and read as a real agent does."""

    def __init__(self, scene: Scene, store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scene, self.store, self.outbox = scene, store, Outbox(store)
        self.asked_after: list[int] = []
        registry, agent = scene.relay.registry, scene.destination
        others = registry.stream

        @asynccontextmanager
        async def stream(
            node_id: str, path: str, *, query: Sequence[tuple[str, str]] = (), timeout: float = 30.0
        ) -> AsyncIterator[AsyncIterator[bytes]]:
            if node_id != agent.node_id:
                async with others(node_id, path, query=query, timeout=timeout) as chunks:
                    yield chunks
                return
            after = int(dict(query)["after"])
            self.asked_after.append(after)
            async with self.outbox.read(after) as lines:
                yield _encoded(lines)

        monkeypatch.setattr(registry, "stream", stream)
        # In virtual time nothing may wait for a thread.
        threadless = SimpleNamespace(**vars(trio) | {"to_thread": SimpleNamespace(run_sync=_at_once)})
        monkeypatch.setattr(outbox, "trio", threadless)

    def link(self, *, up: bool) -> None:
        registry, agent = self.scene.relay.registry, self.scene.destination
        if up:
            # All that the fake's greeting takes from its own lines is the last number.
            agent.lines = [AgentEvent(n=self.store.last_event(), kind="event", time="")]
            registry.up(agent)
        else:
            registry.down(agent)

    def tell(self, task_id: str, kind: str, **values: Any) -> None:
        now = iso(self.scene.relay.services.clock())
        self.store.add_event(AgentEvent(n=0, kind=kind, time=now or "", task_id=task_id, **values))
        self.outbox.durable()

    def progress(self, task_id: str, count: int) -> None:
        observed = TaskObserved(task_id=task_id, revision=1, state="ACTIVE", counters=Counters(files_transferred=count))
        self.outbox.passing(AgentEvent(n=0, kind="progress", time="", task_id=task_id, observed=observed))


async def _encoded(lines: AsyncIterator[AgentEvent]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield encode(line) + b"\n"


def state(task_id: str, name: Any, count: int) -> TaskObserved:
    return TaskObserved(task_id=task_id, revision=1, state=name, counters=Counters(files_transferred=count))


@pytest.mark.parametrize("seed", range(2))
async def test_ten_minutes_without_a_relay_cost_no_event(
    clock: MockClock, scene: Scene, store: TaskStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    teller = Teller(scene, store, monkeypatch)
    scene.relay.registry.up(scene.source)
    teller.link(up=True)
    task_id = await scene.task()
    told = ["STARTED"]
    teller.tell(task_id, "event", code="STARTED")
    teller.tell(task_id, "state", observed=state(task_id, "ACTIVE", 0))
    await trio.sleep(MOMENT)
    teller.link(up=False)
    for second in range(OUTAGE):
        await trio.sleep(1)
        teller.progress(task_id, second)
        for _ in range(random.choice((0, 0, 1, 2))):
            told.append(f"E{len(told)}")
            teller.tell(task_id, "event", code=told[-1], is_error=bool(random.getrandbits(1)))
    # Back, and away again in the middle of what there is to tell.
    for _ in range(3):
        teller.link(up=True)
        await trio.sleep(random.choice((0, 0, 0.001)))
        teller.link(up=False)
        await trio.sleep(random.uniform(0, 5))
    teller.link(up=True)
    told.append("LAST")
    teller.tell(task_id, "event", code="LAST")
    teller.tell(task_id, "state", observed=state(task_id, "SUCCEEDED", OUTAGE))
    await trio.sleep(90)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["files_transferred"]) == ("SUCCEEDED", OUTAGE)
    codes = [code for code in await scene.codes(task_id) if code != "GC_NOT_CONNECTED"]
    assert codes == [*told, "SUCCEEDED"]
    assert await scene.position(scene.destination) == store.last_event()
    print(f"seed {seed}: {len(told)} events of ten minutes without a relay, asked for after {teller.asked_after}")
