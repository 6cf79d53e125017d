"""Cancelling tasks that no worker has begun: at once, in the daemon, whoever has the workers' places."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from agent.transfer.tasks.running_task import RunningTask
from agent.transfer.tasks.service import TransferService
from protocol.control import TaskItem, TaskOrder
from tests.agent.engine_world import World

pytestmark = pytest.mark.usefixtures("workers_forked")


@asynccontextmanager
async def queue(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[World, list[str]]]:
    """A destination that starts no task, and the tasks for which a worker was wanted."""
    started: list[str] = []

    async def note(task: RunningTask) -> None:
        started.append(task.order.task_id)
        await trio.sleep_forever()

    monkeypatch.setattr(RunningTask, "_run_worker", note)
    async with trio.open_nursery() as nursery:
        world = World(directory, nursery)
        await world.start(world.beta)
        assert world.beta.service is not None
        await world.beta.service.suspend(suspended=True)
        yield world, started
        nursery.cancel_scope.cancel()


def order_of(world: World, *, deletes: bool = False) -> TaskOrder:
    task, session = str(uuid.uuid4()), str(uuid.uuid4())
    order = world.order(task, session, [TaskItem(source_path="/file", destination_path=f"/{task}")])
    if not deletes:
        return order
    ticket = world.ticket(task, session, None, world.beta.grant("rw", ["/"]))
    item = TaskItem(source_path=f"/{task}")
    return msgspec.structs.replace(order, type="DELETE", source=None, ticket=ticket, items=[item])


def service_of(world: World) -> TransferService:
    assert world.beta.service is not None
    return world.beta.service


async def cancel(world: World, order: TaskOrder) -> str:
    await service_of(world).put_task(order)
    observed = await service_of(world).put_task(
        msgspec.structs.replace(order, revision=2, desired="cancel", items=None)
    )
    return observed.state


async def test_a_queued_task_is_cancelled_with_the_answer_to_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are workers' places, all of which could be taken for hours."""
    async with queue(tmp_path, monkeypatch) as (world, started):
        orders = [order_of(world) for _ in range(20)]
        for order in orders:
            assert await cancel(world, order) == "CANCELED"
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert started == []
        # It is kept with the state, and told once.
        stored = {row.order.task_id: row.observed for row in service_of(world)._node.store.load()}
        assert {stored[order.task_id].state for order in orders} == {"CANCELED"}
        assert all(row.completion_time for row in stored.values())
        told = [line.task_id for line in world.events if line.kind == "state"]
        assert sorted(told) == sorted(order.task_id for order in orders)


@pytest.mark.parametrize("why", ["a worker has begun it", "it deletes"])
async def test_what_may_have_begun_is_left_to_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    async with queue(tmp_path, monkeypatch) as (world, started):
        order = order_of(world, deletes=why == "it deletes")
        if why == "a worker has begun it":
            (world.beta.state / "tasks" / order.task_id).mkdir(parents=True)
            assert service_of(world)._node.directory == world.beta.state / "tasks"
        assert await cancel(world, order) == "QUEUED"
        with trio.fail_after(5):
            while not started:
                await trio.sleep(0.01)
        assert started == [order.task_id]


async def test_a_cancel_that_was_not_carried_out_before_the_daemon_ended_needs_no_worker_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with queue(tmp_path, monkeypatch) as (world, started):
        order = order_of(world)

        async def nothing(_task: RunningTask) -> None:
            return

        with monkeypatch.context() as patch:
            patch.setattr(RunningTask, "cancel_at_once", nothing)
            # Killed right after it has written the order down.
            patch.setattr(RunningTask, "runnable", False)
            assert await cancel(world, order) == "QUEUED"
        service_of(world)._node.turn_changed()
        with trio.fail_after(5):
            while service_of(world).get_task(order.task_id).state != "CANCELED":
                await trio.sleep(0.01)
        assert started == []
