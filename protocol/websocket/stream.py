"""A trio stream inside WebSocket on another trio stream that is secured already."""

from __future__ import annotations

import trio

from protocol.errors import ProtocolError
from protocol.websocket.core import FEED, Core

OPEN_TIMEOUT = 15.0
_FAREWELL = 1.0


class WebSocketStream(trio.abc.HalfCloseableStream):
    """See `open_stream`. One task may receive while another sends. A peer that goes without the end of its stream, or
    breaks the rules, is a BrokenResourceError."""

    def __init__(self, transport_stream: trio.abc.Stream, core: Core) -> None:
        self.transport_stream = transport_stream
        self._core = core
        self._sending = trio.Lock()

    def header(self, name: str) -> tuple[str, ...]:
        """The values of a header of the client's request, in their order; whoever is on the way can have added some."""
        return self._core.header(name)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """The next part of the stream, empty at its end."""
        core = self._core
        while not core.incoming:
            if core.peer_ended:
                return b""
            await self._feed()
        data = core.incoming.popleft()
        if max_bytes is not None and len(data) > max_bytes:
            core.incoming.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        return data

    async def _feed(self) -> None:
        data = await self.transport_stream.receive_some(FEED)
        core = self._core
        try:
            core.receive_untrusted(bytes(data), trio.current_time())
        except ProtocolError as error:
            with trio.move_on_after(_FAREWELL):
                await self.flush()
            raise trio.BrokenResourceError(error.sentence) from error
        if data:
            # Pongs, or the answer to a goodbye.
            await self.flush()
        if not core.is_open and not core.incoming and not core.peer_ended:
            raise trio.BrokenResourceError("The WebSocket connection ended.")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send a part of the stream; waits while the peer takes nothing."""
        self._check()
        self._core.send(data)
        await self.flush()

    async def wait_send_all_might_not_block(self) -> None:
        """Waits for whatever is being sent."""
        async with self._sending:
            await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """This side's stream is complete; the peer's goes on."""
        self._core.end()
        await self.flush()

    async def ping(self) -> None:
        """Show the peer that this side is there, whatever else is held up."""
        self._core.ping()
        await self.flush()

    async def wait_closed(self) -> None:
        """Behind the end of the peer's stream: answer pings and the goodbye until the connection is closed."""
        try:
            while self._core.is_open:
                await self._feed()
        except trio.BrokenResourceError:
            # Gone without a goodbye; its stream was complete.
            return

    async def aclose(self) -> None:
        """Say goodbye if that is possible at once, and close."""
        try:
            with trio.move_on_after(_FAREWELL):
                self._core.close()
                await self.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await self.transport_stream.aclose()

    def _check(self) -> None:
        if not self._core.is_open or self._core.ended:
            raise trio.BrokenResourceError("The WebSocket connection ended.")

    async def flush(self) -> None:
        """Send what the protocol itself has to say."""
        async with self._sending:
            data = self._core.take()
            if data:
                await self.transport_stream.send_all(data)


async def open_stream(transport_stream: trio.abc.Stream, core: Core, first: bytes = b"") -> WebSocketStream:
    """Run the opening handshake of either end; ``first``, at most `FEED` bytes, was read off the stream already.

    Raises `ProtocolError` (the caller of a server has been told by then), `WebSocketRefused` (a client's), and what
    the stream raises. The caller closes the stream then.
    """
    stream = WebSocketStream(transport_stream, core)
    with trio.move_on_after(OPEN_TIMEOUT):
        await stream.flush()
        while core.is_opening:
            data = first or bytes(await transport_stream.receive_some(FEED))
            first = b""
            try:
                core.receive_untrusted(data, trio.current_time())
            finally:
                with trio.move_on_after(_FAREWELL):
                    await stream.flush()
            if not data:
                raise trio.BrokenResourceError("The connection ended while WebSocket was opening.")
        return stream
    raise ProtocolError("WebSocket did not open in time.")
