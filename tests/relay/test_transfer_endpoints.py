"""Endpoints, search, roles and bookmarks over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio

from protocol.identity import NodeKey
from relay.refusal import ApiError
from relay.transfer.collection_documents import legacy_username
from relay.transfer.enrolment import create_mapped_collection
from tests.relay.transfer_world import TransferWorld, delete_document, enrol_request, open_world, transfer_document

NOWHERE = str(uuid.uuid4())


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world) as opened:
        yield opened


async def test_a_collection_is_created_shown_changed_and_deleted(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    document = {
        "DATA_TYPE": "endpoint",
        "is_globus_connect": True,
        "display_name": "Laptop",
        "public": False,
        "keywords": "wind,water",
    }
    made = await alice.post("/endpoint", document, status=201)
    assert made["DATA_TYPE"] == "endpoint_create_result"
    assert made["code"] == "Created"
    assert made["globus_connect_setup_key"].startswith("twp-")
    path = f"/endpoint/{made['id']}"
    shown = await alice.get(path)
    assert shown["display_name"] == "Laptop"
    assert shown["entity_type"] == "GCP_mapped_collection"
    assert shown["is_globus_connect"] is True
    assert shown["high_assurance"] is False
    assert shown["gcp_connected"] is False
    assert shown["globus_connect_setup_key"] is None
    assert shown["owner_string"] == alice.username
    assert shown["my_effective_roles"] == ["administrator"]
    changed = await alice.put(path, {"DATA_TYPE": "endpoint", "description": "Mine", "keywords": None})
    assert changed["code"] == "Updated"
    shown = await alice.get(path)
    assert (shown["description"], shown["keywords"], shown["display_name"]) == ("Mine", None, "Laptop")
    assert (await alice.delete(path))["code"] == "Deleted"
    await alice.refused("GET", path, 404, "EndpointDeleted")
    await alice.refused("PUT", path, 404, "EndpointDeleted", json={"description": "x"})
    bob = await relay.person("bob")
    await bob.refused("GET", path, 404, "EndpointNotFound")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"display_name": ""},
        {"display_name": "  "},
        {"display_name": "two\nlines"},
        {"display_name": "x" * 129},
        {"display_name": 7},
        {"display_name": "a\x00b"},
        {"display_name": "a", "public": "yes"},
        {"display_name": "a", "description": "x" * 5000},
        {"display_name": "a", "is_globus_connect": False},
        {"display_name": "a", "subscription_id": "many"},
        {"display_name": "a", "DATA_TYPE": "shared_endpoint"},
        {"display_name": "a", "disable_verify": True, "force_verify": True},
        {"display_name": "a", "network_use": "all of it"},
        [],
        "endpoint",
        None,
    ],
)
async def test_a_wrong_endpoint_document_is_refused_with_a_sentence(relay: TransferWorld, wrong: Any) -> None:
    alice = await relay.person("alice")
    message = await alice.refused("POST", "/endpoint", 400, "ClientError.BadRequest", json=wrong)
    assert message.endswith(".")
    assert (await alice.get("/endpoint_search", filter_scope="my-endpoints"))["DATA"] == []


async def test_a_body_that_is_not_json_is_refused(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    await alice.refused("POST", "/endpoint", 400, "ClientError.BadRequest", content=b"{")
    await alice.refused("POST", "/endpoint", 400, "ClientError.BadRequest", content=b"")
    await alice.refused("POST", "/endpoint", 400, "ClientError.BadRequest", content=b"[" * 100_000)


async def test_public_collections_are_seen_but_not_reached(relay: TransferWorld) -> None:
    alice, bob = await relay.person("alice"), await relay.person("bob")
    public, agent = await relay.collection(alice, "Open data", public=True)
    private, _ = await relay.collection(alice, "Secrets")
    relay.registry.up(agent)
    shown = await bob.get(f"/endpoint/{public}")
    assert shown["my_effective_roles"] == []
    await bob.refused("GET", f"/endpoint/{private}", 404, "EndpointNotFound")
    unknown = await bob.refused("GET", f"/endpoint/{NOWHERE}", 404, "EndpointNotFound")
    hidden = await bob.refused("GET", f"/endpoint/{private}", 404, "EndpointNotFound")
    assert unknown.replace(NOWHERE, "ID") == hidden.replace(private, "ID")
    for path in (f"/operation/endpoint/{public}/ls", f"/operation/endpoint/{public}/stat"):
        await bob.refused("GET", path, 403, "PermissionDenied")
    mine, _ = await relay.collection(bob, "Bob's")
    for source, destination in ((public, mine), (mine, public)):
        await bob.refused("POST", "/transfer", 403, "PermissionDenied", json=transfer_document(source, destination))
        document = transfer_document(*(private if one == public else one for one in (source, destination)))
        await bob.refused("POST", "/transfer", 404, "EndpointNotFound", json=document)
    await bob.refused("POST", "/delete", 403, "PermissionDenied", json=delete_document(public))
    assert agent.made == []
    found = await bob.get("/endpoint_search", filter_scope="all", filter_fulltext="data")
    assert [row["id"] for row in found["DATA"]] == [public]
    assert (await bob.get("/endpoint_search", filter_fulltext="Secrets"))["DATA"] == []


async def test_search_scopes_words_and_paging(relay: TransferWorld) -> None:
    alice, bob = await relay.person("alice"), await relay.person("bob")
    ids = []
    for number in range(5):
        id_, _ = await relay.collection(alice, f"Box {number} 100%", public=True)
        ids.append(id_)
    hers, _ = await relay.collection(alice, "Under_score")
    await alice.post(f"/endpoint/{hers}/role", {"principal": bob.id, "role": "activity_monitor"}, status=201)

    async def search(who: Any, **params: Any) -> list[str]:
        return [row["id"] for row in (await who.get("/endpoint_search", **params))["DATA"]]

    assert await search(bob, filter_fulltext="box") == ids
    assert await search(bob, filter_fulltext="100% 3") == [ids[3]]
    assert await search(bob, filter_fulltext="alice@example.org box 2") == [ids[2]]
    assert await search(bob, filter_fulltext="under_score") == [hers]
    assert await search(bob, filter_fulltext="under%score") == []
    assert await search(bob, filter_scope="my-endpoints") == []
    assert await search(bob, filter_scope="shared-with-me") == [hers]
    assert await search(bob, filter_scope="hide-no-permissions") == [hers]
    assert await search(bob, filter_scope="administered-by-me") == []
    assert await search(alice, filter_scope="administered-by-me") == [*ids, hers]
    assert await search(alice, filter_scope="shared-by-me") == []
    assert await search(alice, filter_owner_id=bob.id) == []
    assert await search(bob, filter_owner_id=alice.id, filter_entity_type="GCP_mapped_collection") == [*ids, hers]
    assert await search(bob, filter_owner_id=alice.id, filter_entity_type="GCP_guest_collection") == []
    assert await search(bob, filter_host_endpoint=ids[0]) == []
    assert await search(bob, filter_fulltext="box", filter_non_functional="1") == []
    page = await bob.get("/endpoint_search", filter_fulltext="box", limit="2", offset="2", fields="id,display_name")
    assert [row["id"] for row in page["DATA"]] == ids[2:4]
    assert (page["has_next_page"], page["limit"], page["offset"]) == (True, 2, 2)
    assert set(page["DATA"][0]) == {"DATA_TYPE", "id", "display_name"}
    assert (await bob.get("/endpoint_search", filter_fulltext="box", limit="3", offset="2"))["has_next_page"] is False
    for params in ({"filter_scope": "everything"}, {"limit": "101"}, {"limit": "x"}, {"filter_owner_id": "me"}):
        await bob.refused("GET", "/endpoint_search", 400, "ClientError.BadRequest", params=params)


async def test_scopes_by_use(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    first, _ = await relay.collection(alice, "First")
    second, _ = await relay.collection(alice, "Second")
    third, _ = await relay.collection(alice, "Third")
    relay.base.clock.now += 1
    task = await relay.transfer(alice, first, second)
    relay.base.clock.now += 1
    await alice.post("/delete", delete_document(third), status=202)

    async def search(scope: str) -> list[str]:
        return [row["id"] for row in (await alice.get("/endpoint_search", filter_scope=scope))["DATA"]]

    assert (await search("recently-used"))[0] == third
    assert set(await search("in-use")) == {first, second, third}
    assert (await alice.get(f"/endpoint/{first}"))["in_use"] is True
    await alice.post(f"/task/{task}/cancel")
    assert await search("in-use") == [third]
    assert (await alice.get(f"/endpoint/{first}"))["in_use"] is False


async def test_lists_that_are_rightly_empty_and_subscription_calls(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    id_, agent = await relay.collection(alice, "Laptop")
    relay.registry.up(agent)
    assert await alice.get(f"/endpoint/{id_}/my_shared_endpoint_list") == {"DATA_TYPE": "endpoint_list", "DATA": []}
    assert (await alice.get(f"/endpoint/{id_}/shared_endpoint_list"))["next_token"] is None
    (implied,) = (await alice.get(f"/endpoint/{id_}/access_list"))["DATA"]
    assert (implied["principal"], implied["role_type"], implied["id"]) == (alice.id, "administrator", None)
    assert (await alice.get(f"/endpoint/{id_}/my_effective_pause_rule_list"))["DATA"] == []
    servers = await alice.get(f"/endpoint/{id_}/server_list")
    assert servers["DATA"][0]["is_connected"] is True
    assert (await alice.get(f"/endpoint/{id_}/server/0"))["is_connected"] is True
    subscription = str(uuid.uuid4())
    for value, kept in ((subscription, subscription), ("DEFAULT", None), (None, None)):
        await alice.put(f"/endpoint/{id_}/subscription", {"subscription_id": value})
        assert (await alice.get(f"/endpoint/{id_}"))["subscription_id"] == kept
    await alice.put(f"/endpoint/{id_}/subscription_admin_verified", {"subscription_admin_verified": True})
    assert (await alice.get(f"/endpoint/{id_}"))["subscription_admin_verified"] is True
    await alice.refused("POST", "/shared_endpoint", 501, "NotSupported", json={})


async def test_roles_open_and_close_a_collection(relay: TransferWorld) -> None:
    alice, bob, carol = [await relay.person(name) for name in ("alice", "bob", "carol")]
    id_, agent = await relay.collection(alice, "Laptop")
    relay.registry.up(agent)
    role = await alice.post(f"/endpoint/{id_}/role", {"principal": bob.id, "role": "administrator"}, status=201)
    assert role["DATA_TYPE"] == "role"
    assert role["principal"] == bob.id
    await bob.get(f"/operation/endpoint/{id_}/ls", path="/~/")
    listed = await bob.get(f"/endpoint/{id_}/role_list")
    assert [(row["id"], row["principal"], row["role"]) for row in listed["DATA"]] == [
        (None, alice.id, "administrator"),
        (role["id"], bob.id, "administrator"),
    ]
    assert (await alice.get(f"/endpoint/{id_}/role/{role['id']}"))["role"] == "administrator"
    again = {"principal": bob.id, "role": "administrator"}
    await alice.refused("POST", f"/endpoint/{id_}/role", 409, "Exists", json=again)
    for wrong, status, code in (
        ({"principal": carol.id, "role": "king"}, 400, "ClientError.BadRequest"),
        ({"principal": "carol", "role": "administrator"}, 400, "ClientError.BadRequest"),
        ({"principal": NOWHERE, "role": "administrator"}, 400, "ClientError.BadRequest"),
        ({"principal": NOWHERE, "role": "administrator", "principal_type": "group"}, 501, "NotSupported"),
    ):
        await alice.refused("POST", f"/endpoint/{id_}/role", status, code, json=wrong)
    await alice.post(f"/endpoint/{id_}/role", {"principal": carol.id, "role": "activity_monitor"}, status=201)
    assert (await carol.get(f"/endpoint/{id_}"))["my_effective_roles"] == ["activity_monitor"]
    await carol.refused("GET", f"/operation/endpoint/{id_}/ls", 403, "PermissionDenied")
    await carol.refused("GET", f"/endpoint/{id_}/role_list", 403, "PermissionDenied")
    await alice.delete(f"/endpoint/{id_}/role/{role['id']}")
    await bob.refused("GET", f"/operation/endpoint/{id_}/ls", 404, "EndpointNotFound")
    await alice.refused("DELETE", f"/endpoint/{id_}/role/{role['id']}", 404, "RoleNotFound")


async def test_bookmarks(relay: TransferWorld) -> None:
    alice, bob = await relay.person("alice"), await relay.person("bob")
    id_, _ = await relay.collection(alice, "Laptop")
    document = {"endpoint_id": id_, "path": "/~/data/", "name": "data"}
    made = await alice.post("/bookmark", document, status=201)
    assert made == {**document, "DATA_TYPE": "bookmark", "id": made["id"], "pinned": False}
    await alice.refused("POST", "/bookmark", 409, "Exists", json=document)
    await bob.refused("POST", "/bookmark", 404, "EndpointNotFound", json=document)
    names = [{**document, "name": name} for name in ("", " ", "two\nlines")]
    for wrong in (*names, {**document, "path": "/~/data"}, {**document, "endpoint_id": "x"}, {}):
        await alice.refused("POST", "/bookmark", 400, "ClientError.BadRequest", json=wrong)
    other = await alice.post("/bookmark", {**document, "name": "other"}, status=201)
    await alice.refused("PUT", f"/bookmark/{other['id']}", 409, "Exists", json={"name": "data"})
    assert (await alice.put(f"/bookmark/{other['id']}", {"name": "new", "pinned": True}))["pinned"] is True
    assert [row["name"] for row in (await alice.get("/bookmark_list"))["DATA"]] == ["new", "data"]
    assert (await bob.get("/bookmark_list"))["DATA"] == []
    for method in ("GET", "PUT", "DELETE"):
        await bob.refused(method, f"/bookmark/{made['id']}", 404, "BookmarkNotFound", json={"name": "stolen"})
    await alice.refused("GET", f"/bookmark/{NOWHERE}", 404, "BookmarkNotFound")
    await alice.delete(f"/bookmark/{made['id']}")
    await alice.refused("GET", f"/bookmark/{made['id']}", 404, "BookmarkNotFound")
    # A bookmark of a deleted collection stays listed; looking the collection up says that it was deleted.
    await alice.delete(f"/endpoint/{id_}")
    assert len((await alice.get("/bookmark_list"))["DATA"]) == 1
    await alice.refused("GET", f"/endpoint/{id_}", 404, "EndpointDeleted")


# --- enrolment ---------------------------------------------------------------------------------------------------


async def new_key(relay: TransferWorld, owner: Any, name: str = "Laptop") -> tuple[str, str]:
    settings = relay.services.settings
    return await create_mapped_collection(
        relay.store, settings, owner.id, {"display_name": name}, now=relay.services.clock()
    )


async def test_a_setup_key_used_a_hundred_times_at_once_has_one_winner(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    _, setup_key = await new_key(relay, alice)
    won, lost = [], []

    async def attempt() -> None:
        try:
            won.append(await relay.enrol(setup_key, NodeKey.generate()))
        except ApiError as error:
            lost.append((error.status, error.code))

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(attempt)
    assert len(won) == 1
    assert lost == [(403, "SetupKeyInvalid")] * 99


async def test_a_second_key_adds_a_collection_to_the_same_endpoint(relay: TransferWorld) -> None:
    alice, bob = await relay.person("alice"), await relay.person("bob")
    key = NodeKey.generate()
    first_id, first = await new_key(relay, alice)
    one = await relay.enrol(first, key)
    second_id, second = await new_key(relay, alice, "Disk")
    two = await relay.enrol(second, key, node_id=one.node_id)
    assert (two.endpoint_id, two.node_id) == (one.endpoint_id, one.node_id)
    assert (one.collection_id, two.collection_id) == (first_id, second_id)
    assert two.display_name == "Disk"
    assert two.owner == alice.username
    _, foreign = await new_key(relay, bob)
    with pytest.raises(ApiError) as refused:
        await relay.enrol(foreign, key, node_id=one.node_id)
    assert (refused.value.status, refused.value.code) == (403, "PermissionDenied")
    # It was not used up by that.
    assert (await relay.enrol(foreign, NodeKey.generate())).owner == bob.username
    _, third = await new_key(relay, alice)
    with pytest.raises(ApiError, match="not known"):
        await relay.enrol(third, NodeKey.generate(), node_id=one.node_id)


async def test_the_winner_may_ask_again_and_nobody_else(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    _, setup_key = await new_key(relay, alice)
    key = NodeKey.generate()
    answer = await relay.enrol(setup_key, key)
    assert await relay.enrol(setup_key, key) == answer
    with pytest.raises(ApiError) as refused:
        await relay.enrol(setup_key, NodeKey.generate())
    assert refused.value.code == "SetupKeyInvalid"


async def test_setup_keys_expire_and_die_with_their_collection(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    _, old = await new_key(relay, alice)
    relay.base.clock.now += relay.services.settings.enrolment.setup_key_life + 1
    deleted_id, deleted = await new_key(relay, alice)
    alice.headers = await relay.base.bearer(alice.id, (await relay.base.client())[0])
    await alice.delete(f"/endpoint/{deleted_id}")
    for setup_key in (old, deleted, "twp-nonsense"):
        with pytest.raises(ApiError) as refused:
            await relay.enrol(setup_key, NodeKey.generate())
        assert (refused.value.status, refused.value.code) == (403, "SetupKeyInvalid")


async def test_a_proof_must_be_of_this_key_for_this_setup_key_and_fresh(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    _, setup_key = await new_key(relay, alice)
    _, other_key = await new_key(relay, alice)
    mine, theirs = NodeKey.generate(), NodeKey.generate()
    now = relay.services.clock()
    for proof in (
        enrol_request(setup_key, theirs, now).proof,
        enrol_request(other_key, mine, now).proof,
        enrol_request(setup_key, mine, now - 7200).proof,
        enrol_request(setup_key, mine, now + 7200).proof,
        "a.b.c",
        "",
    ):
        with pytest.raises(ApiError) as refused:
            await relay.enrol(setup_key, mine, proof=proof)
        assert refused.value.status == 400
    with pytest.raises(ApiError):
        await relay.enrol(setup_key, mine, certificate="-----BEGIN CERTIFICATE-----")
    await relay.enrol(setup_key, mine)


class Endless(httpx.AsyncByteStream):
    """A body that never ends."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return b"x" * 1000


async def test_enrolment_over_http(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    collection_id, setup_key = await new_key(relay, alice)
    request = enrol_request(setup_key, NodeKey.generate(), relay.services.clock())
    document = {name: getattr(request, name) for name in request.__struct_fields__}
    answer = await relay.http.post("/towpath/v1/enrol", json=document)
    assert answer.status_code == 201
    assert answer.json()["collection_id"] == collection_id
    assert answer.json()["relay_id"] == relay.services.keys.relay_id
    assert answer.json()["relay_root"] == relay.services.keys.root_public_pem
    for body in (b"{}", b"no"):
        assert (await relay.http.post("/towpath/v1/enrol", content=body)).status_code == 400
    endless = httpx.Request("POST", relay.http.base_url.join("/towpath/v1/enrol"), stream=Endless())
    assert (await relay.http.send(endless)).status_code == 413
    document["proof"] = enrol_request(setup_key, NodeKey.generate(), 0).proof
    refused = await relay.http.post("/towpath/v1/enrol", json=document)
    assert refused.status_code == 400
    assert setup_key not in refused.text


async def test_setup_keys_are_kept_as_digests_only(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    _, setup_key = await new_key(relay, alice)
    await relay.enrol(setup_key, NodeKey.generate())
    content = b"".join(path.read_bytes() for path in relay.store.path.parent.glob(relay.store.path.name + "*"))
    assert alice.username.encode() in content
    assert setup_key[4:].encode() not in content


def test_the_legacy_username_is_base32_of_the_identity() -> None:
    name = legacy_username("00000000-0000-0000-0000-000000000000")
    assert name == "u_" + "a" * 26
