"""A relay restored from a backup that is older than some tasks: it takes them over from the agents that run them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import trio
from sqlalchemy import Connection, update
from trio.testing import MockClock

from protocol.control import TaskObserved, TaskOrder
from protocol.errors import ItemFailed
from relay.store import transfer_tables as tables
from relay.transfer.steward import Steward
from tests.relay.steward_scene import MOMENT, Scene


def _forget(connection: Connection) -> None:
    """The database as it was before any task."""
    for table in (tables.task_events, tables.task_items, tables.tasks):
        connection.execute(table.delete())
    connection.execute(update(tables.nodes).values(last_event=0))


async def restored(scene: Scene) -> None:
    """The relay goes away and comes back from its backup."""
    for agent in (scene.source, scene.destination):
        scene.relay.registry.down(agent)
    await trio.sleep(MOMENT)
    await scene.relay.store.write(_forget)
    scene.up()
    await trio.sleep(MOMENT)


async def running(scene: Scene, **more: Any) -> str:
    scene.up()
    task_id = await scene.task(**more)
    scene.destination.say("event", task_id, code="STARTED")
    scene.destination.observe(task_id, "ACTIVE", status_code="OK")
    scene.destination.say("event", task_id, code="ONE")
    await trio.sleep(MOMENT)
    return task_id


async def test_a_running_task_is_taken_over_with_its_events(clock: MockClock, scene: Scene) -> None:
    task_id = await running(scene, label="mine", deadline="2027-02-15T08:00:00+00:00")
    before = await scene.show(task_id)
    await restored(scene)
    shown = await scene.show(task_id)
    same = ("label", "type", "owner_id", "source_endpoint_id", "destination_endpoint_id", "deadline", "status")
    assert {key: shown[key] for key in same} == {key: before[key] for key in same}
    assert sorted(await scene.codes(task_id)) == ["ONE", "RELAY_RESTORED", "STARTED"]
    # The source is asked again, under the ticket's session, and the task can be cancelled and ends as any other.
    assert scene.source.sessions[(await scene.row(task_id)).session_id]
    scene.destination.say("event", task_id, code="TWO")
    scene.destination.succeed(task_id, files=2, files_transferred=2)
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["files_transferred"]) == ("SUCCEEDED", 2)
    codes = await scene.codes(task_id)
    assert codes.index("ONE") < codes.index("TWO")
    assert (codes.count("STARTED"), codes.count("SUCCEEDED")) == (1, 1)


async def test_a_task_that_ended_meanwhile_is_shown_with_its_end(clock: MockClock, scene: Scene) -> None:
    task_id = await running(scene)
    scene.destination.succeed(task_id, files=7, files_transferred=7)
    await trio.sleep(MOMENT)
    await restored(scene)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["files_transferred"]) == ("SUCCEEDED", 7)


async def test_a_cancelled_task_stays_cancelled(clock: MockClock, scene: Scene) -> None:
    task_id = await running(scene)
    await scene.alice.post(f"/task/{task_id}/cancel")
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][-1].desired == "cancel"
    await restored(scene)
    row = await scene.row(task_id)
    assert (row.desired, row.status) == ("cancel", "ACTIVE")
    scene.destination.observe(task_id, "CANCELED")
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["nice_status"] in ("Canceled", "CANCELED", None)
    assert (await scene.show(task_id))["status"] == "FAILED"


async def test_what_the_owner_may_not_do_any_more_ends(clock: MockClock, scene: Scene) -> None:
    """The rules of the restored database decide, as for every task."""
    task_id = await running(scene)
    for agent in (scene.source, scene.destination):
        scene.relay.registry.down(agent)
    await trio.sleep(MOMENT)
    await scene.relay.store.write(_forget)
    collection = tables.collections.c
    nobody = str(uuid.uuid4())

    def taken_away(connection: Connection) -> None:
        connection.execute(update(tables.collections).where(collection.id == scene.a).values(owner_id=nobody))
        connection.execute(tables.roles.delete())

    await scene.relay.store.write(taken_away)
    scene.up()
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    assert shown["status"] == "FAILED"
    assert scene.destination.orders[task_id][-1].desired == "cancel"
    assert scene.source.withdrawn


async def test_a_task_cancelled_before_its_agent_came_back_is_stopped_there(clock: MockClock, scene: Scene) -> None:
    """The backup is of a moment when no order had left, so the relay cancels alone; the agent has the order all the
    same."""
    task_id = await running(scene)
    for agent in (scene.source, scene.destination):
        scene.relay.registry.down(agent)
    await trio.sleep(MOMENT)
    backup = {
        "status": "ACTIVE",
        "state": "QUEUED",
        "observed": None,
        "revision": 1,
        "delivered": 0,
        "attempted": False,
        "session_open": False,
        "last_seq": 0,
    }
    await scene.relay.store.write(lambda connection: connection.execute(update(tables.tasks).values(**backup)) and None)
    assert (await scene.alice.post(f"/task/{task_id}/cancel"))["code"] == "Canceled"
    given = len(scene.destination.orders[task_id])
    scene.up()
    await trio.sleep(MOMENT)
    assert [order.desired for order in scene.destination.orders[task_id][given:]] == ["cancel"]
    assert scene.destination.orders[task_id][-1].revision > 1


def _of_somebody_else(order: TaskOrder) -> TaskOrder:
    return msgspec.structs.replace(order, owner_id=str(uuid.uuid4()))


def _without_a_ticket(order: TaskOrder) -> TaskOrder:
    return msgspec.structs.replace(order, ticket="e30.e30.e30")


def _with_another_session(order: TaskOrder) -> TaskOrder:
    return msgspec.structs.replace(order, session_id=str(uuid.uuid4()))


def _as_a_delete(order: TaskOrder) -> TaskOrder:
    return msgspec.structs.replace(order, type="DELETE")


@pytest.mark.parametrize("forged", [_of_somebody_else, _without_a_ticket, _with_another_session, _as_a_delete])
async def test_what_an_agent_cannot_show_to_be_ours_is_stopped_and_forgotten(
    clock: MockClock, scene: Scene, forged: Callable[[TaskOrder], TaskOrder]
) -> None:
    task_id = await running(scene)
    agent = scene.destination
    agent.orders[task_id] = [forged(order) for order in agent.orders[task_id]]
    given = len(agent.orders[task_id])
    await restored(scene)
    with pytest.raises(AssertionError):
        # 404: nobody has such a task.
        await scene.show(task_id)
    assert [order.desired for order in agent.orders[task_id][given:]] == ["cancel"]
    agent.tasks[task_id] = msgspec.structs.replace(agent.tasks[task_id], state="CANCELED")
    scene.relay.registry.down(agent)
    scene.relay.registry.up(agent)
    await trio.sleep(MOMENT)
    assert agent.closed == [task_id]


async def test_an_agent_cannot_bring_back_the_task_of_another_node(clock: MockClock, scene: Scene) -> None:
    """The ticket of a task names its node: shown by the source's agent it counts for nothing."""
    task_id = await running(scene)
    scene.source.orders[task_id] = list(scene.destination.orders[task_id])
    scene.source.tasks[task_id] = TaskObserved(task_id=task_id, revision=1, state="ACTIVE")
    del scene.destination.tasks[task_id]
    await restored(scene)
    with pytest.raises(AssertionError):
        await scene.show(task_id)
    assert scene.source.orders[task_id][-1].desired == "cancel"


@pytest.mark.parametrize("older", [False, True])
async def test_an_agent_that_says_it_has_no_tasks_is_not_asked_for_them(
    clock: MockClock, scene: Scene, older: bool
) -> None:
    scene.destination.is_older = older
    scene.up()
    await trio.sleep(MOMENT)
    asked = ("GET", "/link/task-list")
    assert scene.destination.calls.count(asked) == int(older)
    await scene.task()
    scene.relay.registry.down(scene.destination)
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    assert scene.destination.calls.count(asked) == 1 + int(older)


async def test_an_older_agent_has_no_list_and_is_served_as_before(clock: MockClock, scene: Scene) -> None:
    def no_such_route(method: str, path: str) -> None:
        if (method, path) == ("GET", "/link/task-list"):
            raise ItemFailed("The agent has no such route.", code="NO_SUCH_ROUTE")

    scene.destination.refuse = scene.source.refuse = no_such_route
    task_id = await running(scene)
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["status"] == "SUCCEEDED"


@pytest.mark.parametrize(("after", "noted"), [(5.0, 0), (40.0, 1)])
async def test_a_relay_that_was_just_started_gives_agents_a_moment(
    clock: MockClock, scene: Scene, after: float, noted: int
) -> None:
    """Its restart is nothing that the users of a running task have to read about; an agent that stays away is."""
    task_id = await running(scene)
    registry, services = scene.relay.registry, scene.relay.services
    for agent in (scene.source, scene.destination):
        registry.down(agent)
    successor = Steward(services.store, registry, services.signer, services.settings, services.clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(successor.run)
        successor.wake(task_id)
        await trio.sleep(after)
        codes = await scene.codes(task_id)
        nursery.cancel_scope.cancel()
    assert codes.count("GC_NOT_CONNECTED") == noted
