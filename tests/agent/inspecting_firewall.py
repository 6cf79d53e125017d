"""A firewall that looks at TLS greetings and lets pass only what names HTTP as its application protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from relay.dispatch import peek_client_hello
from tests.agent.proxy_server import copy

HTTP = frozenset({"h2", "http/1.1", "http/1.0"})


@dataclass
class Firewall:
    """Connections to its port go on to ``target`` when all names in their greeting are in ``passing``; others are cut,
    or just swallowed when it is ``silent``. ``seen`` counts the lists of names."""

    target: int
    passing: Collection[str] = HTTP
    silent: bool = False
    port: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            hello = await peek_client_hello(stream.socket)
            self.seen[" ".join(hello.alpn)] += 1
            if not hello.alpn or not set(hello.alpn) <= set(self.passing):
                if self.silent:
                    await trio.sleep_forever()
                return
            onward = await trio.open_tcp_stream("127.0.0.1", self.target)
            async with onward, trio.open_nursery() as nursery:
                nursery.start_soon(copy, stream, onward)
                nursery.start_soon(copy, onward, stream)


@asynccontextmanager
async def firewall(target: int, **options: object) -> AsyncIterator[Firewall]:
    """A running one."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    made = Firewall(target, port=listener.socket.getsockname()[1], **options)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, made.serve, [listener])
        yield made
        nursery.cancel_scope.cancel()
