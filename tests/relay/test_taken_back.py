"""What is taken back stops at once, by whichever way: a switch, a configuration, an identity that is not one's own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import trio
from sqlalchemy import insert, select, update
from trio.testing import MockClock

from protocol.control import CollectionReport
from relay import accounts
from relay.auth import linked, one_time_links
from relay.auth.guesses import GuessLimit
from relay.auth.identities import Identity, select_by_ids
from relay.auth.known_scopes import NotForPerson, ScopeFacts, check_domains
from relay.store.auth_tables import identities, tokens
from relay.store.sign_in_tables import browser_sessions, linked_identities
from relay.transfer.steward import CLOCK_INTERVAL
from tests.relay.fake_agents import FakeAgent
from tests.relay.relay_world import RelayWorld
from tests.relay.sign_in_world import PASSWORD, Application, Form, Person, add_person, forms_of
from tests.relay.steward_scene import MOMENT, Scene
from tests.relay.test_applications import developer
from tests.relay.test_transfer_access import bobs_task, rule, source_reaches
from tests.relay.transfer_world import transfer_document


@pytest.fixture
def scene(scene: Scene) -> Scene:
    """Alice's first collection may be shared."""
    reports = scene.source.collections
    scene.source.collections = [CollectionReport(id=one.id, name=one.name, shareable=True) for one in reports]
    return scene


async def bob_with_a_collection(scene: Scene) -> tuple[Any, str, FakeAgent]:
    """Bob, a collection of his own, and its agent; all agents are linked."""
    bob = await scene.person("bob")
    scene.clock.autojump_threshold = 0.01
    his, agent = await scene.relay.collection(bob, "Bob's", agent=FakeAgent())
    scene.clock.autojump_threshold = 0
    scene.up()
    scene.relay.registry.up(agent)
    await trio.sleep(MOMENT)
    return bob, his, agent


async def stopped(scene: Scene, bob: Any, task_id: str) -> bool:
    """Whether the task is over and both its agents know."""
    assert (await bob.get(f"/task/{task_id}"))["status"] == "FAILED"
    await trio.sleep(MOMENT)
    session_id = scene.destination.orders[task_id][0].session_id
    return session_id in scene.source.withdrawn and scene.destination.orders[task_id][-1].desired == "cancel"


async def test_a_task_ends_when_only_those_who_are_named_may_write(clock: MockClock, scene: Scene) -> None:
    bob, his, agent = await bob_with_a_collection(scene)
    for kind, folder in (("anonymous", "/drop"), ("all_authenticated_users", "/kept")):
        opened = rule(principal_type=kind, permissions="rw", path=folder)
        await scene.alice.post(f"/endpoint/{scene.a}/access", opened, status=201)
    tasks = []
    for folder in ("/drop/d", "/kept/d"):
        item = {"DATA_TYPE": "transfer_item", "source_path": "/d", "destination_path": folder, "recursive": True}
        tasks.append(await scene.relay.transfer(bob, his, scene.a, DATA=[item]))
    await trio.sleep(MOMENT)
    await scene.alice.put(f"/endpoint/{scene.a}", {"DATA_TYPE": "endpoint", "disable_anonymous_writes": True})
    assert [(await bob.get(f"/task/{task_id}"))["status"] for task_id in tasks] == ["FAILED", "ACTIVE"]
    await trio.sleep(MOMENT)
    assert scene.source.orders[tasks[0]][-1].desired == "cancel"
    assert scene.source.orders[tasks[0]][0].session_id in agent.withdrawn


async def test_a_task_ends_with_the_word_of_the_owners_configuration(clock: MockClock, scene: Scene) -> None:
    """An agent that reads its configuration again says so on its stream, without a new link."""
    bob, _, task_id = await bobs_task(scene)
    mine = await scene.task()
    reports = [CollectionReport(id=one.id, name=one.name, shareable=False) for one in scene.source.collections]
    scene.source.say("collections", "", collections=reports)
    await trio.sleep(0.5)
    assert await stopped(scene, bob, task_id)
    assert (await scene.show(mine))["status"] == "ACTIVE", "its owner needs no sharing"


async def linked_task(scene: Scene) -> tuple[Any, Any, str]:
    """Bob's task, which needs what was granted to another identity of his."""
    bob, rule_id, _ = await bobs_task(scene)
    other = await scene.person("bob.elsewhere")
    link = {"identity_id": other.id, "primary_id": bob.id, "created": 1.0}
    await scene.relay.store.write(lambda connection: connection.execute(insert(linked_identities).values(**link)))
    await scene.alice.post(f"/endpoint/{scene.a}/access", rule(other.id), status=201)
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    (his,) = scene.destination.collections
    item = {"DATA_TYPE": "transfer_item", "source_path": "/shared/e", "destination_path": "/e", "recursive": True}
    task_id = await scene.relay.transfer(bob, scene.a, his.id, DATA=[item])
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][0].desired == "run"
    return bob, other, task_id


async def test_what_a_closed_identity_was_granted_counts_for_nobody(clock: MockClock, scene: Scene) -> None:
    bob, other, task_id = await linked_task(scene)
    place = f"/operation/endpoint/{scene.a}/ls"
    await bob.get(place, path="/shared/")
    await set_status(scene, other, "closed")
    await bob.refused("GET", place, 404, "EndpointNotFound", params={"path": "/shared/"})
    # The operator's command is a process of its own, so that the relay finds out when it looks.
    await trio.sleep(CLOCK_INTERVAL + MOMENT)
    assert await stopped(scene, bob, task_id)
    await set_status(scene, other, "used")
    await bob.get(place, path="/shared/")


async def test_links_lead_a_running_task_no_longer_where_a_closed_identity_may(clock: MockClock, scene: Scene) -> None:
    """The task needs what its owner may, and goes on; a ticket that was given before lasts for hours."""
    hers = scene.destination
    bob, _, task_id = await bobs_task(scene)
    scene.relay.registry.up(hers)
    other = await scene.person("bob.elsewhere")
    link = {"identity_id": other.id, "primary_id": bob.id, "created": 1.0}
    await scene.relay.store.write(lambda connection: connection.execute(insert(linked_identities).values(**link)))
    await scene.alice.post(f"/endpoint/{scene.a}/access", rule(other.id, path="/elsewhere"), status=201)
    mine = await scene.task()
    scene.relay.steward.clock_was_set()
    await trio.sleep(MOMENT)
    assert source_reaches(scene, task_id) == [["/elsewhere", "/shared"]] * 2
    for again in (False, True):
        await set_status(scene, other, "closed")
        # The operator's command is a process of its own, so that the relay finds out when it looks.
        await trio.sleep(CLOCK_INTERVAL + MOMENT)
        assert source_reaches(scene, task_id) == [["/shared"]] * 2, again
        assert (await bob.get(f"/task/{task_id}"))["status"] == "ACTIVE"
        # Once is enough, and nobody else's task is concerned.
        orders = len(scene.destination.orders[task_id]), len(hers.orders[mine])
        await trio.sleep(3 * CLOCK_INTERVAL)
        assert (len(scene.destination.orders[task_id]), len(hers.orders[mine])) == orders
        await set_status(scene, other, "used")
        await trio.sleep(CLOCK_INTERVAL + MOMENT)
        scene.relay.steward.clock_was_set()
        await trio.sleep(MOMENT)
        assert source_reaches(scene, task_id) == [["/elsewhere", "/shared"]] * 2


async def set_status(scene: Scene, person: Any, status: str) -> None:
    """What the operator's commands do that close an account and open it again."""
    this = identities.c.id == person.id
    await scene.relay.store.write(lambda c: c.execute(update(identities).where(this).values(status=status)))


async def test_the_tunnel_of_a_task_ends_with_its_permission_though_its_source_cannot_be_told(
    clock: MockClock, scene: Scene
) -> None:
    """A source whose link is away, or that does not want to hear, sends on through the relay otherwise."""
    bob, rule_id, task_id = await bobs_task(scene)
    cut: list[str] = []

    async def note(session_id: str) -> None:
        cut.append(session_id)

    scene.relay.steward._courier._cut_tunnel = note
    scene.relay.registry.down(scene.source)
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    await trio.sleep(MOMENT)
    assert (await bob.get(f"/task/{task_id}"))["status"] == "FAILED"
    assert cut == [scene.destination.orders[task_id][0].session_id]
    assert scene.source.withdrawn == []


async def test_the_relay_gives_its_steward_the_tunnel_to_cut(world: RelayWorld) -> None:
    steward, tunnel = world.relay.services.steward, world.relay.tunnel
    assert steward._courier._cut_tunnel == tunnel.cut_session


@pytest.mark.parametrize("way", ["the API", "the page"])
async def test_the_tasks_of_a_deleted_client_end_with_it(clock: MockClock, scene: Scene, way: str) -> None:
    """Nobody could cancel them any more: a task is its submitter's."""
    ada = await developer(scene.relay.base, "ada")
    ada._http = scene.relay.http
    clock.autojump_threshold = math.inf
    program = (await ada.client(await ada.project(), client_type="client_identity"))["id"]
    headers = await scene.relay.base.bearer(program, program)
    clock.autojump_threshold = 0
    for place in (scene.a, scene.b):
        role = {"principal": program, "role": "administrator"}
        await scene.alice.post(f"/endpoint/{place}/role", role, status=201)
    scene.up()
    document = transfer_document(scene.a, scene.b)
    answer = await scene.relay.http.post("/v0.10/transfer", headers=headers, json=document)
    task_id = answer.json()["task_id"]
    await trio.sleep(MOMENT)
    assert scene.destination.orders[task_id][0].desired == "run"
    clock.autojump_threshold = math.inf
    if way == "the API":
        await ada.done("DELETE", f"/clients/{program}")
    else:
        (identity,) = (await scene.relay.store.read(lambda c: select_by_ids(c, [ada.id]))).values()
        person = Person(dataclasses.replace(scene.relay.base, http=scene.relay.http))
        # Minutes have gone by while the database worked, and who signed in then is asked for the password again.
        scene.relay.base.clock.now = scene.relay.services.clock()
        await person.arrive(identity)
        page = await person.get(f"/developers/applications/{program}")
        form = next(form for form in forms_of(page.text) if form.fields.get("do") == "delete")
        await person.post(Form(form.action or f"/developers/applications/{program}", form.fields))
    clock.autojump_threshold = 0
    await trio.sleep(MOMENT)
    row = await scene.row(task_id)
    assert row.status == "FAILED"
    assert "was deleted" in row.fatal_error
    assert scene.destination.orders[task_id][0].session_id in scene.source.withdrawn
    assert scene.destination.orders[task_id][-1].desired == "cancel"


async def test_what_a_collection_is_called_later_is_for_those_who_may_see_it(clock: MockClock, scene: Scene) -> None:
    bob, rule_id, task_id = await bobs_task(scene)
    name = "source_endpoint_display_name"
    before = (await bob.get(f"/task/{task_id}"))[name]
    await scene.alice.put(f"/endpoint/{scene.a}", {"display_name": "Renamed"})
    assert (await bob.get(f"/task/{task_id}"))[name] == "Renamed"
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{rule_id}")
    await scene.alice.put(f"/endpoint/{scene.a}", {"display_name": "Secret"})
    (row,) = (await bob.get("/task_list"))["DATA"]
    for shown in (await bob.get(f"/task/{task_id}"), row):
        assert shown[name] == before
        assert "Secret" not in str(shown)


async def test_the_details_of_a_task_call_its_place_what_their_reader_may_know(clock: MockClock, scene: Scene) -> None:
    bob, his, _ = await bob_with_a_collection(scene)
    opened = rule(bob.id, permissions="rw", path="/drop")
    made = await scene.alice.post(f"/endpoint/{scene.a}/access", opened, status=201)
    item = {"DATA_TYPE": "transfer_item", "source_path": "/d", "destination_path": "/drop/d", "recursive": True}
    task_id = await scene.relay.transfer(bob, his, scene.a, DATA=[item])
    await trio.sleep(MOMENT)
    await scene.alice.delete(f"/endpoint/{scene.a}/access/{made['access_id']}")
    await scene.alice.put(f"/endpoint/{scene.a}", {"display_name": "Secret"})
    scene.relay.registry.down(scene.source)
    for kind in ("successful_transfers", "skipped_errors"):
        told = await bob.ask("GET", f"/task/{task_id}/{kind}")
        assert (told.status_code, "Secret" in told.text, "“A”" in told.json()["message"]) == (502, False, True)


# --- people ----------------------------------------------------------------------------------------------------------


async def couple(world: RelayWorld) -> tuple[Identity, Identity]:
    """Ada, and another identity of hers."""
    ada, other = await add_person(world, "ada"), await add_person(world, "ada2")
    await world.store.write(lambda connection: linked.link(connection, ada.id, other.id, world.clock.now))
    return ada, other


async def count(world: RelayWorld, table: Any) -> int:
    return len(await world.store.read(lambda connection: connection.execute(select(table)).all()))


async def test_who_came_in_by_an_unlinked_identity_is_out(world: RelayWorld) -> None:
    _, other = await couple(world)
    stranger, ada = Person(world), Person(world)
    await stranger.sign_in("ada2")
    app = Application()
    assert (await app.redeem(world, await app.code(stranger))).status_code == 200
    await ada.sign_in("ada")
    # Ada's own browser has shown both, and stays.
    await ada.sign_in("ada2")
    assert "ada@" in (await stranger.get("/account")).text
    form = next(form for form in forms_of((await ada.get("/account")).text) if form.action == "/account/unlink")
    assert form.fields["identity"] == other.id
    assert (await ada.post(form)).status_code == 200
    assert 'action="/sign-in"' in (await stranger.get("/account")).text
    assert "ada@" in (await ada.get("/account")).text
    assert (await count(world, browser_sessions), await count(world, tokens)) == (1, 0)


async def test_unlinking_ends_the_tasks_that_needed_it(clock: MockClock, scene: Scene, world: RelayWorld) -> None:
    bob, other, task_id = await linked_task(scene)
    from relay.transfer import task_turns

    def work(connection: Any) -> list[str]:
        linked.unlink(connection, bob.id, other.id)
        return task_turns.end_of_people_without_access(connection, [bob.id, other.id], "Not linked.", 1e9)

    for ended in await scene.relay.store.write(work):
        scene.relay.steward.cut(ended)
    assert await stopped(scene, bob, task_id)


@pytest.mark.parametrize("how", ["closed", "new password", "new password by a link"])
async def test_who_came_in_by_a_linked_identity_goes_with_it(world: RelayWorld, how: str) -> None:
    _, other = await couple(world)
    stranger, ada = Person(world), Person(world)
    await stranger.sign_in("ada2")
    if how == "closed":
        await ada.sign_in("ada")
        await accounts.closing(world.settings, "ada2")(world.store)
        assert "ada@" in (await ada.get("/account")).text
    elif how == "new password":
        await accounts.setting_password(world.settings, "ada2", "entirely other words")(world.store)
    else:
        key = await world.store.write(lambda c: one_time_links.make(c, "password", other.id, world.clock.now))
        page = await ada.get(f"/welcome?key={key}")
        words = "entirely other words"
        await ada.post(forms_of(page.text)[0], password=words, again=words)
    assert 'action="/sign-in"' in (await stranger.get("/account")).text


async def test_who_signs_in_to_a_closed_account_by_another_name_is_told(world: RelayWorld) -> None:
    await couple(world)
    await accounts.closing(world.settings, "ada")(world.store)
    answer = await Person(world).sign_in("ada2", PASSWORD)
    assert (answer.status_code, "This account is closed" in answer.text) == (403, True)


async def test_a_closed_identity_is_neither_linked_nor_shown_nor_made_the_first(world: RelayWorld) -> None:
    ada, other = await couple(world)
    third = await add_person(world, "ada3")
    for name in ("ada2", "ada3"):
        await accounts.closing(world.settings, name)(world.store)
    assert [one.id for one in await world.store.read(lambda c: linked.set_of(c, ada.id))] == [ada.id]
    for work in (
        lambda c: linked.link(c, ada.id, third.id, world.clock.now),
        lambda c: linked.make_primary(c, ada.id, other.id),
    ):
        with pytest.raises(linked.CannotLink, match="closed"):
            await world.store.write(work)
    person = await world.store.read(lambda c: linked.set_of(c, ada.id))
    facts = ScopeFacts(id="s", name="s", server="s", words="s", required_domains=("elsewhere.example",))
    with pytest.raises(NotForPerson):
        check_domains([facts], person)


async def test_linking_one_whose_others_are_closed_leaves_those_alone(world: RelayWorld) -> None:
    ada, other = await couple(world)
    carol = await add_person(world, "carol")
    await accounts.closing(world.settings, "ada2")(world.store)
    await world.store.write(lambda c: linked.link(c, carol.id, ada.id, world.clock.now))
    await accounts.opening(world.settings, "ada2")(world.store)
    ids = (ada.id, other.id, carol.id)
    primaries = await world.store.read(lambda c: [linked.primary_of(c, one) for one in ids])
    assert primaries == [carol.id, other.id, carol.id]


async def test_one_whose_primary_identity_is_closed_is_not_linked_elsewhere(world: RelayWorld) -> None:
    """Its person could not sign in, and shall not come in by somebody else's name."""
    _, other = await couple(world)
    carol = await add_person(world, "carol")
    await accounts.closing(world.settings, "ada")(world.store)
    with pytest.raises(linked.CannotLink, match="linked to others"):
        await world.store.write(lambda c: linked.link(c, carol.id, other.id, world.clock.now))


@pytest.mark.parametrize("back", [60.0, 86400.0, 10 * 365 * 86400.0])
def test_nobody_waits_for_a_clock_that_was_set_back(back: float) -> None:
    limit, then = GuessLimit(3, 900.0), 1e9
    for second in range(3):
        limit.failed(["ada"], then + second)
    assert limit.retry_after(["ada"], then + 2) == 898.0
    now = then - back
    assert limit.retry_after(["ada"], now) == 0.0
    # And guesses are counted by the clock as it goes now.
    for _ in range(3):
        limit.failed(["ada"], now)
    assert limit.retry_after(["ada"], now) == 900.0
