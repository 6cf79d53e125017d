"""File operations over HTTP: documents, paths, and what agents' errors become."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from sqlalchemy import Connection

from protocol.control import MAX_ENTRIES, MAX_FILTER, MAX_FILTERS, Entry
from protocol.errors import AccessDenied, ItemFailed, NeedsPerson, ProtocolError, RetryLater
from relay.access.decisions import Ability
from relay.refusal import ApiError
from relay.transfer.collections import Decision, Question, Sight, decide_all, load
from tests.relay.fake_agents import FakeAgent, FakeRegistry
from tests.relay.transfer_world import Person, TransferWorld, open_world


class Laptop:
    """Alice's laptop, linked."""

    def __init__(self, relay: TransferWorld, alice: Person, id_: str, agent: FakeAgent) -> None:
        self.relay, self.alice, self.id, self.agent = relay, alice, id_, agent
        self.path = f"/operation/endpoint/{id_}"


@pytest.fixture
async def laptop(world: Any) -> AsyncIterator[Laptop]:
    async with open_world(world) as relay:
        alice = await relay.person("alice")
        id_, agent = await relay.collection(alice, "Laptop")
        agent.entries = {
            "1M.dat": Entry(
                name="1M.dat", type="file", size=1_000_000, mtime_ns=1_702_918_370 * 10**9, mode=0o644, user="al"
            ),
            "link": Entry(name="link", type="dir", link_target="../x", link_size=4, link_mtime_ns=0, mode=0o40755),
        }
        relay.registry.up(agent)
        yield Laptop(relay, alice, id_, agent)


async def test_a_listing(laptop: Laptop) -> None:
    listing = await laptop.alice.get(f"{laptop.path}/ls", path="/~/data")
    assert listing["DATA_TYPE"] == "file_list"
    # Recursive clients join names to this.
    assert listing["path"] == "/~/data/"
    assert listing["absolute_path"] == "/home/data"
    assert listing["endpoint"] == laptop.id
    assert (listing["length"], listing["total"], listing["limit"], listing["offset"]) == (2, 2, 100_000, 0)
    file, link = listing["DATA"]
    assert file["last_modified"] == "2023-12-18 16:52:50+00:00"
    assert file["permissions"] == "0644"
    assert file["link_target"] is None
    assert file["link_last_modified"] is None
    assert link["type"] == "dir"
    assert link["link_target"] == "../x"
    assert link["permissions"] == "0755"
    assert link["link_last_modified"] == "1970-01-01 00:00:00+00:00"


async def test_a_path_left_out_is_the_default_directory(laptop: Laptop) -> None:
    assert (await laptop.alice.get(f"{laptop.path}/ls"))["path"] == "/~/"
    await laptop.alice.put(f"/endpoint/{laptop.id}", {"default_directory": "/projects"})
    assert (await laptop.alice.get(f"{laptop.path}/ls"))["path"] == "/projects/"
    # One that can be no path is refused where it is set, not to everybody who lists afterwards.
    refused = await laptop.alice.put(f"/endpoint/{laptop.id}", {"default_directory": "/" + "x" * 300}, status=400)
    assert refused["message"].startswith("default_directory: ")
    assert (await laptop.alice.get(f"{laptop.path}/ls"))["path"] == "/projects/"
    await laptop.alice.put(f"/endpoint/{laptop.id}", {"default_directory": None})
    assert (await laptop.alice.get(f"{laptop.path}/ls"))["path"] == "/~/"


async def test_what_a_client_asks_reaches_the_agent(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, list[str]]] = []
    real = FakeAgent.ls

    def spy(self: FakeAgent, collection_id: str, *, query: dict[str, list[str]], **more: Any) -> Any:
        seen.append(query)
        return real(self, collection_id, query=query, **more)

    monkeypatch.setattr(FakeAgent, "ls", spy)
    filters = [("filter", "type:dir"), ("filter", "name:~*.txt")]
    params = [
        *filters,
        ("path", "~/a"),
        ("show_hidden", "0"),
        ("orderby", "name DESC"),
        ("limit", "5"),
        ("offset", "2"),
    ]
    answer = await laptop.alice.ask("GET", f"{laptop.path}/ls", params=params)
    assert answer.status_code == 200
    assert seen == [
        {
            "path": ["/a"],
            "show_hidden": ["0"],
            "limit": ["5"],
            "offset": ["2"],
            "orderby": ["name DESC"],
            "filter": ["type:dir", "name:~*.txt"],
        }
    ]
    answer = await laptop.alice.ask("GET", f"{laptop.path}/ls", params=[("path", "~/a"), ("show_hidden", "")])
    assert answer.status_code == 200
    assert seen[1:] == [{"path": ["/a"], "show_hidden": ["1"], "limit": [str(MAX_ENTRIES)], "offset": ["0"]}]


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ([("filter", "type:dir")] * MAX_FILTERS, ""),
        ([("filter", "type:dir")] * (MAX_FILTERS + 1), f"{MAX_FILTERS} filters"),
        ([("filter", "name:".ljust(MAX_FILTER, "x"))], ""),
        ([("filter", "name:".ljust(MAX_FILTER + 1, "x"))], f"{MAX_FILTER} characters"),
        ([("orderby", ("name," * MAX_FILTER)[: MAX_FILTER + 1])], "orderby"),
        ([("filter", "name:".ljust(MAX_FILTER, "x"))] * 14, ""),
        ([("filter", "name:".ljust(MAX_FILTER, "x"))] * 15, "too long together"),
        ([("limit", str(MAX_ENTRIES))], ""),
        ([("limit", str(MAX_ENTRIES + 1))], "limit"),
        ([("show_hidden", "yes")], "show_hidden must be true or false"),
    ],
)
async def test_no_more_is_asked_of_an_agent_than_it_would_look_at(
    laptop: Laptop, params: list[tuple[str, str]], word: str
) -> None:
    answer = await laptop.alice.ask("GET", f"{laptop.path}/ls", params=[("path", "~/a"), *params])
    assert (answer.status_code, word in str(answer.json())) == (400 if word else 200, True)


async def test_stat_and_its_miss(laptop: Laptop) -> None:
    assert (await laptop.alice.get(f"{laptop.path}/stat", path="/~/1M.dat"))["size"] == 1_000_000
    await laptop.alice.refused("GET", f"{laptop.path}/stat", 404, "NotFound", params={"path": "/~/none"})


async def test_changes(laptop: Laptop) -> None:
    made = await laptop.alice.post(f"{laptop.path}/mkdir", {"DATA_TYPE": "mkdir", "path": "/~/new"}, status=202)
    assert (made["DATA_TYPE"], made["code"]) == ("mkdir_result", "DirectoryCreated")
    renamed = await laptop.alice.post(f"{laptop.path}/rename", {"old_path": "/a", "new_path": "/b"})
    assert (renamed["DATA_TYPE"], renamed["code"]) == ("result", "FileRenamed")
    linked = await laptop.alice.post(f"{laptop.path}/symlink", {"path": "/l", "symlink_target": "../t"})
    assert linked["code"] == "SymlinkCreated"
    assert laptop.agent.made == [
        ("mkdir", {"path": "/new"}),
        ("rename", {"old_path": "/a", "new_path": "/b"}),
        ("symlink", {"path": "/l", "symlink_target": "../t"}),
    ]


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("mkdir", {}),
        ("mkdir", {"path": ""}),
        ("mkdir", {"path": 3}),
        ("mkdir", {"path": "/a\0b"}),
        ("mkdir", {"path": "/" + "x" * 300}),
        ("mkdir", {"path": "/x" * 10_000}),
        ("mkdir", {"path": "/a", "DATA_TYPE": "rename"}),
        ("mkdir", {"path": "/a", "local_user": "root"}),
        ("rename", {"old_path": "/a"}),
        ("symlink", {"path": "/a"}),
        ("symlink", {"path": "/a", "symlink_target": ""}),
    ],
)
async def test_malformed_changes_never_reach_the_agent(laptop: Laptop, verb: str, body: Any) -> None:
    calls = len(laptop.agent.calls)
    await laptop.alice.refused("POST", f"{laptop.path}/{verb}", 400, "ClientError.BadRequest", json=body)
    assert not any("/collections/" in path for _, path in laptop.agent.calls[calls:])


@pytest.mark.parametrize("path", ["/ok", "/../up", "/a\0b", "/" + "x" * 300])
async def test_a_stranger_hears_nothing_about_paths(laptop: Laptop, path: str) -> None:
    """Whether a path makes sense there is told to those alone who may see the collection."""
    mallory = await laptop.relay.person("mallory")
    for id_ in (laptop.id, "3018bbc1-cdeb-442e-81d0-e1d0242a9910"):
        route = f"/operation/endpoint/{id_}"
        await mallory.refused("GET", f"{route}/ls", 404, "EndpointNotFound", params={"path": path})
        await mallory.refused("POST", f"{route}/mkdir", 404, "EndpointNotFound", json={"path": path})


LISTING_ERRORS = [
    (ItemFailed("x", code="NOT_FOUND"), 404, "ClientError.NotFound"),
    (AccessDenied("x"), 403, "EndpointPermissionDenied"),
    (AccessDenied("x", code="READ_ONLY"), 403, "EndpointPermissionDenied"),
    (ItemFailed("x", code="NOT_A_DIRECTORY"), 502, "ExternalError.DirListingFailed.NotDirectory"),
    (ItemFailed("x", code="TOO_LARGE"), 502, "ExternalError.DirListingFailed.SizeLimit"),
    (ItemFailed("x", code="ILLEGAL_NAME"), 400, "ClientError.BadRequest"),
    (RetryLater("x", code="GC_NOT_CONNECTED"), 502, "ExternalError.DirListingFailed.GCDisconnected"),
    (RetryLater("x", code="TIMEOUT"), 502, "ExternalError.DirListingFailed.Timeout"),
    (NeedsPerson("x", code="COLLECTION_UNAVAILABLE"), 502, "ExternalError.DirListingFailed.CollectionUnavailable"),
    (ProtocolError("x"), 502, "ExternalError.DirListingFailed.EndpointError"),
    (RetryLater("x", code="SOMETHING_NEW"), 502, "ExternalError.DirListingFailed.EndpointError"),
]


@pytest.mark.parametrize(("error", "status", "code"), LISTING_ERRORS, ids=lambda value: str(getattr(value, "code", "")))
async def test_what_an_agents_error_becomes(laptop: Laptop, error: Exception, status: int, code: str) -> None:
    def refuse(method: str, path: str) -> None:
        if "/collections/" in path:
            raise error

    laptop.agent.refuse = refuse
    message = await laptop.alice.refused("GET", f"{laptop.path}/ls", status, code, params={"path": "/x"})
    assert "Laptop" in message


async def test_errors_of_changes(laptop: Laptop) -> None:
    exists = {"path": "/exists/"}
    await laptop.alice.refused("POST", f"{laptop.path}/mkdir", 502, "ExternalError.MkdirFailed.Exists", json=exists)
    forbidden = {"path": "/forbidden/"}
    await laptop.alice.refused("POST", f"{laptop.path}/mkdir", 403, "EndpointPermissionDenied", json=forbidden)


async def test_an_offline_agent_is_an_error_that_clients_do_not_repeat(laptop: Laptop) -> None:
    laptop.relay.registry.down(laptop.agent)
    for method, verb, word in (
        ("GET", "ls", "DirListingFailed"),
        ("GET", "stat", "StatFailed"),
        ("POST", "mkdir", "MkdirFailed"),
        ("POST", "rename", "RenameFailed"),
        ("POST", "symlink", "SymlinkFailed"),
    ):
        body = {"path": "/a", "old_path": "/a", "new_path": "/b", "symlink_target": "t", "DATA_TYPE": verb}
        options = {"json": body} if method == "POST" else {}
        path = f"{laptop.path}/{verb}"
        await laptop.alice.refused(method, path, 502, f"ExternalError.{word}.GCDisconnected", **options)
    assert (await laptop.alice.get(f"/endpoint/{laptop.id}"))["gcp_connected"] is False


async def test_a_collection_that_no_agent_was_set_up_for_is_not_called_disconnected(laptop: Laptop) -> None:
    made = await laptop.alice.post("/endpoint", {"display_name": "later", "is_globus_connect": True}, status=201)
    path, code = f"/operation/endpoint/{made['id']}/ls?path=/x", "ExternalError.DirListingFailed.GCDisconnected"
    said = await laptop.alice.refused("GET", path, 502, code)
    assert said.startswith("No agent has been set up for “later”")


async def test_an_agent_cannot_answer_with_names_that_lead_elsewhere(laptop: Laptop) -> None:
    for name in ("../up", "a/b", "..", "."):
        laptop.agent.entries = {"x": Entry(name=name, type="file")}
        code = "ExternalError.DirListingFailed.EndpointError"
        await laptop.alice.refused("GET", f"{laptop.path}/ls", 502, code)


async def test_an_agent_cannot_answer_with_what_no_file_has(laptop: Laptop) -> None:
    impossible: list[dict[str, Any]] = [{"size": -1}, {"size": 1 << 63}, {"mode": 1 << 20}]
    for more in [*impossible, {"user": "x" * 5000}, {"link_target": "x" * 20000}]:
        laptop.agent.entries = {"x": Entry(name="x", type="file", **more)}
        await laptop.alice.refused("GET", f"{laptop.path}/ls", 502, "ExternalError.DirListingFailed.EndpointError")
    laptop.agent.entries = {"x": Entry(name="x" * 5000, type="file")}
    await laptop.alice.refused("GET", f"{laptop.path}/ls", 502, "ExternalError.DirListingFailed.EndpointError")


async def test_times_that_no_calendar_has_do_not_break_a_listing(laptop: Laptop) -> None:
    laptop.agent.entries = {
        "a": Entry(name="a", type="file", mtime_ns=2**62),
        "b": Entry(name="b", type="file", mtime_ns=-(2**62) * 4 + 1),
    }
    first, second = (await laptop.alice.get(f"{laptop.path}/ls"))["DATA"]
    assert first["last_modified"] == "2116-02-20 23:53:38+00:00"
    assert second["last_modified"].endswith("+00:00")


async def test_calls_of_people_are_made_as_theirs(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one person's leave room at the agent for those of others, and the relay's own for both."""
    callers: list[str] = []
    call = FakeRegistry.call

    async def noting(self: FakeRegistry, *arguments: Any, **options: Any) -> bytes:
        if "/collections/" in arguments[2]:
            callers.append(options["caller"])
        return await call(self, *arguments, **options)

    monkeypatch.setattr(FakeRegistry, "call", noting)
    await laptop.alice.get(f"{laptop.path}/ls", path="/~/data")
    await laptop.alice.get(f"{laptop.path}/stat", path="/~/1M.dat")
    await laptop.alice.post(f"{laptop.path}/mkdir", {"path": "/~/new"}, status=202)
    await laptop.alice.post(f"{laptop.path}/rename", {"old_path": "/a", "new_path": "/b"})
    await laptop.alice.post(f"{laptop.path}/symlink", {"path": "/l", "symlink_target": "../t"})
    assert callers == [laptop.alice.id] * 5


async def test_calls_that_wait_are_decided_about_together(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, the database is asked about them in few transactions, one at a time."""
    asked: list[Callable[[], Awaitable[object]]] = []
    call = FakeRegistry.call

    async def noting(self: FakeRegistry, *arguments: Any, **options: Any) -> bytes:
        asked.append(options["decide_again"])
        return await call(self, *arguments, **options)

    monkeypatch.setattr(FakeRegistry, "call", noting)
    await laptop.alice.get(f"{laptop.path}/ls")
    refused: list[str] = []

    async def decide() -> None:
        try:
            await asked[0]()
        except ApiError as error:
            refused.append(error.code)

    before = laptop.relay.store.statistics().reads
    for gone in (False, True):
        async with trio.open_nursery() as nursery:
            for _ in range(150):
                nursery.start_soon(decide)
        if not gone:
            assert refused == []
            await laptop.alice.delete(f"/endpoint/{laptop.id}")
    assert refused == ["EndpointDeleted"] * 150
    assert laptop.relay.store.statistics().reads - before < 20


async def test_what_is_decided_together_is_what_is_decided_of_each(laptop: Laptop) -> None:
    bob = await laptop.relay.person("bob")
    asked = [
        (id_, person.id)
        for id_ in (laptop.id, laptop.id.upper(), "none", str(uuid.uuid4()))
        for person in (bob, laptop.alice)
    ]

    def decide(sight: Sight) -> Decision:
        return sight.require(Ability.READ), None

    def work(connection: Connection) -> list[Decision | ApiError]:
        return decide_all(connection, [Question(id_, person, decide) for id_, person in asked], 1e9)

    answers = await laptop.relay.store.read(work)
    told = [answer.code if isinstance(answer, ApiError) else answer[0].id for answer in answers]
    assert told == ["EndpointNotFound", laptop.id] * 2 + ["EndpointNotFound"] * 4


async def test_home_is_resolved_alike_for_calls_and_tasks(laptop: Laptop) -> None:
    laptop.relay.registry.down(laptop.agent)
    laptop.agent.collections = [msgspec.structs.replace(laptop.agent.collections[0], home="/people/al")]
    laptop.relay.registry.up(laptop.agent)
    with trio.fail_after(30):
        while (await laptop.relay.store.read(partial(load, collection_id=laptop.id))).home != "/people/al":
            await trio.sleep(0.01)
    for path in ("~/new", "new", "/~/new", "~/a/../new"):
        await laptop.alice.post(f"{laptop.path}/mkdir", {"path": path}, status=202)
    assert laptop.agent.made == [("mkdir", {"path": "/people/al/new"})] * 4
    item = {"source_path": "~/new", "destination_path": "copy/"}
    task_id = await laptop.relay.transfer(laptop.alice, laptop.id, laptop.id, DATA=[item])
    with trio.fail_after(30):
        while task_id not in laptop.agent.orders:
            await trio.sleep(0.01)
    order = laptop.agent.orders[task_id][0]
    assert order.items is not None
    assert [(row.source_path, row.destination_path) for row in order.items] == [("/people/al/new", "/people/al/copy/")]
