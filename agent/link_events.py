"""What of a request on the link lasts: the answer that has no end, and noticing that nobody waits for one any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.control import AgentEvent, encode


class EventLines(Response):
    """Event lines without end, until the relay leaves. Whichever way that is noticed, the reader has ended when this
    returns; an iterator handed to a streaming response would end when it is collected."""

    media_type = "application/x-ndjson"

    def __init__(self, events: AbstractAsyncContextManager[AsyncIterator[AgentEvent]]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_disconnected, receive, nursery.cancel_scope)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with self._events as events:
                async for event in events:
                    line = encode(event) + b"\n"
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            nursery.cancel_scope.cancel()


async def until_disconnected(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel a scope once whoever asked has left. What is still to be read of the request is thrown away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
