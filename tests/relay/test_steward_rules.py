"""The steward's stories, two: sessions and tickets, permission, deadlines, and what agents may say."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from sqlalchemy import delete, update
from trio.testing import MockClock

from protocol.control import Counters
from protocol.errors import AccessDenied, NeedsPerson, ProtocolError
from protocol.ticket import TicketVerifier
from relay.store import transfer_tables as tables
from relay.store.auth_tables import identities, tokens
from relay.store.database import StoreBusy
from relay.times import iso
from relay.transfer.steward import CLOCK_INTERVAL
from tests.relay.fake_agents import once
from tests.relay.relay_world import START
from tests.relay.steward_scene import MOMENT, CountingStore, Scene
from tests.relay.transfer_world import delete_document

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


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("seconds", [86400.0, -86400.0])
async def test_a_clock_that_jumped_gives_running_tasks_new_tickets(
    clock: MockClock, scene: Scene, monkeypatch: pytest.MonkeyPatch, seconds: float, noticed: bool
) -> None:
    scene.up()
    task_id = await scene.task()
    services, steward = scene.relay.services, scene.relay.services.steward
    # The key was certified long ago.
    services.keys.renew(START - 10 * 86400.0, key_life=30 * 86400.0, ticket_life=43200.0)
    usual = steward._clock
    monkeypatch.setattr(steward, "_clock", lambda: usual() + seconds)
    orders = scene.destination.orders[task_id]
    (before,) = orders
    if noticed:
        steward.clock_was_set()
    # Without a word the steward finds out when it looks at what is due.
    await trio.sleep(MOMENT if noticed else CLOCK_INTERVAL + MOMENT)
    verifier = TicketVerifier(services.keys.relay_id, services.keys.root_public_pem)
    with pytest.raises(ProtocolError):
        verifier.claims_untrusted(before.ticket, usual() + seconds)
    assert len(orders) == 2
    verifier.claims_untrusted(orders[-1].ticket, usual() + seconds)
    assert scene.source.sessions[before.session_id][-1].ticket == orders[-1].ticket
    # Once is enough.
    await trio.sleep(2 * CLOCK_INTERVAL)
    assert len(orders) == 2


async def test_tickets_are_renewed_for_a_clock_that_was_set_while_the_database_was_busy(
    clock: MockClock, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.up()
    task_id = await scene.task()
    steward = scene.relay.services.steward
    busy = [True]
    write = scene.relay.store.write

    async def refusing(work: Any, *, aside: bool = False) -> Any:
        if busy:
            raise StoreBusy("The database is busy.")
        return await write(work, aside=aside)

    monkeypatch.setattr(scene.relay.store, "write", refusing)
    steward.clock_was_set()
    await trio.sleep(MOMENT)
    busy.clear()
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    assert len(scene.destination.orders[task_id]) == 2


async def test_a_destination_that_asks_on_and_on_does_not_flood_the_source(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    for generation in range(500):
        scene.destination.say("session_wanted", task_id, durable=False, generation=generation)
        await trio.sleep(0.01)
    (orders,) = scene.source.sessions.values()
    assert len(orders) <= 7
    await trio.sleep(60)
    assert scene.destination.session_answers[task_id]


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
    assert (ticket.source.paths, ticket.source.access) == (["/data"], "r")
    assert (ticket.destination.paths, ticket.destination.access) == (["/copy"], "rw")
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
    assert (ticket.source, ticket.destination.paths) == (None, ["/old"])


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
    scene.destination.say("event", task_id, code="CANCELED", description="canceled")
    scene.destination.observe(task_id, "CANCELED", counters=Counters(files=4, files_transferred=2))
    await trio.sleep(MOMENT)
    shown = await scene.show(task_id)
    # How it ended stays; what was done until then is told truly.
    assert (shown["fatal_error"]["code"], shown["files_transferred"]) == ("DEADLINE_EXPIRED", 2)
    codes = await scene.codes(task_id)
    assert {"DEADLINE_EXPIRED", "FAILED"} <= set(codes)
    # Scripts go by the newest event; that the agent ended it too because it was told to is no other end of the task.
    assert "CANCELED" not in codes


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


async def _account(scene: Scene, status: str) -> None:
    """What `towpath-relay user close` and `user open` do, in a process of their own."""

    def work(connection: Any) -> None:
        mine = identities.c.id == scene.alice.id
        connection.execute(update(identities).where(mine).values(status=status))

    await scene.relay.store.write(work)


async def test_tasks_of_a_closed_account_pause_say_why_and_go_on(clock: MockClock, scene: Scene) -> None:
    manager = await scene.person("bob")
    for id_ in (scene.a, scene.b):
        await scene.alice.post(
            f"/endpoint/{id_}/role", {"principal": manager.id, "role": "activity_manager"}, status=201
        )
    scene.up()
    task_id = await scene.task()
    session_id = scene.destination.orders[task_id][0].session_id
    await _account(scene, "closed")
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    assert scene.destination.orders[task_id][-1].desired == "pause"
    assert session_id in scene.source.withdrawn
    services = scene.relay.services
    verifier = TicketVerifier(services.keys.relay_id, services.keys.root_public_pem)
    ticket = verifier.verify_untrusted(scene.destination.orders[task_id][-1].ticket, services.clock())
    assert ticket.destination.paths == []
    shown = await manager.get(f"/endpoint_manager/task/{task_id}")
    assert (shown["status"], shown["nice_status"], shown["is_paused"]) == ("ACTIVE", "ACCOUNT_CLOSED", True)
    assert "alice" in shown["nice_status_details"]
    assert "relay's operator opens it" in shown["nice_status_details"]
    # Nothing is asked of anybody for it meanwhile, whatever the agents want.
    sessions = len(scene.source.sessions[session_id])
    scene.destination.say("session_wanted", task_id)
    await trio.sleep(100)
    assert len(scene.source.sessions[session_id]) == sessions
    await _account(scene, "used")
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    assert scene.destination.orders[task_id][-1].desired == "run"
    assert len(scene.source.sessions[session_id]) == sessions + 1
    codes = await scene.codes(task_id)
    assert codes.index("ACCOUNT_CLOSED") < codes.index("ACCOUNT_OPEN")
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["status"] == "SUCCEEDED"


async def test_a_task_of_a_closed_account_is_not_begun_and_keeps_its_deadline(clock: MockClock, scene: Scene) -> None:
    task_id = await scene.task(deadline=iso(START + 1000))
    await _account(scene, "closed")
    scene.up()
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    assert all(order.desired == "pause" for order in scene.destination.orders.get(task_id, []))
    assert scene.source.sessions == {}
    await trio.sleep(1000)
    assert (await scene.row(task_id)).status == "FAILED"


async def test_a_login_that_has_run_out_holds_no_task_up(clock: MockClock, scene: Scene, world: Any) -> None:
    """A task needs its submitter's permission, not their login: it runs on, and a new login finds it."""
    scene.up()
    task_id = await scene.task()

    def end_tokens(connection: Any) -> None:
        connection.execute(delete(tokens))

    await scene.relay.store.write(end_tokens)
    await scene.alice.refused("GET", f"/task/{task_id}", 401, "ClientError.AuthenticationFailed")
    await trio.sleep(world.settings.tickets.life)
    assert scene.destination.orders[task_id][-1].desired == "run"
    assert scene.destination.orders[task_id][-1].revision > 1, "its ticket was renewed"
    await scene.sign_in_again()
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    assert (await scene.show(task_id))["status"] == "SUCCEEDED"


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
    monkeypatch.setattr("relay.transfer.event_log.AT_LENGTH", 5, raising=False)
    scene.up()
    task_id = await scene.task()
    for number in range(30):
        scene.destination.say("event", task_id, code=f"{number:02}" * 500, description="d" * 9999, details="é" * 99_999)
    scene.destination.observe(task_id, "FAILED", error_code="X", status_sentence="s" * 2000)
    await trio.sleep(MOMENT)
    shown = (await scene.alice.get(f"/task/{task_id}/event_list", limit="100"))["DATA"][::-1]
    # The first and the newest, and all that mark a turn of the task.
    numbers = [event["code"][:2] for event in shown]
    assert numbers[-2:] == ["29", "FA"]
    assert numbers == [*(f"{number:02}" for number in range(10)), *(f"{number:02}" for number in range(21, 30)), "FA"]
    assert [len(event["details"].encode()) for event in shown[4:6]] == [16384, 500]
    assert [len(event["description"].encode()) for event in shown[4:6]] == [2000, 500]
    assert {event["code"] for event in shown[:-1]} == {number * 32 for number in numbers[:-1]}
    assert len(shown[-1]["description"]) == 2000


async def test_progress_is_shown_and_written_about_once_a_second(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    scene.destination.observe(task_id, "ACTIVE")
    await trio.sleep(MOMENT)
    store = scene.relay.store
    assert isinstance(store, CountingStore)
    before = store.written
    for number in range(1000):
        counters = Counters(files=1000, files_transferred=number, deleted=3)
        scene.destination.observe(task_id, "ACTIVE", durable=False, counters=counters, rate=12.5, current="x")
        await trio.sleep(0.005)
    await trio.sleep(MOMENT)
    assert 3 <= store.written - before <= 8
    shown = await scene.show(task_id)
    assert (shown["files_transferred"], shown["towpath"]["rate"], shown["towpath"]["current"]) == (999, 12.5, "x")
    assert shown["towpath"]["deleted"] == 3


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
