"""Large bodies that are held at a time: within a bound for all, of which one person never has everything."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest
import trio
import trio.testing

from relay.api.frame import Frame
from relay.api.holding import PIECE
from relay.audit.notes import notes

MAX_BODY = 10 * PIECE


class Relay:
    """A frame around an application that holds whole bodies until it is told to answer."""

    def __init__(self) -> None:
        self.frame = Frame(self.app, max_body=MAX_BODY, clock=lambda: 0.0)
        self.go = trio.Event()
        self.held = 0
        self.answers: list[tuple[str, int, dict[bytes, bytes]]] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["who"]:
            notes(scope)["who"] = scope["who"]
        mine = 0
        try:
            while True:
                message = await receive()
                mine += len(message["body"])
                self.held += len(message["body"])
                if not message["more_body"]:
                    break
            await self.go.wait()
        finally:
            self.held -= mine
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, who: str, size: int, address: str = "192.0.2.1") -> None:
        left = size

        async def receive() -> dict[str, Any]:
            nonlocal left
            chunk = min(left, 10_000)
            left -= chunk
            await trio.lowlevel.checkpoint()
            return {"type": "http.request", "body": bytes(chunk), "more_body": left > 0}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((who, message["status"], dict(message["headers"])))

        scope = {"type": "http", "method": "POST", "path": "/v0.10/transfer", "headers": [], "who": who}
        await self.frame({**scope, "client": (address, 1)}, receive, send)


@pytest.mark.parametrize("who", ["alice", ""])
async def test_one_caller_takes_a_share_and_others_get_in(who: str) -> None:
    relay = Relay()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(relay.ask, who, MAX_BODY)
        await trio.testing.wait_all_tasks_blocked()
        assert relay.held <= 4 * MAX_BODY
        refused = [headers for _, status, headers in relay.answers if status == 503]
        assert len(refused) >= 17
        assert all(headers[b"retry-after"] == b"5" for headers in refused)
        relay.answers.clear()
        # What is small is never refused, and somebody else still finds room.
        nursery.start_soon(relay.ask, who, PIECE)
        nursery.start_soon(relay.ask, "bob", MAX_BODY // 2, "192.0.2.2")
        await trio.testing.wait_all_tasks_blocked()
        assert relay.answers == []
        relay.go.set()
    assert {status for _, status, _ in relay.answers} == {200}


async def test_what_was_held_is_free_once_it_is_answered() -> None:
    relay = Relay()
    relay.go.set()
    for _ in range(20):
        await relay.ask("alice", MAX_BODY)
    assert [status for _, status, _ in relay.answers] == [200] * 20
