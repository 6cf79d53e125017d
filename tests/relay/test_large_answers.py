"""Answers that wait to be taken: bounded for all, of which one person never has everything."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest
import trio
import trio.testing
from starlette.responses import Response

from relay.api import holding
from relay.api.frame import Frame
from relay.api.holding import PIECE
from relay.audit.notes import notes


class Answers:
    """A frame around an application with answers of three pieces, which nobody takes until they are let go."""

    def __init__(self) -> None:
        self.frame = Frame(self.app, max_body=PIECE, clock=lambda: 0.0)
        self.go = trio.Event()
        self.waiting = 0
        self.answers: list[tuple[str, int]] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        notes(scope)["who"] = scope["who"]
        await Response(bytes(scope["size"]))(scope, receive, send)

    async def ask(self, who: str, size: int = 3 * PIECE) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((who, message["status"]))
            elif self.answers[-1] == (who, 200):
                self.waiting += len(message["body"])
                await self.go.wait()
                self.waiting -= len(message["body"])

        scope = {"type": "http", "method": "GET", "path": "/v0.10/task_list", "headers": [], "who": who, "size": size}
        await self.frame({**scope, "client": ("192.0.2.1", 1)}, receive, send)


async def test_answers_that_nobody_takes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "_ANSWERS", 40 * PIECE)
    relay = Answers()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(relay.ask, "mallory")
        await trio.testing.wait_all_tasks_blocked()
        # The first piece of each is not counted, and of the others one person has three quarters.
        assert 0 < relay.waiting <= 45 * PIECE
        assert relay.answers.count(("mallory", 503)) > 30
        relay.answers.clear()
        nursery.start_soon(relay.ask, "bob")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(relay.ask, "mallory", PIECE)
        await trio.testing.wait_all_tasks_blocked()
        assert relay.answers == [("bob", 200), ("mallory", 200)]
        relay.go.set()
    relay.answers.clear()
    for _ in range(50):
        await relay.ask("mallory")
    assert set(relay.answers) == {("mallory", 200)}
