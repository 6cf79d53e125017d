"""Hypercorn's HTTP/1.1 and HTTP/2 where they would let one caller take memory, or end what others asked for.

A reverse proxy sends the requests of many people on one connection, so what is wrong with one of them ends that alone.
"""

from __future__ import annotations

import h2.errors
import h2.events
import h11
from hypercorn import events
from hypercorn import protocol as engine
from hypercorn.protocol import h2 as http2
from hypercorn.protocol import h11 as http1

_FRAME_HEADER = 9


def install() -> None:
    """Have Hypercorn use what is here. It has no setting for it."""
    http2.StreamBuffer = HeldBack  # type: ignore[misc]
    engine.H2Protocol = Streams  # type: ignore[attr-defined]
    engine.H11Protocol = Plain  # type: ignore[attr-defined]


class HeldBack(http2.StreamBuffer):
    """What an HTTP/2 stream has still to send. Hypercorn's own lets the application go on whenever little was taken at
    once, so that a caller with windows of one byte has whole answers, release files among them, kept in memory."""

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[: len(data)]
        if len(self.buffer) < http2.BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


class Streams(http2.H2Protocol):
    """HTTP/2 in which a request that cannot be served is answered 400, and what comes after an answer is passed over.
    Hypercorn's own ends the connection, with a traceback in the log."""

    async def handle(self, event: events.Event) -> None:
        await super().handle(event)
        if isinstance(event, events.RawData) and self._waits_for_too_much():
            self.connection.close_connection(h2.errors.ErrorCodes.FRAME_SIZE_ERROR)
            await self._flush()
            await self.send(events.Closed())

    def _waits_for_too_much(self) -> bool:
        """Whether a frame has begun that is longer than was agreed. h2 refuses it when it is complete, and keeps up to
        16 MiB of it until then."""
        waiting = self.connection.incoming_buffer._data
        longest = self.connection.max_inbound_frame_size
        return len(waiting) >= _FRAME_HEADER and int.from_bytes(waiting[:3], "big") > longest

    async def _handle_events(self, happened: list[h2.events.Event]) -> None:
        for event in happened:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                # It was answered. What else comes is the caller's, who gets the credit for it back.
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                await super()._handle_events([event])
        await self._flush()

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        values = dict(request.headers)
        method, path = values[b":method"], values.get(b":path")
        if path is not None and method.isascii() and path.isascii() and method.upper() != b"CONNECT":
            await super()._create_stream(request)
            return
        self.keep_alive_requests += 1
        self.connection.send_headers(request.stream_id, [(b":status", b"400")], end_stream=True)


class Plain(http1.H11Protocol):
    """HTTP/1.1 that stays HTTP/1.1. Hypercorn's own goes over to HTTP/2 for whoever asks with ``Upgrade: h2c``: behind
    a reverse proxy that passes upgrades on, which agents need, a caller would speak past it from there on, with
    whatever addresses in its header they like. Agents' WebSocket is not served here (`relay.upgrade`)."""

    async def _check_protocol(self, event: object) -> None:
        """HTTP/2 is agreed upon in the TLS greeting alone (RFC 9113, 3.1)."""

    async def _create_stream(self, request: h11.Request) -> None:
        names = {name for name, _ in request.headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # Whoever passed it on may have gone by the other one, and taken what follows for its body (RFC 9112, 6.1).
            await self._send_error_response(400)
            await self.send(events.Closed())
            return
        if b"upgrade" in names:
            kept = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"upgrade"]
            request = h11.Request(
                method=request.method, target=request.target, headers=kept, http_version=request.http_version
            )
        await super()._create_stream(request)
