"""What a relay that means harm gets from an agent: nothing that the owner did not offer."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from agent.local_app import LocalApplication
from protocol.control import Party, SessionOrder, encode
from tests.agent.link_scene import GOOD, READ_ONLY, READ_WRITE, SESSION, STRANGE, TASK, Link, at, link, order, routes

__all__ = ["link"]


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
