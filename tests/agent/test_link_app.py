"""What a relay may ask of an agent, and above all what it may not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from agent.availability import Availability
from agent.collections import Collections, Marks
from agent.config.keys import CollectionConfig
from agent.link_app import LinkApp
from agent.local_app import LocalApplication
from agent.policy import LINK_OPERATIONS, Policy
from protocol.candidates import PathGo, PathOffer
from protocol.control import AgentEvent, Candidate, Party, SessionAnswer, SessionOrder, TaskItem, TaskOrder, encode
from protocol.errors import AccessDenied
from tests.agent.recorded_tasks import RecordedTasks

READ_WRITE = "00000000-0000-4000-8000-0000000000a1"
READ_ONLY = "00000000-0000-4000-8000-0000000000a2"
STRANGE = "00000000-0000-4000-8000-0000000000a3"
TASK = "00000000-0000-4000-8000-0000000000b1"
SESSION = "00000000-0000-4000-8000-0000000000b2"
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


class Link:
    """An agent's link application over two real folders and a recorded engine; requests as a relay sends them."""

    def __init__(self, folder: Path, policy: Policy | None = None) -> None:
        self.folder = folder
        for name in ("rw", "ro"):
            (folder / name).mkdir()
            (folder / name / "file").write_text("content")
            (folder / name / "sub").mkdir()
        (folder / "secret").write_text("not for relays")
        offered = (
            CollectionConfig(id=READ_WRITE, name="rw", root=str(folder / "rw"), home="/sub"),
            CollectionConfig(id=READ_ONLY, name="ro", root=str(folder / "ro"), read_only=True),
        )
        self.policy = policy or Policy(offered)
        self.policy.replace(offered)
        self.tasks = RecordedTasks()
        self.collections = Collections(Marks(folder / "roots.json"))
        self.availability = Availability(self.policy, self.collections, self.tasks.announce_collections)
        self.link_app = LinkApp(self.policy, self.collections, self.tasks, self.availability.look)
        self._transport = httpx.ASGITransport(self.link_app.application())

    async def ask(self, method: str, address: str, body: object = None, /, **query: object) -> httpx.Response:
        content = None if body is None else body if isinstance(body, bytes) else encode(body)
        async with httpx.AsyncClient(transport=self._transport, base_url="https://agent") as client:
            return await client.request(method, address, content=content, params=query or None)  # type: ignore[arg-type]

    async def code(self, method: str, address: str, body: object = None, /, **query: object) -> tuple[int, str]:
        answer = await self.ask(method, address, body, **query)
        document = json.loads(answer.content) if answer.content else {}
        return answer.status_code, document.get("code", "")

    def tree(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else b"/"
            for path in sorted(self.folder.rglob("*"))
            if path.name != "roots.json"
        }


@pytest.fixture
def link(tmp_path: Path) -> Link:
    return Link(tmp_path)


def at(collection_id: str, call: str) -> str:
    return f"/link/collections/{collection_id}/{call}"


def order(**changes: Any) -> TaskOrder:
    party = Party(endpoint_id=TASK, node_id=TASK, collection_id=READ_WRITE, certificate="c")
    fields: dict[str, Any] = {
        "task_id": TASK,
        "revision": 1,
        "desired": "run",
        "type": "TRANSFER",
        "ticket": "t",
        "session_id": SESSION,
        "destination": party,
        "source": party,
        "items": [TaskItem(source_path="/a", destination_path="/b")],
    }
    return TaskOrder(**(fields | changes))


# A well-formed request for every route, as an honest relay would send it: path parameters filled in, query, body.
ANSWER = SessionAnswer(
    session_id=SESSION, generation=1, candidates=[Candidate(kind="host", host="x", port=1)], certificate=""
)
GOOD: dict[tuple[str, str], tuple[dict[str, object], object]] = {
    ("GET", "/link/events"): ({"after": 0}, None),
    ("POST", "/link/events/acknowledge"): ({}, {"n": 3}),
    ("GET", "/link/collections"): ({}, None),
    ("GET", "/link/collections/{collection}/ls"): ({"path": "/"}, None),
    ("GET", "/link/collections/{collection}/stat"): ({"path": "/file"}, None),
    ("POST", "/link/collections/{collection}/mkdir"): ({}, {"path": "/new"}),
    ("POST", "/link/collections/{collection}/rename"): ({}, {"old_path": "/file", "new_path": "/renamed"}),
    ("POST", "/link/collections/{collection}/symlink"): ({}, {"path": "/link", "symlink_target": "file"}),
    ("PUT", "/link/tasks/{task}"): ({}, order()),
    ("GET", "/link/task-list"): ({}, None),
    ("GET", "/link/tasks/{task}"): ({}, None),
    ("GET", "/link/tasks/{task}/order"): ({}, None),
    ("DELETE", "/link/tasks/{task}"): ({}, None),
    ("PUT", "/link/tasks/{task}/session"): ({}, ANSWER),
    ("GET", "/link/tasks/{task}/successful"): ({"limit": 10}, None),
    ("GET", "/link/tasks/{task}/skipped"): ({}, None),
    ("PUT", "/link/sessions/{session}"): (
        {},
        SessionOrder(session_id=SESSION, task_id=TASK, ticket="t", peer=order().destination),
    ),
    ("PUT", "/link/sessions/{session}/offer"): (
        {},
        PathOffer(session_id=SESSION, task_id=TASK, generation=1, token="0" * 32, count=1),
    ),
    ("PUT", "/link/sessions/{session}/go"): ({}, PathGo(session_id=SESSION, generation=1, start_in=0.0)),
    ("PUT", "/link/tasks/{task}/go"): ({}, PathGo(session_id=SESSION, generation=1, start_in=0.0)),
    ("DELETE", "/link/sessions/{session}"): ({}, None),
}


def filled(path: str) -> str:
    return path.format(collection=READ_WRITE, task=TASK, session=SESSION)


def routes() -> list[tuple[str, str]]:
    nobody: Callable[[], Awaitable[Any]] = trio.lowlevel.checkpoint
    table = LinkApp(Policy([]), Collections(Marks(None)), RecordedTasks(), nobody).table()
    return [(method, path) for method, path, _, _ in table]


# --- who may do what -----------------------------------------------------------------------------------------


class DenyOperations(Policy):
    """An owner who allows a relay nothing at all."""

    def check_operation(self, operation: str) -> None:
        raise AccessDenied(f"no {operation}")


class DenyPaths(Policy):
    """An owner who lets a relay ask, and allows it no path of any collection."""

    def check(self, *_: object) -> CollectionConfig:
        raise AccessDenied("no")


@pytest.mark.parametrize(("method", "path"), routes())
async def test_every_route_asks_the_owners_policy_first(tmp_path: Path, method: str, path: str) -> None:
    link = Link(tmp_path, DenyOperations([]))
    before = link.tree()
    query, body = GOOD[method, path]
    assert await link.code(method, filled(path), body, **query) == (403, "PERMISSION_DENIED")
    assert link.tasks.calls == []
    assert link.tree() == before


# Routes that name no path of a collection themselves. `PUT /link/sessions` names one in its ticket, which the engine
# checks against the same policy (see the tests of `agent.transfer.order_check`), and so do offers to such a session.
WITHOUT_PATH = {
    ("GET", "/link/events"),
    ("POST", "/link/events/acknowledge"),
    ("GET", "/link/collections"),
    ("GET", "/link/task-list"),
    ("GET", "/link/tasks/{task}"),
    ("GET", "/link/tasks/{task}/order"),
    ("DELETE", "/link/tasks/{task}"),
    ("PUT", "/link/tasks/{task}/session"),
    ("GET", "/link/tasks/{task}/successful"),
    ("GET", "/link/tasks/{task}/skipped"),
    ("PUT", "/link/sessions/{session}"),
    ("PUT", "/link/sessions/{session}/offer"),
    ("PUT", "/link/sessions/{session}/go"),
    ("PUT", "/link/tasks/{task}/go"),
    ("DELETE", "/link/sessions/{session}"),
}


@pytest.mark.parametrize(("method", "path"), [route for route in routes() if route not in WITHOUT_PATH])
async def test_every_route_with_a_path_asks_about_that_path(tmp_path: Path, method: str, path: str) -> None:
    link = Link(tmp_path, DenyPaths([]))
    before = link.tree()
    query, body = GOOD[method, path]
    assert await link.code(method, filled(path), body, **query) == (403, "PERMISSION_DENIED")
    assert link.tasks.calls == []
    assert link.tree() == before


@pytest.mark.parametrize(("method", "path"), routes())
async def test_every_route_answers_an_honest_relay(link: Link, method: str, path: str) -> None:
    await link.tasks.put_task(order())
    query, body = GOOD[method, path]
    answer = await link.ask(method, filled(path), body, **query)
    assert answer.status_code in (200, 201, 202, 204), answer.text


def test_the_routes_are_those_of_the_protocol_and_no_others() -> None:
    lines = re.findall(r"^\| `(GET|POST|PUT|DELETE) (/link/[^`?]*)[^`]*`", DOCUMENT.read_text(), re.MULTILINE)
    documented = {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in lines}
    served = {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in routes()}
    # The hello is answered by the gate before this application.
    assert served | {("POST", "/link/hello")} == documented


def test_every_operation_of_the_table_is_one_the_policy_knows(link: Link) -> None:
    assert {operation for _, _, operation, _ in link.link_app.table()} == LINK_OPERATIONS


# --- hostile relays ------------------------------------------------------------------------------------------


async def test_what_is_the_owners_alone_does_not_exist_on_the_link(link: Link) -> None:
    class Owner:
        pass

    local = LocalApplication(Owner(), link.tasks, link.policy, list).table()  # type: ignore[arg-type]
    paths = [(method, re.sub(r"\{\w+\}", READ_WRITE, path)) for method, path, _ in local]
    for method, path in [*paths, ("GET", "/config"), ("POST", "/update"), ("GET", "/docs"), ("GET", "/openapi.json")]:
        for place in (path, f"/link{path}"):
            if (method, place) == ("GET", "/link/collections"):
                continue
            assert (await link.code(method, place))[0] in (404, 405), (method, place)
    assert link.tasks.calls == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods_do_nothing(link: Link, method: str) -> None:
    assert await link.code(method, at(READ_WRITE, "ls"), path="/") == (405, "NO_SUCH_ROUTE")


WRITES = [
    ("mkdir", {"path": "/new"}),
    ("rename", {"old_path": "/file", "new_path": "/other"}),
    ("symlink", {"path": "/link", "symlink_target": "file"}),
]


@pytest.mark.parametrize(("call", "body"), WRITES)
async def test_a_read_only_collection_is_not_written_to(link: Link, call: str, body: object) -> None:
    before = link.tree()
    assert await link.code("POST", at(READ_ONLY, call), body) == (403, "READ_ONLY")
    assert link.tree() == before


async def test_a_task_cannot_write_to_a_read_only_or_foreign_collection(link: Link) -> None:
    party = order().destination
    for collection_id, expected in ((READ_ONLY, (403, "READ_ONLY")), (STRANGE, (404, "UNKNOWN_COLLECTION"))):
        destination = Party(
            endpoint_id=party.endpoint_id, node_id=party.node_id, collection_id=collection_id, certificate="c"
        )
        assert await link.code("PUT", f"/link/tasks/{TASK}", order(destination=destination)) == expected
    assert link.tasks.calls == []


@pytest.mark.parametrize("call", ["ls", "stat"])
async def test_another_collection_than_the_owners_is_not_served(link: Link, call: str) -> None:
    assert await link.code("GET", at(STRANGE, call), path="/") == (404, "UNKNOWN_COLLECTION")


async def test_dots_and_links_lead_nowhere_outside(link: Link) -> None:
    (link.folder / "rw" / "out").symlink_to(link.folder)
    (link.folder / "rw" / "absolute").symlink_to("/etc")
    before = link.tree()
    for path in (
        "/../secret",
        "../../secret",
        "/sub/../../secret",
        "/./../../secret",
        "/~/../../secret",
        "//..//secret",
    ):
        # `..` at the root stays at the root, where there is no such file.
        assert await link.code("GET", at(READ_WRITE, "stat"), path=path) == (404, "NOT_FOUND"), path
    for path in ("/out/secret", "/absolute/passwd"):
        assert (await link.code("GET", at(READ_WRITE, "stat"), path=path))[0] == 403, path
        assert (await link.code("POST", at(READ_WRITE, "mkdir"), {"path": f"{path}x"}))[0] == 403, path
    assert (await link.code("GET", at(READ_WRITE, "ls"), path="/out"))[0] == 403
    moved = {"old_path": "/file", "new_path": "/out/file"}
    assert (await link.code("POST", at(READ_WRITE, "rename"), moved))[0] == 403
    assert link.tree() == before


async def test_links_lead_no_farther_than_the_caller_may_go(link: Link) -> None:
    (link.folder / "rw" / "shared").mkdir()
    (link.folder / "rw" / "own").mkdir()
    (link.folder / "rw" / "shared" / "link").symlink_to("../own")
    (link.folder / "rw" / "shared" / "self").symlink_to(".")
    (link.folder / "rw" / "own" / "sub").mkdir()
    for call in ("ls", "stat"):
        assert (await link.code("GET", at(READ_WRITE, call), path="/shared/link/sub"))[0] == 200
        assert (await link.code("GET", at(READ_WRITE, call), path="/shared/self", reach="/shared"))[0] == 200
        refused = await link.code("GET", at(READ_WRITE, call), path="/shared/link/sub", reach="/shared")
        assert refused == (403, "PERMISSION_DENIED")
    assert (await link.code("GET", at(READ_WRITE, "ls"), path="/shared/link", reach="/shared"))[0] == 403
    made = {"path": "/shared/link/new", "reach": ["/shared"]}
    assert await link.code("POST", at(READ_WRITE, "mkdir"), made) == (403, "PERMISSION_DENIED")
    linked = {"path": "/shared/link/new", "symlink_target": "x", "reach": ["/shared"]}
    assert await link.code("POST", at(READ_WRITE, "symlink"), linked) == (403, "PERMISSION_DENIED")
    moved = {"old_path": "/shared/self/self", "new_path": "/shared/link/new", "reach": ["/shared"]}
    assert await link.code("POST", at(READ_WRITE, "rename"), moved) == (403, "PERMISSION_DENIED")
    assert [entry.name for entry in (link.folder / "rw" / "own").iterdir()] == ["sub"]


@pytest.mark.parametrize(
    "path",
    [
        "/a\0b",
        "/a␛00b",
        "/a␛2Fb",
        "/␛2E␛2E/secret",
        "/" + "x" * 300,
        "/x" * 2000,
        "/.towpath.abc",
        "/sub/.towpath.abc/x",
    ],
)
async def test_names_that_no_honest_relay_sends_are_refused(link: Link, path: str) -> None:
    before = link.tree()
    for method, call, body, query in (
        ("GET", "stat", None, {"path": path}),
        ("GET", "ls", None, {"path": path}),
        ("POST", "mkdir", {"path": path}, {}),
        ("POST", "rename", {"old_path": "/file", "new_path": path}, {}),
        ("POST", "rename", {"old_path": path, "new_path": "/new"}, {}),
        ("POST", "symlink", {"path": path, "symlink_target": "file"}, {}),
    ):
        status, code = await link.code(method, at(READ_WRITE, call), body, **query)
        assert status in (400, 403), (call, status, code)
    assert link.tree() == before


# Ids become names of files and directories: with ".." for an id, closing a task would remove the state directory.
@pytest.mark.parametrize("forged", ["..", ".", "%2e%2e", "..%2f..", "x", TASK.upper(), f"{TASK}%00", "%F0%9F%98%80"])
@pytest.mark.parametrize(("method", "path"), [route for route in routes() if "{" in route[1]])
async def test_an_id_that_is_none_reaches_nothing(link: Link, method: str, path: str, forged: str) -> None:
    query, body = GOOD[method, path]
    forged_path = re.sub(r"\{\w+\}", lambda _: forged, path)
    raw = httpx.URL("https://agent").copy_with(raw_path=forged_path.encode())
    transport = httpx.ASGITransport(link.link_app.application())
    async with httpx.AsyncClient(transport=transport) as client:
        content = None if body is None else encode(body)
        answer = await client.send(httpx.Request(method, raw, params=query or None, content=content))  # type: ignore[arg-type]
    assert answer.status_code in (400, 404, 405)
    assert link.tasks.calls == []


async def test_an_order_for_another_task_than_the_address_says_is_refused(link: Link) -> None:
    assert await link.code("PUT", f"/link/tasks/{TASK}", order(task_id="..")) == (400, "PROTOCOL_ERROR")
    body = SessionOrder(session_id=TASK, task_id=TASK, ticket="t", peer=order().destination)
    assert await link.code("PUT", f"/link/sessions/{SESSION}", body) == (400, "PROTOCOL_ERROR")
    assert link.tasks.calls == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"path": 5}', b"\xff"])
async def test_a_malformed_body_is_an_error_and_nothing_else(link: Link, body: bytes) -> None:
    before = link.tree()
    assert await link.code("POST", at(READ_WRITE, "mkdir"), body) == (400, "PROTOCOL_ERROR")
    assert link.tree() == before


async def test_a_body_without_end_is_cut_off(link: Link) -> None:
    received = 0
    sent: list[Any] = []

    async def receive() -> dict[str, object]:
        nonlocal received
        received += 10_000
        return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/link/events/acknowledge",
        "query_string": b"",
        "headers": [],
    }
    await link.link_app.application()(scope, receive, send)
    assert sent[0]["status"] == 400
    assert received < 100_000


@pytest.mark.parametrize("number", ["-1", "x", "1e9", "9" * 30, "٣"])
async def test_numbers_are_checked(link: Link, number: str) -> None:
    assert (await link.code("GET", "/link/events", after=number))[0] == 400
    assert (await link.code("GET", at(READ_WRITE, "ls"), path="/", offset=number))[0] == 400


async def test_a_failure_of_our_own_says_nothing_about_us(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: int) -> None:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(link.tasks, "acknowledge", broken)
    answer = await link.ask("POST", "/link/events/acknowledge", {"n": 1})
    assert answer.status_code == 500
    assert answer.json()["code"] == "INTERNAL_ERROR"
    assert "42" not in answer.text
    assert "the secret is 42" in caplog.text


# --- file operations -----------------------------------------------------------------------------------------


async def test_files_are_listed_made_renamed_and_linked(link: Link) -> None:
    listing = (await link.ask("GET", at(READ_WRITE, "ls"), path="/")).json()
    assert [entry["name"] for entry in listing["entries"]] == ["file", "sub"]
    assert (await link.code("POST", at(READ_WRITE, "mkdir"), {"path": "~/new"}))[0] == 201
    assert (link.folder / "rw" / "sub" / "new").is_dir()
    moved = {"old_path": "/file", "new_path": "moved"}
    assert (await link.code("POST", at(READ_WRITE, "rename"), moved))[0] == 200
    assert (link.folder / "rw" / "sub" / "moved").read_text() == "content"
    linked = {"path": "/link", "symlink_target": "sub/moved"}
    assert (await link.code("POST", at(READ_WRITE, "symlink"), linked))[0] == 201
    assert os.readlink(link.folder / "rw" / "link") == "sub/moved"
    entry = (await link.ask("GET", at(READ_WRITE, "stat"), path="/link")).json()
    assert (entry["type"], entry["size"], entry["link_target"]) == ("file", 7, "sub/moved")


@pytest.mark.parametrize(
    ("call", "body", "expected"),
    [
        ("mkdir", {"path": "/sub"}, (409, "EXISTS")),
        ("mkdir", {"path": "/"}, (409, "EXISTS")),
        ("mkdir", {"path": "/missing/x"}, (404, "NOT_FOUND")),
        ("mkdir", {"path": "/file/x"}, (409, "NOT_A_DIRECTORY")),
        ("rename", {"old_path": "/missing", "new_path": "/x"}, (404, "NOT_FOUND")),
        ("rename", {"old_path": "/file", "new_path": "/sub"}, (409, "EXISTS")),
        ("rename", {"old_path": "/", "new_path": "/x"}, (400, "ILLEGAL_NAME")),
        ("rename", {"old_path": "/file", "new_path": "/"}, (400, "ILLEGAL_NAME")),
        ("symlink", {"path": "/file", "symlink_target": "x"}, (409, "EXISTS")),
        ("symlink", {"path": "/l", "symlink_target": ""}, (400, "ILLEGAL_NAME")),
        ("symlink", {"path": "/l", "symlink_target": "a␛00b"}, (400, "ILLEGAL_NAME")),
    ],
)
async def test_what_cannot_be_done_has_its_documented_answer(
    link: Link, call: str, body: dict[str, str], expected: tuple[int, str]
) -> None:
    before = link.tree()
    assert await link.code("POST", at(READ_WRITE, call), body) == expected
    assert link.tree() == before


async def test_a_rename_names_the_path_that_is_in_the_way(link: Link) -> None:
    moved = {"old_path": "/file", "new_path": "/sub"}
    document = (await link.ask("POST", at(READ_WRITE, "rename"), moved)).json()
    assert document["subject"] == "/sub"


async def test_hostile_names_travel_escaped_and_come_back(link: Link) -> None:
    raw = b"we\xff\x1b[2Jird\n"
    (Path(os.fsdecode(os.fsencode(link.folder / "rw" / "sub") + b"/" + raw))).write_text("x")
    listing = (await link.ask("GET", at(READ_WRITE, "ls"))).json()
    (name,) = [entry["name"] for entry in listing["entries"]]
    assert name == "we␛FF␛1B[2Jird␛0A"
    assert (await link.ask("GET", at(READ_WRITE, "stat"), path=f"~/{name}")).json()["name"] == name


# --- collections that are not there --------------------------------------------------------------------------


async def test_a_removed_root_is_unavailable_and_not_empty(link: Link) -> None:
    await link.availability.look()
    assert (await link.code("GET", at(READ_WRITE, "ls"), path="/"))[0] == 200
    shutil.rmtree(link.folder / "rw")
    assert await link.code("GET", at(READ_WRITE, "ls"), path="/") == (503, "COLLECTION_UNAVAILABLE")
    assert await link.code("POST", at(READ_WRITE, "mkdir"), {"path": "/x"}) == (503, "COLLECTION_UNAVAILABLE")
    reports = (await link.ask("GET", "/link/collections")).json()["collections"]
    assert [(row["id"], row["available"]) for row in reports] == [(READ_WRITE, False), (READ_ONLY, True)]
    assert reports[0]["reason"]
    # The other collection goes on, the first comes back by itself, and the relay hears of both changes.
    assert (await link.code("GET", at(READ_ONLY, "ls"), path="/"))[0] == 200
    (link.folder / "rw").mkdir()
    (link.folder / "rw" / "back").touch()
    listing = (await link.ask("GET", at(READ_WRITE, "ls"), path="/")).json()
    assert [entry["name"] for entry in listing["entries"]] == ["back"]
    await link.availability.look()
    assert [[row.available for row in rows] for rows in link.tasks.announced] == [[False, True], [True, True]]


async def test_a_file_in_place_of_the_root_is_unavailable(link: Link) -> None:
    shutil.rmtree(link.folder / "rw")
    (link.folder / "rw").write_text("not a folder")
    assert await link.code("GET", at(READ_WRITE, "ls"), path="/") == (503, "COLLECTION_UNAVAILABLE")


# --- tasks and events ----------------------------------------------------------------------------------------


async def test_events_are_lines_of_json(link: Link) -> None:
    answer = await link.ask("GET", "/link/events", after=5)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line)["n"] for line in answer.text.splitlines()] == [6, 7, 8]


async def test_an_event_stream_ends_when_the_relay_leaves(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and in order, not when something is collected."""
    ended: list[str] = []

    @asynccontextmanager
    async def endless(after: int) -> AsyncIterator[AsyncIterator[AgentEvent]]:
        async def lines() -> AsyncIterator[AgentEvent]:
            yield AgentEvent(n=after + 1, kind="event", time="")
            await trio.sleep_forever()

        try:
            yield lines()
        finally:
            ended.append("reader")

    monkeypatch.setattr(link.tasks, "events", endless)
    heard, leave = trio.Event(), trio.Event()

    async def receive() -> dict[str, Any]:
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            heard.set()

    scope = {"type": "http", "method": "GET", "path": "/link/events", "headers": [], "query_string": b"after=4"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.link_app.application(), scope, receive, send)
        await heard.wait()
        assert ended == []
        leave.set()
    assert ended == ["reader"]


async def test_an_unknown_task_is_missing(link: Link) -> None:
    assert await link.code("GET", f"/link/tasks/{TASK}") == (404, "NOT_FOUND")


async def test_a_paused_machine_takes_orders_and_holds_them_up(link: Link) -> None:
    link.policy.paused = True
    assert (await link.ask("PUT", f"/link/tasks/{TASK}", order())).status_code == 202
    assert ("pause_task", TASK) in link.tasks.calls
    body = SessionOrder(session_id=SESSION, task_id=TASK, ticket="t", peer=order().destination)
    assert await link.code("PUT", f"/link/sessions/{SESSION}", body) == (503, "PAUSED_BY_OWNER")
    assert (await link.ask("DELETE", f"/link/sessions/{SESSION}")).status_code == 204


async def test_a_cancelled_task_of_a_removed_collection_can_be_cancelled(link: Link) -> None:
    link.policy.replace([])
    answer = await link.ask("PUT", f"/link/tasks/{TASK}", order(desired="cancel", revision=2))
    assert answer.status_code == 202


# --- file servers that hang ----------------------------------------------------------------------------------


async def test_a_hanging_collection_holds_up_nothing_else(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four calls hang in one collection; a fifth gives up when its caller does; the other collection answers."""
    import threading

    released = threading.Event()
    real = link.collections.using

    def using(config: CollectionConfig) -> Any:
        if config.id == READ_WRITE:
            released.wait()
        return real(config)

    monkeypatch.setattr(link.collections, "using", using)
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(link.ask, "GET", at(READ_WRITE, "ls"))
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.move_on_after(0.05) as patience:
                await link.ask("GET", at(READ_WRITE, "ls"))
            assert patience.cancelled_caught
            assert (await link.code("GET", at(READ_ONLY, "ls")))[0] == 200
            nursery.cancel_scope.cancel()
    finally:
        released.set()
