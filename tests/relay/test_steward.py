"""The steward's stories, one: agents that are away, answers and streams that are lost, relays that die."""

from __future__ import annotations

from typing import Any

import trio
from sqlalchemy import Connection, update
from trio.testing import MockClock

from protocol.control import Counters, Flow, LaneFlow, TaskObserved
from protocol.errors import ItemFailed, RetryLater
from relay.store import transfer_tables as tables
from relay.transfer.duties import CANCEL_GRACE
from relay.transfer.steward import Steward
from tests.relay.fake_agents import lost_answer, once
from tests.relay.steward_scene import MOMENT, Scene

# --- away, and back ----------------------------------------------------------------------------------------------


async def test_a_destination_that_is_offline_at_submission(clock: MockClock, scene: Scene) -> None:
    scene.relay.registry.up(scene.source)
    task_id = await scene.task()
    shown = await scene.show(task_id)
    assert (shown["status"], shown["nice_status"]) == ("ACTIVE", "GC_NOT_CONNECTED")
    await trio.sleep(7200)
    assert await scene.codes(task_id) == ["GC_NOT_CONNECTED"]
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    (order,) = scene.destination.orders[task_id]
    assert (order.desired, order.revision, order.session is not None) == ("run", 1, True)
    assert order.items is not None
    assert order.items[0].source_path == "/data/"
    assert order.source is not None
    assert order.source.certificate == scene.source.key.certificate_pem
    assert (await scene.show(task_id))["nice_status"] == "Queued"
    scene.destination.succeed(task_id, files=1, files_transferred=1)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["status"] == "SUCCEEDED"
    assert await scene.codes(task_id) == ["GC_NOT_CONNECTED", "SUCCEEDED"]


async def test_a_source_that_is_offline_is_offered_when_it_comes(clock: MockClock, scene: Scene) -> None:
    scene.relay.registry.up(scene.destination)
    task_id = await scene.task()
    (order,) = scene.destination.orders[task_id]
    assert order.session is None
    shown = await scene.show(task_id)
    assert (shown["nice_status"], shown["towpath"]["who"]) == ("GC_NOT_CONNECTED", "source owner")
    assert "“A”" in shown["nice_status_details"]
    assert await scene.codes(task_id) == ["GC_NOT_CONNECTED"]
    scene.relay.registry.up(scene.source)
    await trio.sleep(MOMENT)
    (answer,) = scene.destination.session_answers[task_id]
    assert answer.session_id == order.session_id
    assert answer.certificate == scene.source.key.certificate_pem
    # By which the destination knows a source that was started again.
    assert answer.instance == "this start"
    assert (await scene.show(task_id))["nice_status"] == "Queued"


async def test_the_speed_that_an_agent_told_holds_no_more_while_it_is_away(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    flow = Flow(goodput=5e7, limited_by="network", lanes=[LaneFlow(lane=1, goodput=5e7)])
    told: dict[str, Any] = {
        "counters": Counters(files=2),
        "flow": flow,
        "rate": 5e7,
        "current": "/data/a",
        "path": "direct tcp",
    }
    scene.destination.observe(task_id, "ACTIVE", **told)
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    assert (shown["towpath"]["rate"], shown["towpath"]["current"]) == (5e7, "/data/a")
    assert shown["towpath"]["flow"]["goodput"] == 5e7
    scene.relay.registry.down(scene.destination)
    shown = await scene.show(task_id)
    assert (shown["nice_status"], shown["files"]) == ("GC_NOT_CONNECTED", 2)
    assert (shown["towpath"]["flow"], shown["towpath"]["rate"], shown["towpath"]["current"]) == (None, 0, "")
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["towpath"]["flow"]["goodput"] == 5e7


async def test_cancelled_while_offline_before_the_agent_ever_heard_of_it(clock: MockClock, scene: Scene) -> None:
    scene.relay.registry.up(scene.source)
    task_id = await scene.task()
    assert (await scene.alice.post(f"/task/{task_id}/cancel"))["code"] == "Canceled"
    scene.relay.registry.up(scene.destination)
    await trio.sleep(100)
    assert scene.destination.orders == {}
    assert scene.source.sessions == {}
    assert (await scene.show(task_id))["fatal_error"]["code"] == "CANCELED"


async def test_cancelled_while_offline_is_the_first_thing_the_agent_hears(clock: MockClock, scene: Scene) -> None:
    scene.up()
    first, second = await scene.task(), await scene.task()
    scene.destination.observe(first, "ACTIVE")
    await trio.sleep(MOMENT)
    scene.relay.registry.down(scene.destination)
    assert (await scene.alice.post(f"/task/{first}/cancel"))["code"] == "CancelAccepted"
    third = await scene.task()
    assert (await scene.show(first))["status"] == "ACTIVE"
    del scene.destination.calls[:]
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    assert scene.destination.calls[0] == ("PUT", f"/link/tasks/{first}")
    assert scene.destination.orders[first][-1].desired == "cancel"
    assert scene.destination.orders[third][-1].desired == "run"
    assert len(scene.destination.orders[second]) == 1
    scene.destination.observe(first, "CANCELED")
    await trio.sleep(MOMENT)
    shown = await scene.show(first)
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "CANCELED")
    assert (await scene.codes(first)).count("CANCELED") == 1
    assert scene.source.withdrawn == [scene.destination.orders[first][0].session_id]


async def test_a_cancel_that_nobody_confirms_ends_after_a_grace_and_is_still_delivered(
    clock: MockClock, scene: Scene
) -> None:
    scene.up()
    task_id = await scene.task()
    scene.relay.registry.down(scene.destination)
    await scene.alice.post(f"/task/{task_id}/cancel")
    await trio.sleep(CANCEL_GRACE - 60)
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    await trio.sleep(120)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "CANCELED")
    assert "not confirmed" in shown["fatal_error"]["description"]
    # The source stops serving at once, and the agent is told when it comes.
    assert scene.source.withdrawn == [scene.destination.orders[task_id][0].session_id]
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][-1].desired == "cancel"


async def test_an_agent_that_lost_its_state_has_nothing_to_stop(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.relay.registry.down(scene.destination)
    await scene.alice.post(f"/task/{task_id}/cancel")
    scene.destination.refuse = once(ItemFailed("not known", code="NOT_FOUND"), f"PUT /link/tasks/{task_id}")
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["fatal_error"]["code"] == "CANCELED"


async def test_absence_is_noted_when_it_lasts_and_only_then(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    for pause in (1, 1, 1, 100, 100):
        scene.relay.registry.down(scene.destination)
        await trio.sleep(pause)
        scene.relay.registry.up(scene.destination)
        await trio.sleep(60)
    assert await scene.codes(task_id) == ["GC_NOT_CONNECTED"] * 2


# --- answers and streams that are lost -----------------------------------------------------------------------------


async def test_an_order_whose_answer_is_lost_is_repeated_and_means_the_same(clock: MockClock, scene: Scene) -> None:
    scene.destination.forget = once(lost_answer(), "PUT /link/tasks/")
    scene.up()
    task_id = await scene.task()
    await trio.sleep(10)
    first, second = scene.destination.orders[task_id]
    assert (first.revision, second.revision) == (1, 1)
    assert first.items == second.items
    assert first.items is not None
    row = await scene.row(task_id)
    assert (row.delivered, row.attempted) == (1, True)


async def test_repeated_events_change_nothing(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    agent = scene.destination
    agent.observe(task_id, "ACTIVE", counters=Counters(files=10, files_transferred=1))
    agent.say("event", task_id, code="CONNECT_FAILED", description="x", is_error=True)
    agent.observe(task_id, "ACTIVE", counters=Counters(files=10, files_transferred=5))
    await trio.sleep(MOMENT)
    # The agent's numbers fell behind ours (its state came from a backup): all it keeps is read again.
    kept = list(agent.lines)
    for boot in ("boot-2", "boot-3"):
        scene.relay.registry.down(agent)
        agent.boot_id = boot
        agent.lines = kept[:1]
        scene.relay.registry.up(agent)
        agent.lines = list(kept)
        await trio.sleep(MOMENT)
    assert agent.asked_after == [0, 0, 0]
    shown = await scene.show(task_id)
    assert (shown["files_transferred"], shown["status"]) == (5, "ACTIVE")
    assert await scene.codes(task_id) == ["STARTED", "CONNECT_FAILED"]
    agent.succeed(task_id, files=10, files_transferred=10)
    await trio.sleep(MOMENT)
    completed = (await scene.show(task_id))["completion_time"]
    scene.relay.registry.down(agent)
    kept, agent.lines = agent.lines, kept[:1]
    scene.relay.registry.up(agent)
    agent.lines = kept
    await trio.sleep(MOMENT)
    assert agent.asked_after == [0, 0, 0, 0]
    shown = await scene.show(task_id)
    assert (shown["status"], shown["completion_time"]) == ("SUCCEEDED", completed)
    assert await scene.codes(task_id) == ["STARTED", "CONNECT_FAILED", "SUCCEEDED"]


async def test_a_task_whose_order_is_answered_when_it_runs_already_has_started(clock: MockClock, scene: Scene) -> None:
    agent = scene.destination
    agent.begins = "ACTIVE"
    scene.up()
    task_id = await scene.task()
    await trio.sleep(MOMENT)
    assert await scene.codes(task_id) == ["STARTED"]
    agent.observe(task_id, "ACTIVE")
    agent.succeed(task_id)
    await trio.sleep(MOMENT)
    assert await scene.codes(task_id) == ["STARTED", "SUCCEEDED"]


async def test_events_stay_in_order_when_the_clock_of_their_agent_is_set_back(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    await trio.sleep(3600)
    agent = scene.destination
    agent.observe(task_id, "ACTIVE")
    agent.say("event", task_id, code="CONNECT_FAILED", description="x", time="2027-01-15T08:40:00+00:00")
    agent.say("event", task_id, code="PROGRESS", description="x", time="2027-01-14T08:41:00+00:00")
    agent.observe(
        task_id, "SUCCEEDED", counters=Counters(scan_complete=True), completion_time="2027-01-14T08:42:00+00:00"
    )
    await trio.sleep(MOMENT)
    assert await scene.codes(task_id) == ["STARTED", "CONNECT_FAILED", "PROGRESS", "SUCCEEDED"]
    assert (await scene.show(task_id))["completion_time"].startswith("2027-01-15T08:40:00")


async def test_a_lost_event_stream_is_opened_again_where_it_ended(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    agent = scene.destination
    agent.say("event", task_id, code="ONE")
    await trio.sleep(MOMENT)
    scene.relay.registry.cut_streams(agent)
    agent.say("event", task_id, code="TWO")
    await trio.sleep(10)
    agent.say("event", task_id, code="THREE")
    await trio.sleep(MOMENT)
    assert agent.asked_after == [0, 1]
    assert await scene.codes(task_id) == ["ONE", "TWO", "THREE"]
    assert agent.acknowledged[-1] == 3


async def test_an_agent_that_lost_its_state_gets_its_running_tasks_again(clock: MockClock, scene: Scene) -> None:
    scene.up()
    lost, kept = await scene.task(), await scene.task()
    agent = scene.destination
    agent.observe(lost, "ACTIVE")
    agent.say("event", lost, code="BEFORE")
    await trio.sleep(MOMENT)
    scene.relay.registry.down(agent)
    # It ended while away, and the line that said so never came.
    agent.tasks[kept] = TaskObserved(task_id=kept, revision=1, state="SUCCEEDED", counters=Counters(files=2))
    del agent.tasks[lost]
    agent.lines.clear()
    agent.boot_id = "boot-2"
    scene.relay.registry.up(agent)
    await trio.sleep(MOMENT)
    assert len(agent.orders[lost]) == 2
    assert agent.orders[lost][1].items == agent.orders[lost][0].items
    assert len(agent.orders[kept]) == 1
    shown = await scene.show(kept)
    assert (shown["status"], shown["files"]) == ("SUCCEEDED", 2)
    agent.seq = 0
    agent.say("event", lost, code="AGAIN")
    agent.succeed(lost)
    await trio.sleep(MOMENT)
    assert await scene.codes(lost) == ["STARTED", "BEFORE", "AGAIN", "SUCCEEDED"]


async def test_a_task_that_ended_while_its_agent_was_away_ends_after_all_that_was_told_before(
    clock: MockClock, scene: Scene
) -> None:
    scene.up()
    task_id = await scene.task()
    agent = scene.destination
    await trio.sleep(MOMENT)
    scene.relay.registry.down(agent)
    agent.boot_id = "boot-2"
    agent.observe(task_id, "ACTIVE")
    agent.say("event", task_id, code="WORKER_DIED", is_error=True)
    agent.succeed(task_id, files=2)
    # The lines take a while; how the task stands could be known at once.
    scene.relay.registry.hold_streams = 5.0
    scene.relay.registry.up(agent)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    assert await scene.codes(task_id) == []
    await trio.sleep(10)
    assert (await scene.show(task_id))["status"] == "SUCCEEDED"
    assert await scene.codes(task_id) == ["STARTED", "WORKER_DIED", "SUCCEEDED"]


async def test_a_relay_that_died_between_storing_and_acknowledging(clock: MockClock, scene: Scene, world: Any) -> None:
    scene.up()
    task_id = await scene.task()
    agent = scene.destination
    agent.refuse = once(RetryLater("died"), "POST /link/events/acknowledge")
    agent.say("event", task_id, code="ONE")
    await trio.sleep(0.2)
    assert await scene.position(agent) == 1
    assert agent.acknowledged == []
    services = scene.relay.services
    successor = Steward(services.store, scene.relay.registry, services.signer, services.settings, services.clock)
    agent.asked_after.clear()
    async with trio.open_nursery() as nursery:
        await nursery.start(successor.run)
        await trio.sleep(0.2)
        assert agent.asked_after[0] == 1
        assert agent.acknowledged[0] == 1
        assert await scene.codes(task_id) == ["ONE"]
        nursery.cancel_scope.cancel()


async def test_a_relay_that_dies_after_it_accepted_a_task_delivers_it_when_it_is_back(
    clock: MockClock, scene: Scene
) -> None:
    # No wake-up reaches the steward, as if the process had ended right after the answer.
    scene.relay.services.steward.wake = lambda task_id: None  # type: ignore[method-assign]
    task_id = await scene.task()
    services = scene.relay.services
    successor = Steward(services.store, scene.relay.registry, services.signer, services.settings, services.clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(successor.run)
        scene.up()
        await trio.sleep(MOMENT)
        assert len(scene.destination.orders[task_id]) == 1
        nursery.cancel_scope.cancel()


async def test_nonsense_on_an_event_stream_costs_that_agent_its_stream_and_nobody_else(
    clock: MockClock, scene: Scene
) -> None:
    scene.up()
    task_id = await scene.task()
    for nonsense in (b"{}\n", b"nonsense\n", b'{"n": -1, "kind": "event", "time": ""}\n', b"x" * 2_000_000):
        scene.source.send(nonsense)
        await trio.sleep(120)
    assert len(scene.source.asked_after) == 5
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["status"] == "SUCCEEDED"


async def test_a_database_restored_from_a_backup_catches_up(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task(label="old")
    agent = scene.destination
    for label in ("new", "newer"):
        await scene.alice.put(f"/task/{task_id}", {"label": label})
        await trio.sleep(MOMENT)
    agent.say("event", task_id, code="ONE")
    agent.succeed(task_id, files=7, files_transferred=7)
    await trio.sleep(MOMENT)
    assert agent.tasks[task_id].revision == 3

    def restore(connection: Connection) -> None:
        backup = {
            "status": "ACTIVE",
            "state": "QUEUED",
            "observed": None,
            "completed": None,
            "revision": 1,
            "delivered": 0,
            "attempted": False,
            "session_open": False,
            "last_seq": 0,
            "label": "old",
        }
        connection.execute(update(tables.tasks).where(tables.tasks.c.id == task_id).values(**backup))
        connection.execute(tables.task_events.delete())
        connection.execute(update(tables.nodes).values(last_event=0, journal=""))

    await scene.relay.store.write(restore)
    scene.relay.registry.down(agent)
    scene.relay.registry.up(agent)
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["files_transferred"]) == ("SUCCEEDED", 7)
    assert {"ONE", "SUCCEEDED"} <= set(await scene.codes(task_id))


async def test_a_restored_database_overtakes_the_revision_an_agent_has_seen(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    for label in ("new", "newer"):
        await scene.alice.put(f"/task/{task_id}", {"label": label})
        await trio.sleep(MOMENT)
    backup = {"revision": 1, "delivered": 0, "label": "old"}
    await scene.relay.store.write(lambda connection: connection.execute(update(tables.tasks).values(**backup)) and None)
    scene.relay.steward.wake(task_id)
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][-1].revision == 4
    assert scene.destination.orders[task_id][-1].label == "old"
    row = await scene.row(task_id)
    assert row.revision == row.delivered == 4
