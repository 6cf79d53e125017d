"""A small HTTP proxy that knows CONNECT and basic authentication, for tests."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio


@dataclass
class ProxyServer:
    """``asked`` holds the targets of all requests; ``answer`` replaces what it would answer; ``credentials`` are
    required when set; ``allowed`` names the only targets it connects to."""

    port: int = 0
    credentials: str = ""
    answer: bytes = b""
    allowed: set[str] | None = None
    asked: list[str] = field(default_factory=list)
    connected: int = 0
    # From now on nothing goes through, and nobody is told.
    swallows: bool = False

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            head = b""
            while b"\r\n\r\n" not in head:
                more = await stream.receive_some(4096)
                if not more:
                    return
                head += more
            request, *lines = head.decode().split("\r\n")
            method, target, _ = request.split(" ")
            assert method == "CONNECT"
            self.asked.append(target)
            headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
            authorization = "basic " + base64.b64encode(self.credentials.encode()).decode().lower()
            if self.answer:
                await stream.send_all(self.answer)
                await stream.receive_some(1)
            elif self.credentials and headers.get("proxy-authorization") != authorization:
                await stream.send_all(b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n')
            elif self.allowed is not None and target not in self.allowed:
                await stream.send_all(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            else:
                await self._connect(stream, target)

    async def _connect(self, stream: trio.SocketStream, target: str) -> None:
        host, _, port = target.rpartition(":")
        try:
            onward = await trio.open_tcp_stream(host.strip("[]"), int(port))
        except OSError:
            await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        self.connected += 1
        async with onward, trio.open_nursery() as nursery:
            await stream.send_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
            if await self.begin(stream, onward):
                nursery.start_soon(copy, stream, onward, self)
                nursery.start_soon(copy, onward, stream, self)

    async def begin(self, stream: trio.SocketStream, onward: trio.SocketStream) -> bool:
        """Whether the connection may go on, once the client knows that it is made."""
        await trio.lowlevel.checkpoint()
        return True


async def copy(source: trio.SocketStream, target: trio.SocketStream, through: ProxyServer | None = None) -> None:
    """One direction, to its end."""
    try:
        while data := await source.receive_some(256 * 1024):
            if through is None or not through.swallows:
                await target.send_all(data)
        await target.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await target.aclose()


@asynccontextmanager
async def proxy_server(**options: object) -> AsyncIterator[ProxyServer]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = ProxyServer(listener.socket.getsockname()[1], **options)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server
        nursery.cancel_scope.cancel()
