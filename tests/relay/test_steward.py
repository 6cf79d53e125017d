"""The steward's stories: agents that are away, answers that are lost, relays that die, clocks that run on.

Time is virtual and the database has no threads here, so a day passes in a moment and always in the same order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest
import trio
from sqlalchemy import Connection, select, update
from trio.testing import MockClock

from protocol.control import Counters, TaskObserved
from protocol.errors import AccessDenied, ItemFailed, NeedsPerson, RetryLater
from protocol.ticket import TicketVerifier
from relay.store import transfer_tables as tables
from relay.transfer.steward import CANCEL_GRACE, Steward
from tests.relay.conftest import START
from tests.relay.fake_agents import FakeAgent, lost_answer, once
from tests.relay.transfer_world import InlineStore, Person, TransferWorld, delete_document, open_world

T = TypeVar("T")
MOMENT = 2.0


@pytest.fixture
def clock() -> MockClock:
    """Every test asks for it by name: that makes it the clock of the test's run."""
    # Not zero yet: the fixtures' own database calls run in threads, which the clock takes for idleness.
    return MockClock(autojump_threshold=0.01)


class CountingStore(InlineStore):
    """Counts transactions that write."""

    written = 0

    async def write(self, work: Callable[[Connection], T]) -> T:
        self.written += 1
        return await super().write(work)


class Scene:
    """Alice with a source and a destination; nobody is linked yet."""

    def __init__(
        self, relay: TransferWorld, clock: MockClock, alice: Person, places: list[tuple[str, FakeAgent]]
    ) -> None:
        self.relay, self.clock, self.alice = relay, clock, alice
        (self.a, self.source), (self.b, self.destination) = places

    async def person(self, name: str) -> Person:
        """Somebody else; people are made in threads, for which the clock has to wait."""
        self.clock.autojump_threshold = 0.01
        person = await self.relay.person(name)
        self.clock.autojump_threshold = 0
        return person

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


@pytest.fixture
async def scene(world: Any, clock: MockClock) -> AsyncIterator[Scene]:
    started = trio.current_time()
    store = CountingStore(world.settings.database_url)

    def now() -> float:
        return START + trio.current_time() - started

    async with open_world(world, store=store, clock=now) as relay:
        alice = await relay.person("alice")
        places = [await relay.collection(alice, name) for name in ("A", "B")]
        clock.autojump_threshold = 0
        yield Scene(relay, clock, alice, places)
    store.close()


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
    assert order.items[0].source_path == "/~/data/"
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
    assert (await scene.show(task_id))["nice_status"] == "Queued"


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


# --- sessions and tickets ------------------------------------------------------------------------------------------


async def test_a_session_that_is_wanted_is_asked_for_again(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.destination.say("session_wanted", task_id, durable=False, generation=-1)
    await trio.sleep(MOMENT)
    (answer,) = scene.destination.session_answers[task_id]
    assert answer.generation == 2
    # With the source away the wish is kept until it is back.
    scene.relay.registry.down(scene.source)
    scene.destination.say("session_wanted", task_id, durable=False, generation=2)
    await trio.sleep(300)
    assert len(scene.destination.session_answers[task_id]) == 1
    scene.relay.registry.up(scene.source)
    await trio.sleep(MOMENT)
    assert scene.destination.session_answers[task_id][-1].generation == 3


async def test_a_source_that_refuses_ends_the_task_with_its_reason(clock: MockClock, scene: Scene) -> None:
    scene.source.refuse = once(AccessDenied("The owner does not share this."), "PUT /link/sessions/")
    scene.up()
    task_id = await scene.task()
    shown = await scene.show(task_id)
    assert shown["fatal_error"] == {"code": "PERMISSION_DENIED", "description": "The owner does not share this."}
    assert scene.destination.orders.get(task_id, [])[1:] == []


async def test_a_source_that_needs_a_person_holds_the_task_up_and_says_so_once(clock: MockClock, scene: Scene) -> None:
    broken = [True]

    def refuse(method: str, path: str) -> None:
        if broken and path.startswith("/link/sessions/"):
            raise NeedsPerson("The disk is not mounted.", code="COLLECTION_UNAVAILABLE", who="source owner")

    scene.source.refuse = refuse
    scene.up()
    task_id = await scene.task()
    await trio.sleep(600)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["nice_status"]) == ("ACTIVE", "COLLECTION_UNAVAILABLE")
    assert shown["nice_status_details"] == "The disk is not mounted."
    assert shown["towpath"]["who"] == "source owner"
    assert (await scene.codes(task_id)).count("COLLECTION_UNAVAILABLE") == 1
    broken.clear()
    await trio.sleep(120)
    assert len(scene.destination.session_answers[task_id]) == 1


async def test_a_source_cannot_answer_with_the_certificate_of_another(clock: MockClock, scene: Scene) -> None:
    real = scene.source.key
    scene.source.key = scene.destination.key
    scene.up()
    task_id = await scene.task()
    await trio.sleep(100)
    assert all(order.session is None for order in scene.destination.orders[task_id])
    assert scene.destination.session_answers == {}
    scene.source.key = real
    await trio.sleep(200)
    assert len(scene.destination.session_answers[task_id]) == 1


async def test_tickets_name_this_task_these_nodes_these_paths_and_renew_at_half_their_life(
    clock: MockClock, scene: Scene
) -> None:
    scene.up()
    task_id = await scene.task()
    services = scene.relay.services
    verifier = TicketVerifier(services.keys.relay_id, services.keys.root_public_pem)
    (order,) = scene.destination.orders[task_id]
    ticket = verifier.verify_untrusted(order.ticket, services.clock())
    assert (ticket.task_id, ticket.session_id) == (task_id, order.session_id)
    assert ticket.source is not None
    assert (ticket.source.paths, ticket.source.access) == (["/~/data"], "r")
    assert (ticket.destination.paths, ticket.destination.access) == (["/~/copy"], "rw")
    assert ticket.source.fingerprint == scene.source.key.fingerprint
    assert ticket.destination.fingerprint == scene.destination.key.fingerprint
    assert ticket.destination.collection_id == scene.b
    assert ticket.expires - ticket.issued == 12 * 3600
    scene.destination.observe(task_id, "ACTIVE")
    await trio.sleep(6 * 3600 - 60)
    assert len(scene.destination.orders[task_id]) == 1
    await trio.sleep(120)
    _, renewed = scene.destination.orders[task_id]
    assert (renewed.revision, renewed.items, renewed.desired) == (2, None, "run")
    fresh = verifier.verify_untrusted(renewed.ticket, services.clock())
    assert fresh.expires - ticket.expires >= 6 * 3600
    assert len(scene.source.sessions[order.session_id]) == 2
    await trio.sleep(24 * 3600)
    assert len(scene.destination.orders[task_id]) == 6
    scene.destination.succeed(task_id)
    await trio.sleep(24 * 3600)
    assert len(scene.destination.orders[task_id]) == 6


async def test_a_delete_has_no_source_and_works_in_one_place(clock: MockClock, scene: Scene) -> None:
    scene.up()
    answer = await scene.alice.post("/delete", delete_document(scene.b), status=202)
    await trio.sleep(MOMENT)
    (order,) = scene.destination.orders[answer["task_id"]]
    assert (order.type, order.source, order.session) == ("DELETE", None, None)
    assert order.destination.collection_id == scene.b
    services = scene.relay.services
    verifier = TicketVerifier(services.keys.relay_id, services.keys.root_public_pem)
    ticket = verifier.verify_untrusted(order.ticket, services.clock())
    assert (ticket.source, ticket.destination.paths) == (None, ["/~/old"])


async def test_within_one_endpoint_the_same_agent_plays_both_parts(clock: MockClock, scene: Scene) -> None:
    c, _ = await scene.relay.collection(scene.alice, "C", agent=scene.source)
    scene.up()
    answer = await scene.relay.transfer(scene.alice, scene.a, c)
    await trio.sleep(MOMENT)
    (order,) = scene.source.orders[answer]
    assert order.session is not None
    assert order.source is not None
    assert order.source.node_id == order.destination.node_id


# --- permission, time and truth --------------------------------------------------------------------------------------


async def test_a_deadline_ends_the_task_and_stops_the_agents(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task(deadline="2027-01-15T09:00:00+00:00")
    scene.destination.observe(task_id, "ACTIVE", counters=Counters(files=4, files_transferred=1))
    await trio.sleep(3500)
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    await trio.sleep(200)
    shown = await scene.show(task_id)
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "DEADLINE_EXPIRED")
    assert shown["completion_time"] < "2027-01-15T09:00:05"
    assert (shown["subtasks_expired"], shown["subtasks_succeeded"]) == (3, 1)
    assert scene.destination.orders[task_id][-1].desired == "cancel"
    assert scene.source.withdrawn == [scene.destination.orders[task_id][0].session_id]
    scene.destination.observe(task_id, "CANCELED", counters=Counters(files=4, files_transferred=2))
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    # How it ended stays; what was done until then is told truly.
    assert (shown["fatal_error"]["code"], shown["files_transferred"]) == ("DEADLINE_EXPIRED", 2)
    assert {"DEADLINE_EXPIRED", "FAILED"} <= set(await scene.codes(task_id))


async def test_deadlines_of_tasks_that_never_left_and_changed_deadlines(clock: MockClock, scene: Scene) -> None:
    first = await scene.task(deadline="2027-01-15T08:10:00+00:00")
    second = await scene.task(deadline="2027-01-15T08:10:00+00:00")
    await scene.alice.put(f"/task/{second}", {"deadline": "2027-01-15T08:30:00+00:00"})
    await trio.sleep(1000)
    assert (await scene.show(first))["fatal_error"]["code"] == "DEADLINE_EXPIRED"
    assert (await scene.show(second))["status"] == "ACTIVE"
    await trio.sleep(1000)
    assert (await scene.show(second))["status"] == "FAILED"
    scene.up()
    await trio.sleep(MOMENT)
    assert scene.destination.orders == {}


@pytest.mark.parametrize("how", ["delete source", "delete destination", "withdraw role"])
async def test_a_task_does_not_outlive_its_permission(clock: MockClock, scene: Scene, how: str) -> None:
    bob = await scene.person("bob")
    roles = [
        await scene.alice.post(f"/endpoint/{id_}/role", {"principal": bob.id, "role": "administrator"}, status=201)
        for id_ in (scene.a, scene.b)
    ]
    scene.up()
    task_id = await scene.relay.transfer(bob, scene.a, scene.b)
    mine = await scene.task()
    await trio.sleep(MOMENT)
    session_id = scene.destination.orders[task_id][0].session_id
    if how == "withdraw role":
        await scene.alice.delete(f"/endpoint/{scene.a}/role/{roles[0]['id']}")
    else:
        await scene.alice.delete(f"/endpoint/{scene.a if how == 'delete source' else scene.b}")
    shown = await bob.get(f"/task/{task_id}")
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "CANCELED")
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][-1].desired == "cancel"
    assert session_id in scene.source.withdrawn
    assert (await scene.show(mine))["status"] == ("ACTIVE" if how == "withdraw role" else "FAILED")


async def test_an_agent_can_speak_only_of_tasks_it_drives(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.source.say("event", task_id, code="FORGED", description="forged")
    scene.source.observe(task_id, "SUCCEEDED")
    scene.source.say("progress", task_id, durable=False, observed=scene.source.tasks[task_id])
    scene.source.say("session_wanted", task_id, durable=False, generation=9)
    await trio.sleep(10)
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    assert await scene.codes(task_id) == []
    assert scene.destination.session_answers == {}
    assert scene.relay.steward.statistics().dropped_lines == 3
    # Its lines are read and acknowledged all the same, or they would come for ever.
    assert scene.source.acknowledged[-1] == 2


async def test_times_that_agents_invent_stay_within_the_life_of_the_task(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.destination.observe(task_id, "SUCCEEDED", completion_time="2099-01-01T00:00:00+00:00")
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    assert shown["request_time"] <= shown["completion_time"] < "2027-01-15T09"


async def test_text_of_agents_is_cut_to_size_and_events_are_bounded(
    clock: MockClock, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.transfer.event_log.MAX_EVENTS", 20)
    scene.up()
    task_id = await scene.task()
    for _ in range(30):
        scene.destination.say("event", task_id, code="C" * 1000, description="d" * 100_000, details="e" * 100_000)
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    codes = await scene.codes(task_id)
    assert len(codes) == 21
    assert codes[0] == "C" * 64
    assert "SUCCEEDED" in codes


async def test_progress_is_shown_and_written_about_once_a_second(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.destination.observe(task_id, "ACTIVE")
    await trio.sleep(MOMENT)
    store = scene.relay.store
    assert isinstance(store, CountingStore)
    before = store.written
    for number in range(1000):
        counters = Counters(files=1000, files_transferred=number)
        scene.destination.observe(task_id, "ACTIVE", durable=False, counters=counters, rate=12.5, current="x")
        await trio.sleep(0.005)
    await trio.sleep(MOMENT)
    assert 3 <= store.written - before <= 8
    shown = await scene.show(task_id)
    assert (shown["files_transferred"], shown["towpath"]["rate"], shown["towpath"]["current"]) == (999, 12.5, "x")


async def test_a_closed_task_is_forgotten_by_the_agent_after_its_retention(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    retention = scene.relay.services.settings.tasks.retention

    async def come_back(age: float) -> None:
        ended = scene.relay.services.clock() - age
        await scene.relay.store.write(
            lambda connection: connection.execute(update(tables.tasks).values(completed=ended)) and None
        )
        scene.relay.registry.down(scene.destination)
        scene.relay.registry.up(scene.destination)
        await trio.sleep(MOMENT)

    await come_back(retention - 100)
    assert scene.destination.closed == []
    await come_back(retention + 100)
    assert scene.destination.closed == [task_id]
    assert (await scene.row(task_id)).closed is True


async def test_many_tasks_and_agents_at_once(clock: MockClock, scene: Scene) -> None:
    scene.up()
    ids = [await scene.relay.transfer(scene.alice, scene.a, scene.b) for _ in range(60)]
    await trio.sleep(60)
    assert set(scene.destination.orders) == set(ids)
    for task_id in ids:
        scene.destination.succeed(task_id)
    await trio.sleep(60)
    listed = await scene.alice.get("/task_list", filter="status:SUCCEEDED", limit="100")
    assert listed["total"] == 60
    statistics = scene.relay.steward.statistics()
    assert (statistics.attended, statistics.visiting, statistics.due, statistics.visit_failures) == (2, 0, 0, 0)
