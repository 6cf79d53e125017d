"""A network between two agents that changes a bit of what it carries, below TLS."""

from __future__ import annotations

import functools

import msgspec
import trio

from protocol.client_hello import parse_client_hello_untrusted
from protocol.control import SessionAnswer
from protocol.session import ALPN_LANE

_CHUNK = 65536


class FlippingProxy:
    """Carries connections to one place. In the n-th lane (from 1), or in a control stream (0), one bit of what comes
    from there is flipped after so many bytes, as ``flips`` says; each is done once. Which comes first is not said:
    control stream and first lane are dialled together."""

    def __init__(self, nursery: trio.Nursery, flips: dict[int, int]) -> None:
        self.flips = dict(flips)
        self.done: list[int] = []
        self.connections = 0
        self._lanes = 0
        self._nursery = nursery
        self._ports: dict[tuple[str, int], int] = {}

    async def stand_before(self, host: str, port: int) -> int:
        """Listen for connections to this place. The port."""
        listeners = await self._nursery.start(
            functools.partial(trio.serve_tcp, functools.partial(self._carry, host, port), 0, host="127.0.0.1")
        )
        own: int = listeners[0].socket.getsockname()[1]
        self._ports[(host, port)] = own
        return own

    def detour(self, answer: SessionAnswer) -> SessionAnswer:
        """The answer of a source with our port in the place of its own."""
        candidates = [
            msgspec.structs.replace(candidate, port=self._ports[(candidate.host, candidate.port)])
            for candidate in answer.candidates
            if (candidate.host, candidate.port) in self._ports
        ]
        assert candidates
        return msgspec.structs.replace(answer, candidates=candidates)

    async def _carry(self, host: str, port: int, stream: trio.SocketStream) -> None:
        self.connections += 1
        async with stream, await trio.open_tcp_stream(host, port) as behind, trio.open_nursery() as nursery:
            try:
                number = await self._greeting(stream, behind)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            nursery.start_soon(self._pump, stream, behind, None, nursery.cancel_scope)
            nursery.start_soon(self._pump, behind, stream, number, nursery.cancel_scope)

    async def _greeting(self, stream: trio.SocketStream, behind: trio.SocketStream) -> int:
        """Carry the TLS greeting, and tell from it which connection this is."""
        greeting = b""
        while data := await stream.receive_some(_CHUNK):
            await behind.send_all(data)
            greeting += data
            hello = parse_client_hello_untrusted(greeting)
            if hello is not None and ALPN_LANE in hello.alpn:
                self._lanes += 1
                return self._lanes
            if hello is not None:
                break
        return 0

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, number: int | None, scope: trio.CancelScope
    ) -> None:
        passed = 0
        try:
            while data := await source.receive_some(_CHUNK):
                passed += len(data)
                if number in self.flips and passed > self.flips[number]:
                    del self.flips[number]
                    self.done.append(number)
                    changed = bytearray(data)
                    changed[len(changed) // 2] ^= 0x10
                    data = bytes(changed)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            # One end is gone; so is the other.
            pass
        scope.cancel()
