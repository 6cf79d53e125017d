"""An agent's link application over real folders, and a good request for each of its routes."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
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
from agent.policy import Policy
from protocol.candidates import PathAnswer, PathGo, PathOffer
from protocol.control import Candidate, Party, SessionAnswer, SessionOrder, TaskItem, TaskOrder, encode
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
        self.link_app = LinkApp(
            self.policy, self.collections, self.tasks, self.availability.look, self.availability.relay_lacks
        )
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
    ("POST", "/link/collections/missing"): ({}, {"ids": [READ_WRITE]}),
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
    ("PUT", "/link/tasks/{task}/candidates"): ({}, PathAnswer(session_id=SESSION, generation=1)),
    ("DELETE", "/link/sessions/{session}"): ({}, None),
}


def filled(path: str) -> str:
    return path.format(collection=READ_WRITE, task=TASK, session=SESSION)


def routes() -> list[tuple[str, str]]:
    nobody: Callable[[], Awaitable[Any]] = trio.lowlevel.checkpoint
    table = LinkApp(Policy([]), Collections(Marks(None)), RecordedTasks(), nobody, list.clear).table()
    return [(method, path) for method, path, _, _ in table]
