"""The answering end of the link, which is the agent: an HTTP/2 server that runs an ASGI 3 application."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import trio

from protocol.errors import ItemFailed, RetryLater, TowpathError
from protocol.reverse_http.carrier import Carrier, Channel, Ending
from protocol.reverse_http.core import ErrorCodes, Header
from protocol.reverse_http.errors import CallReset, LinkLost
from protocol.reverse_http.headers import checked_headers, field
from protocol.reverse_http.limits import DEFAULT_LIMITS, Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApplication = Callable[[Scope, Receive, Send], Awaitable[None]]

_logger = logging.getLogger("towpath.link")


class CallerLeft(OSError):
    """What `send` raises once nobody waits for the answer, as ASGI asks of servers."""


async def serve(
    stream: trio.abc.Stream,
    app: ASGIApplication,
    *,
    limits: Limits = DEFAULT_LIMITS,
    state: dict[str, Any] | None = None,
    on_carrier: Callable[[Carrier], None] | None = None,
) -> Ending:
    """Serve ``app`` on ``stream``, which is secured already, until the connection ends; says why it ended.

    Each request is one task. A request whose caller left gets ``http.disconnect``, and is cancelled when it still
    runs `Limits.handler_grace` seconds later; so is every request when the connection ends. Cancelling `serve` cancels
    all requests and closes the stream. ``on_carrier`` receives the connection, for `Carrier.close`.
    """
    server = _Server(app, limits, state or {})
    async with trio.open_nursery() as handlers:
        carrier = Carrier(
            stream, client=False, limits=limits, on_request=lambda channel: server.begin(carrier, channel, handlers)
        )
        if on_carrier is not None:
            on_carrier(carrier)
        await carrier.run()
    return carrier.ending or Ending("The connection ended.")


class _Server:
    def __init__(self, app: ASGIApplication, limits: Limits, state: dict[str, Any]) -> None:
        self.app = app
        self.limits = limits
        self.state = state
        self._running = 0

    def begin(self, carrier: Carrier, channel: Channel, handlers: trio.Nursery) -> None:
        # Handlers whose stream was reset count until they have ended: otherwise a caller that resets at once could
        # start any number of them.
        if self._running >= self.limits.max_streams:
            carrier.drop(channel, ErrorCodes.REFUSED_STREAM)
            return
        self._running += 1
        handlers.start_soon(self._handle, carrier, channel)

    async def _handle(self, carrier: Carrier, channel: Channel) -> None:
        exchange = _Exchange(carrier, channel, self.limits)
        try:
            await exchange.run(self.app, self.state)
        finally:
            self._running -= 1
            carrier.drop(channel, ErrorCodes.NO_ERROR if exchange.complete else ErrorCodes.INTERNAL_ERROR)


class _Exchange:
    """One request and its answer, as ASGI's ``receive`` and ``send`` see them."""

    def __init__(self, carrier: Carrier, channel: Channel, limits: Limits) -> None:
        self._carrier = carrier
        self._channel = channel
        self._limits = limits
        self._headers = list(channel.headers or ())
        self._method = (field(self._headers, b":method") or b"").decode("ascii", "replace")
        self._received = 0
        self._body_done = False
        self._refused = False
        self._start: Message | None = None
        self._declared: int | None = None
        self._sent = 0
        self.complete = False

    # --- running ---------------------------------------------------------------------------------------------

    async def run(self, app: ASGIApplication, state: dict[str, Any]) -> None:
        scope = self._scope(state)
        with trio.CancelScope() as cancel:

            def caller_left() -> None:
                cancel.deadline = trio.current_time() + self._limits.handler_grace

            self._channel.when_failed(caller_left)
            if self._too_large(field(self._headers, b"content-length")):
                await self._answer_error(413, _too_large(self._limits.max_body))
                return
            try:
                await app(scope, self.receive, self.send)
            except Exception as error:
                await self._application_failed(error)
                return
            if self._start is None and not self._refused and self._channel.failure is None:
                _logger.error("No answer was made to %s %s.", self._method, scope["path"])
                await self._answer_error(500, RetryLater("The agent made no answer.", code="INTERNAL_ERROR"))

    async def _application_failed(self, error: Exception) -> None:
        if (self._channel.failure is not None or self._refused) and _is_departure(error):
            _logger.debug("The caller of %s left.", self._method)
        else:
            _logger.error("A request from the relay failed.", exc_info=error)
            if self._start is None:
                await self._answer_error(500, RetryLater("The agent met an internal error.", code="INTERNAL_ERROR"))

    async def _answer_error(self, status: int, error: TowpathError) -> None:
        body = msgspec.json.encode(error.to_document())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        try:
            await self.send({"type": "http.response.start", "status": status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
        except CallerLeft:
            return

    def _scope(self, state: dict[str, Any]) -> Scope:
        target = field(self._headers, b":path") or b"/"
        raw_path, _, query = target.partition(b"?")
        headers = [(name, value) for name, value in self._headers if not name.startswith(b":")]
        if (authority := field(self._headers, b":authority")) is not None:
            headers = [(b"host", authority), *((n, v) for n, v in headers if n != b"host")]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "2",
            "method": self._method,
            "scheme": "https",
            "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
            "state": state.copy(),
            "extensions": {},
        }

    # --- the request's body ----------------------------------------------------------------------------------

    def _too_large(self, length: bytes | None) -> bool:
        return length is not None and length.isdigit() and int(length[:20]) > self._limits.max_body

    async def receive(self) -> Message:
        """ASGI receive. After the body it waits for the caller to leave or the answer to be complete."""
        if self._body_done:
            await self._channel.wait_over(lambda: self.complete)
            return {"type": "http.disconnect"}
        try:
            data = await self._channel.read()
        except (LinkLost, CallReset):
            self._body_done = True
            return {"type": "http.disconnect"}
        self._received += len(data)
        if self._received > self._limits.max_body:
            return await self._refuse_body()
        self._body_done = self._channel.exhausted
        return {"type": "http.request", "body": data, "more_body": not self._body_done}

    async def _refuse_body(self) -> Message:
        self._body_done = True
        if self._start is None:
            await self._answer_error(413, _too_large(self._limits.max_body))
        self._refused = True
        return {"type": "http.disconnect"}

    # --- the answer ------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """ASGI send. Waits for flow control; raises `CallerLeft` when the caller has gone."""
        if self._channel.failure is not None or self._refused:
            raise CallerLeft("The caller has left.")
        kind = message["type"]
        if kind == "http.response.start" and self._start is None:
            self._begin_answer(message)
        elif kind == "http.response.body" and self._start is not None and not self.complete:
            await self._send_body(bytes(message.get("body", b"")), bool(message.get("more_body", False)))
        else:
            raise RuntimeError(f"The message {kind!r} has no place here.")

    def _begin_answer(self, message: Message) -> None:
        status = int(message["status"])
        if not 200 <= status <= 599:
            raise ValueError(f"{status} is no final HTTP status.")
        headers: list[Header] = checked_headers(message.get("headers", ()), self._limits.max_header_list - 64)
        length = field(headers, b"content-length")
        if length is not None:
            if not length.isdigit():
                raise ValueError("The content-length is no number.")
            self._declared = int(length)
        self._start = message
        self._carrier.respond(self._channel, [(b":status", str(status).encode()), *headers], end=False)

    async def _send_body(self, data: bytes, more: bool) -> None:
        assert self._start is not None
        if self._method == "HEAD" or self._start["status"] in (204, 304):
            data = b""
        else:
            self._sent += len(data)
            if self._declared is not None and (
                self._sent > self._declared or (not more and self._sent < self._declared)
            ):
                raise RuntimeError(f"The answer's body does not have the {self._declared} bytes it declared.")
        if not data and more:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._carrier.send(self._channel, data, end=not more)
        except (LinkLost, CallReset) as error:
            raise CallerLeft("The caller has left.") from error
        if not more:
            self.complete = True
            self._channel.wake()


def _too_large(most: int) -> ItemFailed:
    return ItemFailed(f"The request is longer than {most} bytes, the most allowed.", code="TOO_LARGE")


def _is_departure(error: BaseException) -> bool:
    """Whether an error, or all of a group, says only that the caller left."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_departure(one) for one in error.exceptions)
    return isinstance(error, OSError) or type(error).__name__ == "ClientDisconnect"
