"""Access rules: what they open, to whom, until when; and that what they close again stops at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from sqlalchemy import insert
from trio.testing import MockClock

from protocol.control import CollectionReport, Entry
from protocol.ticket import TicketVerifier
from relay.store.sign_in_tables import linked_identities
from relay.transfer import filesystem
from tests.relay.fake_agents import FakeAgent
from tests.relay.steward_scene import MOMENT, Scene
from tests.relay.transfer_world import TransferWorld, delete_document, open_world, transfer_document

FOLDER = "/shared/"


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world, run=False) as made:
        yield made


def rule(principal: str = "", permissions: str = "r", path: str = FOLDER, **more: Any) -> dict[str, Any]:
    kind = more.pop("principal_type", "identity")
    return {
        "DATA_TYPE": "access",
        "principal_type": kind,
        "principal": principal,
        "path": path,
        "permissions": permissions,
        **more,
    }


async def opened(relay: TransferWorld) -> tuple[Any, Any, str, FakeAgent]:
    """Alice with a collection that may be shared, and Bob."""
    alice, bob = await relay.person("alice"), await relay.person("bob")
    endpoint, agent = await relay.collection(alice, "Disk", shareable=True)
    agent.entries = {"x": Entry(name="x", type="file")}
    relay.registry.up(agent)
    await relay.store.write(lambda connection: nodes_say_shareable(connection, endpoint))
    return alice, bob, endpoint, agent


def nodes_say_shareable(connection: Any, endpoint: str, shareable: bool = True) -> None:
    from relay.transfer import collections

    collections.change(connection, endpoint, {"shareable": shareable})


async def test_rules_are_made_shown_changed_and_removed(relay: TransferWorld) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    made = await alice.post(f"/endpoint/{endpoint}/access", rule(bob.id, path="/a/../shared"), status=201)
    assert (made["DATA_TYPE"], made["code"]) == ("access_create_result", "Created")
    where = f"/endpoint/{endpoint}/access/{made['access_id']}"
    shown = await alice.get(where)
    assert (shown["path"], shown["permissions"], shown["principal"]) == (FOLDER, "r", bob.id)
    listed = await alice.get(f"/endpoint/{endpoint}/access_list")
    assert [row["role_type"] for row in listed["DATA"]] == ["administrator", None]
    assert listed["DATA"][1] == shown
    await alice.refused("POST", f"/endpoint/{endpoint}/access", 409, "Exists", json=rule(bob.id))
    await alice.put(where, {"DATA_TYPE": "access", "permissions": "rw"})
    assert (await alice.get(where))["permissions"] == "rw"
    await alice.delete(where)
    await alice.refused("GET", where, 404, "AccessRuleNotFound")


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "~/x"},
        {"path": "/~/x"},
        {"path": "//~/x"},
        {"path": "x"},
        {"path": "/a\0b/"},
        {"permissions": "w"},
        {"principal_type": "everybody"},
        {"principal": "00000000-0000-0000-0000-000000000000"},
        {"principal": ""},
        {"expiration_date": "2001-01-01T00:00:00+00:00"},
    ],
)
async def test_a_rule_that_makes_no_sense_is_refused(relay: TransferWorld, wrong: dict[str, str]) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    document = {**rule(bob.id), **wrong}
    await alice.refused("POST", f"/endpoint/{endpoint}/access", 400, "ClientError.BadRequest", json=document)


async def test_only_what_the_owners_configuration_shares_can_be_opened(relay: TransferWorld) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    await alice.post(f"/endpoint/{endpoint}/access", rule(bob.id), status=201)
    assert (await bob.ask("GET", f"/operation/endpoint/{endpoint}/ls?path={FOLDER}")).status_code == 200
    await relay.store.write(lambda connection: nodes_say_shareable(connection, endpoint, shareable=False))
    await bob.refused("GET", f"/operation/endpoint/{endpoint}/ls?path={FOLDER}", 404, "EndpointNotFound")
    await alice.refused("POST", f"/endpoint/{endpoint}/access", 403, "PermissionDenied", json=rule(bob.id, path="/b/"))


async def test_a_rule_opens_its_folder_and_nothing_beside_it(relay: TransferWorld) -> None:
    alice, bob, endpoint, agent = await opened(relay)
    await alice.post(f"/endpoint/{endpoint}/access", rule(bob.id), status=201)
    base = f"/operation/endpoint/{endpoint}"
    for path in ("/shared", "/shared/deep/er", "/other/../shared/x"):
        assert (await bob.ask("GET", f"{base}/ls", params={"path": path})).status_code == 200, path
    calls = len(agent.calls)
    for path in ("/", "/share", "/sharedx", "/shared/../other", "/~/", "~", "/", ""):
        await bob.refused("GET", f"{base}/ls", 403, "PermissionDenied", params={"path": path})
    for verb, body in (
        ("mkdir", {"path": "/shared/new"}),
        ("rename", {"old_path": "/shared/a", "new_path": "/shared/b"}),
        ("symlink", {"path": "/shared/l", "symlink_target": "/"}),
    ):
        await bob.refused("POST", f"{base}/{verb}", 403, "PermissionDenied", json={"DATA_TYPE": verb, **body})
    assert len(agent.calls) == calls
    # The sentence says which of several paths it is, and what may not be done there.
    answer = await bob.ask("GET", f"{base}/ls", params={"path": "/other/x"})
    assert "permission to read /other/x on" in answer.json()["message"]
    answer = await bob.ask("POST", f"{base}/mkdir", json={"DATA_TYPE": "mkdir", "path": "/shared/new"})
    assert "permission to change /shared/new on" in answer.json()["message"]
    # Elsewhere it stays invisible to everybody else.
    await (await relay.person("eve")).refused("GET", f"/endpoint/{endpoint}", 404, "EndpointNotFound")


async def test_links_lead_the_callers_of_a_rule_into_its_folder_only(relay: TransferWorld) -> None:
    alice, bob, endpoint, agent = await opened(relay)
    for folder, may in ((FOLDER, "rw"), ("/other/", "r")):
        await alice.post(f"/endpoint/{endpoint}/access", rule(bob.id, may, folder), status=201)
    base = f"/operation/endpoint/{endpoint}"
    for person, readable, writable in ((alice, [], None), (bob, ["/other", "/shared"], ["/shared"])):
        agent.reaches.clear()
        agent.made.clear()
        for verb in ("ls", "stat"):
            assert (await person.ask("GET", f"{base}/{verb}", params={"path": "/shared/x"})).status_code == 200
        assert agent.reaches == [readable, readable]
        await person.post(f"{base}/mkdir", {"DATA_TYPE": "mkdir", "path": "/shared/new"}, status=202)
        assert [document.get("reach") for _, document in agent.made] == [writable]


async def test_writing_stays_inside_the_folder(relay: TransferWorld) -> None:
    alice, bob, endpoint, agent = await opened(relay)
    await alice.post(f"/endpoint/{endpoint}/access", rule(bob.id, "rw"), status=201)
    base = f"/operation/endpoint/{endpoint}"

    async def refused(verb: str, **body: str) -> None:
        await bob.refused("POST", f"{base}/{verb}", 403, "PermissionDenied", json={"DATA_TYPE": verb, **body})

    await bob.post(f"{base}/mkdir", {"DATA_TYPE": "mkdir", "path": "/shared/new"}, status=202)
    await bob.post(f"{base}/rename", {"DATA_TYPE": "rename", "old_path": "/shared/a", "new_path": "/shared/b/c"})
    await refused("rename", old_path="/shared/a", new_path="/a")
    await refused("rename", old_path="/a", new_path="/shared/a")
    # The folder itself belongs to the folder above it.
    await refused("rename", old_path="/shared", new_path="/shared/x")
    # A link could lead to all that is not shared.
    await refused("symlink", path="/shared/l", symlink_target="../secret")
    assert [verb for verb, _ in agent.made] == ["mkdir", "rename"]
    for item, fine in (("/shared/a", True), ("/shared", False), ("/shared/../b", False), ("/b", False)):
        document = delete_document(endpoint, DATA=[{"DATA_TYPE": "delete_item", "path": item}])
        answer = await bob.ask("POST", "/delete", json=document)
        assert answer.status_code == (202 if fine else 403), item


async def test_tasks_need_permission_for_every_path_their_tickets_name(relay: TransferWorld) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    mine, _ = await relay.collection(bob, "Bob's")
    await alice.post(f"/endpoint/{endpoint}/access", rule(bob.id, "rw"), status=201)

    def document(source: str, destination: str, *pairs: tuple[str, str], **more: Any) -> dict[str, Any]:
        kind = more.pop("item", "transfer_item")
        data = [{"DATA_TYPE": kind, "source_path": a, "destination_path": b} for a, b in pairs]
        return transfer_document(source, destination, DATA=data, **more)

    async def status(document: dict[str, Any]) -> int:
        return (await bob.ask("POST", "/transfer", json=document)).status_code

    assert await status(document(endpoint, mine, ("/shared/a", "/a"), ("/shared/b", "/b"))) == 202
    assert await status(document(endpoint, mine, ("/shared/a", "/a"), ("/other", "/b"))) == 403
    assert await status(document(mine, endpoint, ("/a", "/shared/a"))) == 202
    assert await status(document(mine, endpoint, ("/a", "/shared/../a"))) == 403
    # Links may lead out of the folder: only who may write everywhere may make them.
    assert await status(document(mine, endpoint, ("/a", "/shared/a"), recursive_symlinks="keep")) == 403
    assert await status(document(mine, endpoint, ("/a", "/shared/a"), item="transfer_symlink_item")) == 403
    # So many paths that the ticket would have to name the folder above: refused rather than widened.
    many = [(f"/shared/{'d' * 200}{n}/f", f"/{n}") for n in range(1500)]
    assert await status(document(endpoint, mine, *many)) == 202
    assert await status(document(endpoint, mine, *many, ("/b", "/b"))) == 403


async def test_everybody_signed_in_and_linked_identities(relay: TransferWorld) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    made = await alice.post(f"/endpoint/{endpoint}/access", rule(principal_type="all_authenticated_users"), status=201)
    assert [row["id"] for row in (await bob.get("/endpoint_search", filter_scope="shared-with-me"))["DATA"]] == [
        endpoint
    ]
    await bob.get(f"/operation/endpoint/{endpoint}/ls", path=FOLDER)
    await alice.delete(f"/endpoint/{endpoint}/access/{made['access_id']}")
    assert (await bob.get("/endpoint_search", filter_scope="all"))["DATA"] == []
    other = await relay.person("bob.elsewhere")
    await alice.post(f"/endpoint/{endpoint}/access", rule(other.id), status=201)
    await bob.refused("GET", f"/operation/endpoint/{endpoint}/ls", 404, "EndpointNotFound", params={"path": FOLDER})
    link = {"identity_id": other.id, "primary_id": bob.id, "created": 1.0}
    await relay.store.write(lambda connection: connection.execute(insert(linked_identities).values(**link)))
    await bob.get(f"/operation/endpoint/{endpoint}/ls", path=FOLDER)


async def test_an_access_manager_changes_rules_and_reads_nothing(relay: TransferWorld) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    role = {"DATA_TYPE": "role", "principal": bob.id, "role": "access_manager"}
    await alice.post(f"/endpoint/{endpoint}/role", role, status=201)
    eve = await relay.person("eve")
    await bob.post(f"/endpoint/{endpoint}/access", rule(eve.id), status=201)
    await eve.get(f"/operation/endpoint/{endpoint}/ls", path=FOLDER)
    await bob.refused("GET", f"/operation/endpoint/{endpoint}/ls", 403, "PermissionDenied", params={"path": FOLDER})
    await eve.refused("GET", f"/endpoint/{endpoint}/access_list", 403, "PermissionDenied")


# --- what is closed again stops ------------------------------------------------------------------------------------


@pytest.fixture
def scene(scene: Scene) -> Scene:
    reports = scene.source.collections
    scene.source.collections = [CollectionReport(id=one.id, name=one.name, shareable=True) for one in reports]
    return scene


async def bobs_task(scene: Scene, **more: Any) -> tuple[Any, str, str]:
    """Bob reads Alice's shared folder into his own collection; returns him, the rule and the task."""
    bob = await scene.person("bob")
    scene.clock.autojump_threshold = 0.01
    mine, _ = await scene.relay.collection(bob, "Bob's", agent=FakeAgent())
    scene.clock.autojump_threshold = 0
    scene.destination = _
    scene.up()
    await trio.sleep(MOMENT)
    made = await scene.alice.post(f"/endpoint/{scene.a}/access", rule(bob.id, **more), status=201)
    item = {"DATA_TYPE": "transfer_item", "source_path": "/shared/d", "destination_path": "/d", "recursive": True}
    task_id = await scene.relay.transfer(bob, scene.a, mine, DATA=[item])
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][0].desired == "run"
    return bob, str(made["access_id"]), task_id


@pytest.mark.parametrize("how", ["removed", "expired", "no longer shared"])
async def test_a_task_ends_with_the_rule_it_needs(clock: MockClock, scene: Scene, how: str) -> None:
    expiry = datetime.fromtimestamp(scene.relay.services.clock() + 1800, UTC).isoformat()
    more = {"expiration_date": expiry} if how == "expired" else {}
    bob, rule_id, task_id = await bobs_task(scene, **more)
    session_id = scene.destination.orders[task_id][0].session_id
    if how == "removed":
        await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    elif how == "expired":
        await trio.sleep(1200)
        assert (await bob.get(f"/task/{task_id}"))["status"] == "ACTIVE"
        await trio.sleep(700)
    else:
        work = nodes_say_shareable
        await scene.relay.store.write(lambda connection: work(connection, scene.a, shareable=False))
        # The source's agent cuts its sessions by itself; the destination asks for another one and gets none.
        scene.destination.say("session_wanted", task_id, durable=False, generation=1)
    await trio.sleep(MOMENT)
    assert (await bob.get(f"/task/{task_id}"))["status"] == "FAILED"
    assert session_id in scene.source.withdrawn
    assert scene.destination.orders[task_id][-1].desired == "cancel"


def source_reaches(scene: Scene, task_id: str) -> list[object]:
    """Where links may lead a task at its source, by the newest tickets of both agents."""
    keys = scene.relay.services.keys
    verifier = TicketVerifier(keys.relay_id, keys.root_public_pem)
    session_id = scene.destination.orders[task_id][-1].session_id
    newest = scene.destination.orders[task_id][-1].ticket, scene.source.sessions[session_id][-1].ticket
    tickets = [verifier.verify_untrusted(one, scene.relay.services.clock()) for one in newest]
    return [None if ticket.source is None else ticket.source.reach for ticket in tickets]


async def test_links_lead_a_running_task_no_longer_into_a_folder_that_was_closed(
    clock: MockClock, scene: Scene
) -> None:
    """The task itself needs another one, and goes on; its ticket would last for hours."""
    bob, _, task_id = await bobs_task(scene)
    opening = f"/endpoint/{scene.a}/access"
    other = await scene.alice.post(opening, rule(bob.id, path="/elsewhere"), status=201)
    scene.relay.steward.clock_was_set()
    await trio.sleep(MOMENT)
    assert source_reaches(scene, task_id) == [["/elsewhere", "/shared"]] * 2
    await scene.alice.delete(f"{opening}/{other['access_id']}")
    await trio.sleep(MOMENT)
    assert (await bob.get(f"/task/{task_id}"))["status"] == "ACTIVE"
    assert source_reaches(scene, task_id) == [["/shared"]] * 2


async def test_an_order_to_stop_carries_no_permission(clock: MockClock, scene: Scene) -> None:
    _, rule_id, task_id = await bobs_task(scene)
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    await trio.sleep(MOMENT)
    keys = scene.relay.services.keys
    verifier = TicketVerifier(keys.relay_id, keys.root_public_pem)
    first, last = scene.destination.orders[task_id][0], scene.destination.orders[task_id][-1]
    now = scene.relay.services.clock()
    before, after = (verifier.verify_untrusted(order.ticket, now) for order in (first, last))
    assert before.source is not None
    assert before.source.paths == ["/shared/d"]
    # What Bob may read in Alice's collection, and all of his own.
    assert (before.source.reach, before.destination.reach) == (["/shared"], None)
    assert after.destination.reach == []
    assert after.source is None or after.source.paths == []
    assert after.destination.paths == []


async def test_the_source_is_closed_though_the_other_agent_does_not_answer(clock: MockClock, scene: Scene) -> None:
    bob, rule_id, task_id = await bobs_task(scene)
    session_id = scene.destination.orders[task_id][0].session_id

    def silent(method: str, path: str) -> None:
        from tests.relay.fake_agents import lost_answer

        if method == "PUT":
            raise lost_answer()

    scene.destination.refuse = silent
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    await trio.sleep(MOMENT)
    assert session_id in scene.source.withdrawn
    assert (await bob.get(f"/task/{task_id}"))["status"] == "FAILED"


async def test_no_ticket_is_signed_for_a_task_that_nobody_remembered_to_end(
    clock: MockClock, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relay.transfer import task_turns

    bob, rule_id, task_id = await bobs_task(scene)
    monkeypatch.setattr(task_turns, "end_where_access_is_gone", lambda *arguments: [])
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    assert (await bob.get(f"/task/{task_id}"))["status"] == "ACTIVE"
    offered = len(scene.source.sessions[scene.destination.orders[task_id][0].session_id])
    scene.destination.say("session_wanted", task_id, durable=False, generation=1)
    await trio.sleep(MOMENT)
    assert len(scene.source.sessions[scene.destination.orders[task_id][0].session_id]) == offered
    assert (await bob.get(f"/task/{task_id}"))["status"] == "FAILED"


@pytest.mark.parametrize("how", ["removed", "narrowed", "kept"])
async def test_a_listing_that_took_long_is_shown_to_those_who_may_still_see_it(
    relay: TransferWorld, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    alice, bob, endpoint, _ = await opened(relay)
    opening = f"/endpoint/{endpoint}/access"
    made = await alice.post(opening, rule(bob.id), status=201)
    other = await alice.post(opening, rule(bob.id, path="/elsewhere"), status=201)
    call = relay.registry.call
    monkeypatch.setattr(filesystem, "DECISION_HOLDS", -1.0)

    async def slow(*arguments: Any, **options: Any) -> bytes:
        answer = await call(*arguments, **options)
        if how != "kept":
            await alice.delete(f"{opening}/{(made if how == 'removed' else other)['access_id']}")
        return answer

    monkeypatch.setattr(relay.registry, "call", slow)
    for asked in (f"ls?path={FOLDER}", f"stat?path={FOLDER}x"):
        where = f"/operation/endpoint/{endpoint}/{asked}"
        if how == "kept":
            assert (await bob.ask("GET", where)).status_code == 200
        elif how == "removed":
            await bob.refused("GET", where, 403, "PermissionDenied")
        else:
            await bob.refused("GET", where, 409, "Conflict")
        made = await alice.post(opening, rule(bob.id), status=201) if how == "removed" else made
        other = await alice.post(opening, rule(bob.id, path="/elsewhere"), status=201) if how == "narrowed" else other
