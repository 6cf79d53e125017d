"""Orders of one task that arrive while another of the same task is still being written down."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from agent.transfer.tasks.running_task import RunningTask
from protocol.control import TaskItem, TaskObserved, TaskOrder
from tests.agent.engine_world import World

pytestmark = pytest.mark.usefixtures("workers_forked")


@pytest.mark.parametrize("second", ["the same once more", "a newer one"])
async def test_orders_that_overtake_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    """The relay heard nothing and says it again, or the task was cancelled a moment after it was submitted: one task,
    and the newest order, in memory and on disk."""
    made: list[RunningTask] = []
    fresh = RunningTask.fresh

    def noting(*arguments: object) -> RunningTask:
        made.append(fresh(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(RunningTask, "fresh", noting)
    async with trio.open_nursery() as nursery:
        world = World(tmp_path, nursery)
        await world.start(world.beta)
        service = world.beta.service
        assert service is not None
        store, slow = service._node.store, threading.Event()
        put_order, calls = store.put_order, 0

        def slowly(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                # Until the other one is through, or has to wait for this.
                slow.wait(0.5)
            put_order(*arguments)  # type: ignore[arg-type]
            slow.set()

        monkeypatch.setattr(store, "put_order", slowly)
        task = "11111111-2222-4333-8444-555555555555"
        first = world.order(task, task, [TaskItem(source_path="/file", destination_path="/file")])
        newer = first if second == "the same once more" else msgspec.structs.replace(first, revision=2, desired="pause")
        answers: list[TaskObserved] = []

        async def put(order: TaskOrder) -> None:
            answers.append(await service.put_task(order))

        async with trio.open_nursery() as orders:
            orders.start_soon(put, first)
            await trio.testing.wait_all_tasks_blocked()
            orders.start_soon(put, newer)
        assert len(answers) == 2
        assert len(made) == 1
        assert service.order(task).revision == newer.revision
        assert service.order(task).desired == newer.desired
        (stored,) = store.load()
        assert (stored.order.revision, stored.order.desired) == (newer.revision, newer.desired)
        nursery.cancel_scope.cancel()
