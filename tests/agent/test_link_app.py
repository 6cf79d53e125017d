"""What a relay may ask of an agent, and above all what it may not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from agent.config.keys import CollectionConfig
from agent.policy import LINK_OPERATIONS, Policy
from agent.storage.listing import list_directory
from protocol.control import AgentEvent, SessionOrder, encode
from protocol.errors import AccessDenied
from tests.agent.link_scene import (
    DOCUMENT,
    GOOD,
    READ_ONLY,
    READ_WRITE,
    SESSION,
    TASK,
    Link,
    at,
    filled,
    link,
    order,
    routes,
)

__all__ = ["link"]


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
# checks against the same policy (see the tests of `agent.transfer.tasks.order_check`), and so do offers to such a
# session.
WITHOUT_PATH = {
    ("GET", "/link/events"),
    ("POST", "/link/events/acknowledge"),
    ("GET", "/link/collections"),
    ("POST", "/link/collections/missing"),
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
    ("PUT", "/link/tasks/{task}/candidates"),
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


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("mkdir", {"path": "/missing/x"}),
        ("rename", {"old_path": "/file", "new_path": "/missing/x"}),
        ("symlink", {"path": "/missing/x", "symlink_target": "y"}),
    ],
)
async def test_what_is_missing_is_the_folder_and_not_what_is_to_be_made_in_it(
    link: Link, call: str, body: dict[str, str]
) -> None:
    document = (await link.ask("POST", at(READ_WRITE, call), body)).json()
    assert document["sentence"] == "/missing does not exist."


async def test_a_folder_that_is_moved_into_itself_is_told_so(link: Link) -> None:
    moved = {"old_path": "/sub", "new_path": "/sub/in"}
    document = (await link.ask("POST", at(READ_WRITE, "rename"), moved)).json()
    assert (document["code"], document["sentence"]) == ("ILLEGAL_NAME", "/sub cannot be moved into itself.")


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
    assert str(link.folder) not in str(reports), "where it is on the machine is the owner's business"
    refused = await link.ask("GET", at(READ_WRITE, "ls"), path="/")
    assert str(link.folder) not in refused.text
    assert str(link.folder / "rw") in link.availability.owners_reports()[0].reason
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
    link.policy.pause = "all"
    assert (await link.ask("PUT", f"/link/tasks/{TASK}", order())).status_code == 202
    # All wait; what is paused alone is for its owner to say.
    assert ("pause_task", TASK) not in link.tasks.calls
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


# --- permissions that go while something waits -----------------------------------------------------------------


WAITING = [
    ("GET", "ls", {"path": "/"}, None),
    ("GET", "stat", {"path": "/file"}, None),
    ("POST", "mkdir", {}, {"path": "/new"}),
    ("POST", "rename", {}, {"old_path": "/file", "new_path": "/renamed"}),
    ("POST", "symlink", {}, {"path": "/link", "symlink_target": "file"}),
]


@pytest.mark.parametrize("how", ["taken away", "moved", "kept"])
@pytest.mark.parametrize(("method", "verb", "query", "body"), WAITING)
async def test_what_waited_for_its_disk_is_decided_about_again(
    link: Link,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    method: str,
    verb: str,
    query: dict[str, object],
    body: object,
) -> None:
    """The root answers only after the owner has changed what is allowed."""
    real = link.collections.using
    (link.folder / "other").mkdir()
    now = CollectionConfig(id=READ_WRITE, name="rw", root=str(link.folder / "other"))

    @contextmanager
    def using(config: CollectionConfig) -> Any:
        with real(config) as root:
            if how != "kept":
                link.policy.replace([now] if how == "moved" else [])
            yield root

    monkeypatch.setattr(link.collections, "using", using)
    before = link.tree()
    status, code = await link.code(method, at(READ_WRITE, verb), body, **query)
    if how == "kept":
        assert status in (200, 201)
        return
    assert code == ("COLLECTION_CHANGED" if how == "moved" else "UNKNOWN_COLLECTION")
    assert link.tree() == before


async def test_a_listing_during_which_the_permission_goes_is_not_shown(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = list_directory

    def takes_long(*arguments: Any) -> Any:
        listing = real(*arguments)
        link.policy.replace([])
        return listing

    monkeypatch.setattr("agent.link_files.list_directory", takes_long)
    _status, code = await link.code("GET", at(READ_WRITE, "ls"), path="/")
    assert code == "UNKNOWN_COLLECTION"


@pytest.mark.parametrize(("method", "verb", "query", "body"), WAITING[2:])
async def test_what_the_relay_has_given_up_is_not_done_when_the_disk_answers(
    link: Link, monkeypatch: pytest.MonkeyPatch, method: str, verb: str, query: dict[str, object], body: object
) -> None:
    import threading

    released, over = threading.Event(), threading.Event()
    real = link.collections.using

    @contextmanager
    def using(config: CollectionConfig) -> Any:
        try:
            with real(config) as root:
                released.wait()
                yield root
        finally:
            over.set()

    monkeypatch.setattr(link.collections, "using", using)
    before = link.tree()
    parts = [{"type": "http.request", "body": encode(body), "more_body": False}]
    leave = trio.Event()

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    sent: list[MutableMapping[str, Any]] = []
    scope = {"type": "http", "method": method, "path": at(READ_WRITE, verb), "query_string": b"", "headers": []}
    try:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.link_app.application(), scope, receive, send)
                await trio.testing.wait_all_tasks_blocked(0.01)
                # It answers at once, whatever the disk does.
                leave.set()
    finally:
        released.set()
    assert await trio.to_thread.run_sync(over.wait, 5)
    assert link.tree() == before
