"""What the transfer service needs of the links to agents (`relay.rendezvous.registry` provides it, tests fake it)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from protocol.control import AgentHello
from relay.rendezvous.registry import LinkDown, LinkUp


class AgentLinks(Protocol):
    """Calls to agents by node id. Errors are `protocol.errors.TowpathError`; an offline agent is a `RetryLater`."""

    def is_connected(self, node_id: str) -> bool: ...

    def hello(self, node_id: str) -> AgentHello | None: ...

    def address(self, node_id: str) -> str: ...

    def round_trip(self, node_id: str) -> float | None: ...

    async def call(
        self,
        node_id: str,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        document: object | None = None,
        timeout: float = 30.0,  # noqa: ASYNC109 - part of the registry's interface
        decide_again: Callable[[], Awaitable[object]] | None = None,
        caller: str = "",
    ) -> bytes: ...

    def stream(
        self, node_id: str, path: str, *, query: Sequence[tuple[str, str]] = ()
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    def changes(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[LinkUp | LinkDown]]:
        """Begins with a `LinkUp` for each agent that is there; the channel ends for a reader that lags behind."""
