"""The asking end of the link, which is the relay: HTTP/2 client on a connection that the agent dialled."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from protocol.errors import ProtocolError
from protocol.reverse_http.carrier import Carrier, Channel, Ending
from protocol.reverse_http.core import ErrorCodes, Header, Headers
from protocol.reverse_http.errors import AnswerTooLarge, CallReset, CallTimeout, LinkLost
from protocol.reverse_http.headers import field, request_headers
from protocol.reverse_http.limits import DEFAULT_LIMITS, Limits


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """One connection so far. ``held`` counts places of abandoned calls that the server has not confirmed."""

    connected_since: float
    requests: int
    answered: int
    timeouts: int
    abandoned: int
    under_way: int
    held: int
    bytes_received: int
    bytes_sent: int


class StreamingResponse:
    """An answer whose body is read as it comes: iterate over it, once. Leaving the context gives the rest up."""

    def __init__(self, status: int, headers: Headers, channel: Channel) -> None:
        self.status = status
        self.headers = headers
        self._channel = channel

    def __aiter__(self) -> StreamingResponse:
        return self

    async def __anext__(self) -> bytes:
        """The next part of the body. Raises `LinkLost` or `CallReset` when it will not be complete."""
        data = await self._channel.read()
        if not data:
            raise StopAsyncIteration
        return data

    async def read(self, most: int) -> bytes:
        """The whole body. Raises `AnswerTooLarge` when it is longer than ``most`` bytes."""
        body = bytearray()
        async for chunk in self:
            body += chunk
            if len(body) > most:
                raise AnswerTooLarge(f"The agent's answer is longer than the {most} bytes expected.")
        return bytes(body)


class Client:
    """Makes calls on one connection. Safe to use from many tasks; made by `connect`."""

    def __init__(self, stream: trio.abc.Stream, limits: Limits, nursery: trio.Nursery) -> None:
        self._limits = limits
        self._nursery = nursery
        self._used = 0
        self._turnstile = trio.lowlevel.ParkingLot()
        self._since = trio.current_time()
        self._requests = self._answered = self._timeouts = self._abandoned = 0
        self._draining = False
        self._quiet = trio.Event()
        self._senders: dict[int, trio.CancelScope] = {}
        self._carrier = Carrier(stream, client=True, limits=limits, on_places=self._places_freed)

    # --- life ------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> trio.Event:
        """Set once the connection is over, whoever ended it."""
        return self._carrier.closed

    @property
    def ending(self) -> Ending | None:
        """Why the connection is over; None while it is not."""
        return self._carrier.ending

    def close(self, sentence: str = "The relay closed the link.", *, retry_after: float | None = None) -> None:
        """End the connection and tell the agent why and, if wanted, when to come back (seconds)."""
        self._carrier.close(sentence, retry_after=retry_after)

    def watch(self, interval: float) -> None:
        """Have the agent asked for a sign of life after so many seconds of silence; after twice as many it is gone."""
        self._carrier.watch(interval)

    def statistics(self) -> ClientStatistics:
        """Counts since the connection began."""
        held = self._carrier.core.pings.held
        return ClientStatistics(
            connected_since=self._since,
            requests=self._requests,
            answered=self._answered,
            timeouts=self._timeouts,
            abandoned=self._abandoned,
            under_way=max(0, self._used - held),
            held=held,
            bytes_received=self._carrier.bytes_received,
            bytes_sent=self._carrier.bytes_sent,
        )

    # --- calls -----------------------------------------------------------------------------------------------

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: Iterable[Header] = (),
        body: bytes = b"",
        timeout: float = 30.0,  # noqa: ASYNC109 - part of the call, as in every HTTP client
        max_body: int | None = None,
    ) -> Response:
        """One call and its whole answer.

        ``target`` is the percent-encoded path with its query. Raises `CallTimeout` when the answer is not complete
        after ``timeout`` seconds, `CallReset`, `LinkLost`, `AnswerTooLarge`, and ValueError for a malformed request.
        Time-out and cancellation reset this one stream and leave the connection as it was.
        """
        most = self._limits.max_body if max_body is None else max_body
        response: Response | None = None
        with trio.move_on_after(timeout):
            async with self.stream(method, target, headers=headers, body=body, timeout=math.inf) as answer:
                response = Response(answer.status, answer.headers, await answer.read(most))
        if response is None:
            raise self._timed_out(method, target, timeout)
        return response

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        *,
        headers: Iterable[Header] = (),
        body: bytes = b"",
        timeout: float = 30.0,  # noqa: ASYNC109 - part of the call, as in every HTTP client
    ) -> AsyncIterator[StreamingResponse]:
        """One call whose answer is read as it comes; ``timeout`` is for its headers only. Raises as `request` does."""
        length = len(body) if body or method in ("POST", "PUT") else None
        fields = request_headers(method, target, headers, length, self._limits.max_header_list)
        answer: StreamingResponse | None = None
        with trio.move_on_after(timeout):
            await self._take_place()
            channel = self._begin(fields, body)
            try:
                arrived = await channel.wait_headers()
                answer = StreamingResponse(_status_untrusted(arrived), arrived, channel)
            finally:
                if answer is None:
                    self._finish(channel)
        if answer is None:
            raise self._timed_out(method, target, timeout)
        try:
            yield answer
        finally:
            self._finish(channel)

    def _timed_out(self, method: str, target: str, timeout: float) -> CallTimeout:
        self._timeouts += 1
        path = target.partition("?")[0]
        return CallTimeout(f"The agent did not answer {method} {path[:200]} within {timeout:g} seconds.")

    def _begin(self, fields: list[Header], body: bytes) -> Channel:
        try:
            channel = self._carrier.start(fields, end=not body)
        except BaseException:
            self._give_place()
            raise
        self._requests += 1
        if body:
            view = memoryview(body)
            sent = self._carrier.send_now(channel, view, end=True)
            if sent < len(body):
                scope = self._senders[channel.id] = trio.CancelScope()
                self._nursery.start_soon(self._send_rest, channel, bytes(view[sent:]), scope)
        return channel

    async def _send_rest(self, channel: Channel, rest: bytes, scope: trio.CancelScope) -> None:
        # The reader of the answer meets the same failure; there is nobody else to tell.
        with scope:
            try:
                await self._carrier.send(channel, rest, end=True)
            except (LinkLost, CallReset):
                return

    def _finish(self, channel: Channel) -> None:
        if (sender := self._senders.pop(channel.id, None)) is not None:
            sender.cancel()
        complete = channel.exhausted and channel.failure is None
        # A server may answer before it has taken the whole request.
        code = ErrorCodes.NO_ERROR if complete else ErrorCodes.CANCEL
        if complete:
            self._answered += 1
        else:
            self._abandoned += 1
        if not self._carrier.drop(channel, code):
            self._give_place()
        # Otherwise the place stays taken until the server has confirmed the reset.
        self._hush()

    # --- places ----------------------------------------------------------------------------------------------

    async def _take_place(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open()
        if self._used < self._carrier.core.capacity and not self._turnstile:
            self._used += 1
            return
        # Whoever sets a place free hands it over with the wake-up, so the order of arrival is kept.
        await self._turnstile.park()
        try:
            self._check_open()
        except BaseException:
            self._give_place()
            raise

    def _check_open(self) -> None:
        if self._carrier.ending is not None:
            self._carrier.raise_ended()
        if self._carrier.core.exhausted:
            if not self._draining:
                self._draining = True
                self._hush()
                self._nursery.start_soon(self._drain)
            raise LinkLost("The link is being renewed; try again in a moment.")

    def _give_place(self) -> None:
        self._used -= 1
        self._admit()

    def _places_freed(self, count: int) -> None:
        self._used -= count
        self._admit()

    def _admit(self) -> None:
        ended = self._carrier.ending is not None
        while self._turnstile and (ended or self._used < self._carrier.core.capacity):
            self._used += 1
            self._turnstile.unpark()

    def _hush(self) -> None:
        if self._draining and not self._carrier.channels:
            self._quiet.set()

    async def _drain(self) -> None:
        # Stream ids cannot be used again (RFC 9113 section 5.1.1): let the calls under way end, then have the agent
        # dial anew.
        with trio.move_on_after(self._limits.drain):
            await self._quiet.wait()
        self.close("All stream ids of this link are used up.", retry_after=0.0)


def _status_untrusted(headers: Headers) -> int:
    status = field(headers, b":status")
    if status is None or len(status) != 3 or not status.isdigit():
        raise ProtocolError("The agent answered without a status.")
    return int(status)


@asynccontextmanager
async def connect(stream: trio.abc.Stream, *, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Client]:
    """Be the HTTP/2 client on ``stream``, which is secured already. Leaving the context closes the stream."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        client = Client(stream, limits, nursery)
        nursery.start_soon(client._carrier.run)
        try:
            yield client
        except Exception as error:
            # Carried past the nursery, which would wrap it in a group.
            failure = error
        client.close()
        await client.closed.wait()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
