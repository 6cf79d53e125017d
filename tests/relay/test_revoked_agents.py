"""A machine is lost: its agent is revoked at once, its collections go on on another one, its user is signed out."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from relay import machines
from relay.accounts import Refused
from relay.auth import linked
from relay.refusal import ApiError
from relay.server import _disconnect_revoked
from relay.store.database import Store
from relay.transfer import revocation
from relay.transfer.nodes import certificates
from relay.transfer.steward import CLOCK_INTERVAL
from tests.relay.fake_agents import FakeAgent
from tests.relay.relay_world import RelayWorld
from tests.relay.steward_scene import MOMENT, Scene
from tests.relay.test_operator_commands import Operator, alive, make_token


@pytest.fixture
def operator(relay_directory: Any) -> Operator:
    return Operator(relay_directory)


async def revoke(scene: Scene, name: str) -> machines.Revoked:
    revoked = await machines.revoking(name)(scene.relay.store)
    # The operator's command is a process of its own, so that the relay finds out when it looks.
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    return revoked


async def knows(scene: Scene, agent: FakeAgent) -> bool:
    (certificate,) = await scene.relay.store.read(lambda connection: certificates(connection, [agent.node_id]))
    return certificate is not None


async def test_a_revoked_destination_gets_nothing_more(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    session_id = scene.destination.orders[task_id][0].session_id
    orders = len(scene.destination.orders[task_id])
    assert await knows(scene, scene.destination)
    revoked = await revoke(scene, scene.destination.node_id)
    assert (revoked.node_id, [name for _, name in revoked.collections]) == (scene.destination.node_id, ["B"])
    assert not await knows(scene, scene.destination)
    assert await knows(scene, scene.source)
    assert (await scene.show(task_id))["status"] == "FAILED"
    assert session_id in scene.source.withdrawn
    assert len(scene.destination.orders[task_id]) == orders, "nothing is said to it any more"
    assert (await scene.alice.get(f"/endpoint/{scene.b}"))["display_name"] == "B"
    (event,) = [line for line in await events(scene, task_id) if line["code"] == "CANCELED"]
    assert "“B” was revoked" in event["description"]


async def events(scene: Scene, task_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await scene.alice.get(f"/task/{task_id}/event_list", limit="1000"))["DATA"]
    return found


async def test_nothing_more_comes_from_a_revoked_source(clock: MockClock, scene: Scene) -> None:
    scene.up()
    task_id = await scene.task()
    # Any of its ids will do, since operators look at different lists.
    await revoke(scene, scene.a)
    assert (await scene.show(task_id))["status"] == "FAILED"
    assert scene.destination.orders[task_id][-1].desired == "cancel"
    with pytest.raises(Refused, match="revoked already"):
        await revoke(scene, scene.source.endpoint_id)
    with pytest.raises(Refused, match="no agent"):
        await revoke(scene, scene.alice.id)


async def test_no_ticket_is_signed_for_a_revoked_agent_though_its_tasks_were_not_ended_yet(
    clock: MockClock, scene: Scene
) -> None:
    scene.relay.registry.up(scene.source)
    task_id = await scene.task()
    await machines.revoking(scene.destination.node_id)(scene.relay.store)
    scene.relay.registry.up(scene.destination)
    await trio.sleep(MOMENT)
    assert task_id not in scene.destination.orders


async def test_another_machine_takes_the_place_of_a_revoked_one(clock: MockClock, scene: Scene) -> None:
    settings = scene.relay.services.settings
    before = await scene.alice.get(f"/endpoint/{scene.a}")

    async def key() -> dict[str, Any]:
        now = scene.relay.services.clock()
        return await machines.replacing(settings, scene.a, now=now)(scene.relay.store)

    with pytest.raises(Refused, match=r"serves this collection.*agent revoke"):
        await key()
    await machines.revoking(scene.source.node_id)(scene.relay.store)
    # Whoever does all steps at once is not told to revoke it once more.
    for asked in (key(), machines.removing(scene.a)(scene.relay.store)):
        with pytest.raises(Refused, match=r"is revoked.*within a minute: ask again then"):
            await asked
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    lost = await key()
    made = await key()
    other = FakeAgent()
    with pytest.raises(ApiError, match="unknown, was already used"):
        await scene.relay.enrol(lost["setup_key"], other.key)
    with pytest.raises(ApiError, match="revoked the agent's key"):
        await scene.relay.enrol(made["setup_key"], scene.source.key)
    answer = await scene.relay.enrol(made["setup_key"], other.key)
    assert answer.collection_id == scene.a
    other.node_id, other.endpoint_id, other.collections = answer.node_id, answer.endpoint_id, scene.source.collections
    scene.relay.registry.up(other)
    scene.relay.registry.up(scene.destination)
    task_id = await scene.task()
    assert [order.session_id for orders in other.sessions.values() for order in orders]
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    after = await scene.alice.get(f"/endpoint/{scene.a}")
    assert after["owner_id"] == before["owner_id"]
    with pytest.raises(Refused, match="no collection"):
        await machines.replacing(settings, scene.alice.id)(scene.relay.store)


async def test_a_collection_is_removed_when_no_agent_serves_it_and_what_waits_for_it_ends(
    clock: MockClock, scene: Scene
) -> None:
    scene.up()
    with pytest.raises(Refused, match=r"serves this collection.*endpoint delete.*agent revoke"):
        await machines.removing(scene.a)(scene.relay.store)
    await revoke(scene, scene.source.node_id)
    task_id = await scene.task()
    assert (await scene.show(task_id))["status"] == "ACTIVE"
    removed = await machines.removing(scene.a)(scene.relay.store)
    assert removed["tasks_ended"] == [task_id]
    assert (await scene.show(task_id))["status"] == "FAILED"
    assert "removed by the relay's operator" in str(await events(scene, task_id))
    with pytest.raises(Refused, match="no collection"):
        await machines.removing(scene.a)(scene.relay.store)


async def test_the_link_of_a_revoked_agent_ends(world: RelayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    registry = world.relay.registry
    monkeypatch.setattr(registry, "connected", lambda: {"lost": None, "other": None})
    monkeypatch.setattr(registry, "disconnect", lambda node_id, _sentence, retry_after: ended.append(node_id))
    monkeypatch.setattr(revocation, "revoked", lambda _connection: {"lost", "long ago"})
    await _disconnect_revoked(world.relay)
    assert ended == ["lost"]


async def test_agents_and_collections_are_listed(clock: MockClock, scene: Scene) -> None:
    store, settings = scene.relay.store, scene.relay.services.settings
    scene.up()
    await trio.sleep(MOMENT)
    await revoke(scene, scene.a)
    rows = {row["node_id"]: row for row in await machines.listing_agents(settings, None)(store)}
    source, destination = rows[scene.source.node_id], rows[scene.destination.node_id]
    assert (source["state"], source["collections"]) == ("revoked", [])
    assert (destination["state"], destination["collections"]) == ("enrolled", ["B"])
    assert destination["last_linked"] is not None
    bob = await scene.person("bob")
    assert await machines.listing_agents(settings, bob.id)(store) == []
    assert await machines.listing_collections(settings, bob.id)(store) == []
    mine = await machines.listing_collections(settings, scene.alice.id)(store)
    assert [(row["name"], row["node_id"]) for row in mine] == [("A", None), ("B", scene.destination.node_id)]


def test_a_user_is_signed_out_and_the_account_stays_open(operator: Operator, relay_store: Store) -> None:
    ada, bob = (operator.document("user", "add", name, "--no-link") for name in ("ada", "bob"))
    hers, his = (make_token(relay_store, one["id"], "laptop", 90) for one in (ada, bob))
    assert "signed out everywhere" in operator.run("user", "sign-out", "ada")
    assert (alive(relay_store, hers), alive(relay_store, his)) == (False, True)
    assert {row["username"]: row["status"] for row in operator.document("user", "list")}[ada["username"]] == "used"
    assert alive(relay_store, make_token(relay_store, ada["id"], "new laptop", 90))


def test_a_user_is_signed_out_under_all_their_names(operator: Operator, relay_store: Store) -> None:
    """Tokens stay with the identity that was the primary one when they were given."""
    ada, other, bob = (operator.document("user", "add", name, "--no-link") for name in ("ada", "other", "bob"))
    first, second, his = (make_token(relay_store, one["id"], "laptop", 90) for one in (ada, other, bob))
    with relay_store.writing_engine.begin() as connection:
        linked.link(connection, ada["id"], other["id"], time.time())
    operator.run("user", "sign-out", "ada")
    assert [alive(relay_store, token) for token in (first, second, his)] == [False, False, True]


def test_the_commands(operator: Operator) -> None:
    ada = operator.document("user", "add", "ada", "--no-link")
    made = operator.document("collection", "add", "Lab", "--owner", "ada")
    assert operator.document("agent", "list") == []
    (row,) = operator.document("collection", "list", "--user", "ada")
    assert (row["collection_id"], row["owner"], row["node_id"]) == (made["collection_id"], ada["username"], None)
    again = operator.document("collection", "setup-key", made["collection_id"])
    assert again["setup_key"] != made["setup_key"]
    assert "no agent" in operator.run("agent", "revoke", made["collection_id"], code=1)
    log = operator.run("audit", "export")
    assert again["setup_key"] not in log
    assert '"collection setup-key"' in log
    assert '"outcome": "failed"' in log
