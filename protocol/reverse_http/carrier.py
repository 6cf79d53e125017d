"""The thin shell around `core.Core`: three tasks that move its bytes, and a channel for each stream.

One task owns the reads, one the writes, one keeps the time. The reader never waits for anything but bytes, so it cannot
be held up by a slow reader of a body, by a full socket or by another stream.
"""

from __future__ import annotations

import errno
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import trio

from protocol.errors import ProtocolError, TowpathError
from protocol.reverse_http.core import (
    BodyEnded,
    ConnectionEnded,
    Core,
    DataArrived,
    ErrorCodes,
    Farewell,
    Happening,
    Headers,
    HeadersArrived,
    PlacesFreed,
    SettingsArrived,
    StreamReset,
    WindowOpened,
)
from protocol.reverse_http.errors import CallReset, LinkLost
from protocol.reverse_http.limits import Limits

_VANISHED = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}

READ_SIZE = 64 * 1024
WRITE_SIZE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection is over. ``retry_after`` is what the other side asked for, in seconds."""

    sentence: str
    retry_after: float | None = None
    # Whether the other side said goodbye, rather than the line going dead or the rules being broken.
    said: bool = False
    # Whether the other side, or the way to it, has vanished without a word.
    silent: bool = False


class Channel:
    """One stream as its reader and its writer see it."""

    __slots__ = ("_carrier", "_chunks", "_failure", "_on_failure", "_readable", "ended", "headers", "id", "writable")

    def __init__(self, carrier: Carrier, stream_id: int) -> None:
        self._carrier = carrier
        self._chunks: deque[bytes] = deque()
        self._readable = trio.lowlevel.ParkingLot()
        self._failure: TowpathError | None = None
        self._on_failure: Callable[[], None] | None = None
        self.id = stream_id
        self.headers: Headers | None = None
        # The peer's side of the stream is complete.
        self.ended = False
        self.writable = trio.lowlevel.ParkingLot()

    @property
    def failure(self) -> TowpathError | None:
        """Why the stream is over before its time."""
        return self._failure

    def when_failed(self, act: Callable[[], None]) -> None:
        """Call ``act`` once when the stream fails; at once if it has."""
        self._on_failure = act
        if self._failure is not None:
            act()

    def arrived(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._readable.unpark_all()

    def wake(self) -> None:
        self._readable.unpark_all()
        self.writable.unpark_all()

    def fail(self, failure: TowpathError) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        if not self.ended:
            # An unfinished body is of no use to anybody; let its memory go now.
            self._chunks.clear()
        self.wake()
        if self._on_failure is not None:
            self._on_failure()

    async def wait_headers(self) -> Headers:
        """The answer's headers. Raises what the stream failed with."""
        while self.headers is None:
            self.raise_failure()
            await self._readable.park()
        return self.headers

    async def read(self) -> bytes:
        """The next part of the body, empty at its end. Raises what the stream failed with."""
        while not self._chunks:
            if self.ended:
                return b""
            self.raise_failure()
            await self._readable.park()
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._carrier.consumed(self, len(data))
        return data

    @property
    def exhausted(self) -> bool:
        """Whether the whole body has been read."""
        return self.ended and not self._chunks

    async def wait_over(self, done: Callable[[], bool]) -> None:
        """Wait until the stream has failed or ``done`` says so after a `wake`."""
        await trio.lowlevel.checkpoint()
        while self._failure is None and not done():
            await self._readable.park()

    def raise_failure(self) -> None:
        """Raise what the stream failed with, if it has."""
        if self._failure is not None:
            # A new exception each time: the stored one would collect tracebacks of every task that meets it.
            raise type(self._failure)(self._failure.sentence, code=self._failure.code)


class Carrier:
    """Runs one connection over ``stream`` until either side ends it. `run` closes the stream."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        client: bool,
        limits: Limits,
        on_request: Callable[[Channel], None] | None = None,
        on_places: Callable[[int], None] | None = None,
    ) -> None:
        self.core = Core(client=client, limits=limits, now=trio.current_time())
        self.channels: dict[int, Channel] = {}
        self.closed = trio.Event()
        self.ending: Ending | None = None
        self.bytes_received = 0
        self.bytes_sent = 0
        self._stream = stream
        self._on_request = on_request
        # Called with the number of places set free, 0 when the capacity changed or the connection ended.
        self._on_places = on_places
        self._reading = trio.CancelScope()
        self._queued = trio.lowlevel.ParkingLot()
        self._drained = trio.lowlevel.ParkingLot()
        self._retimed = trio.Event()
        self._next_look = -math.inf
        # The peer is owed a reason for the end.
        self._leaving = False
        self._flushed = trio.Event()

    # --- life ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry until the connection ends, then close the stream. Never raises for what the peer does."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._keep_time)
                with self._reading:
                    await self._read()
                self.end(Ending("The other side closed the connection."))
                if self._leaving:
                    await self._take_leave()
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            # Only the farewell above can meet these: the connection is over in any case.
            pass
        finally:
            self.end(Ending("This side closed the connection."))
            self.closed.set()
            await trio.aclose_forcefully(self._stream)

    async def _take_leave(self) -> None:
        with trio.move_on_after(self.core.limits.flush):
            await self._flushed.wait()
            # Closing a socket with unread bytes makes the kernel throw away what was sent last, which is the reason
            # for closing.
            while await self._stream.receive_some(READ_SIZE):
                pass

    def end(self, ending: Ending) -> None:
        """Nothing is carried from now on; the first reason counts. Everything that waits fails with it."""
        if self.ending is not None:
            return
        self.ending = ending
        self.core.closed = True
        self._reading.cancel()
        for channel in list(self.channels.values()):
            channel.fail(LinkLost(f"The connection between relay and agent ended: {ending.sentence}"))
        self.channels.clear()
        for lot in (self._queued, self._drained):
            lot.unpark_all()
        if self._on_places is not None:
            self._on_places(0)

    def close(self, sentence: str, *, retry_after: float | None = None) -> None:
        """Tell the peer why, and end."""
        self.core.close(Farewell(sentence, retry_after))
        self._leaving = self._leaving or self.ending is None
        self.end(Ending(sentence, retry_after))

    def raise_ended(self) -> NoReturn:
        """Raise what everything on this connection fails with."""
        reason = self.ending.sentence if self.ending is not None else "It is being closed."
        raise LinkLost(f"The connection between relay and agent ended: {reason}")

    # --- the three tasks -------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            try:
                data = await self._stream.receive_some(READ_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.end(_broken(error))
                return
            if not data:
                return
            self.bytes_received += len(data)
            try:
                happened = self.core.receive_untrusted(bytes(data), trio.current_time())
            except ProtocolError as error:
                self._leaving = True
                self.end(Ending(error.sentence))
                return
            for happening in happened:
                self._dispatch(happening)
            if self.ending is not None:
                return
            self._poke()

    async def _write(self) -> None:
        try:
            while True:
                data = self.core.take(WRITE_SIZE)
                if data:
                    await self._stream.send_all(data)
                    self.bytes_sent += len(data)
                    if not self.core.queue_full:
                        self._drained.unpark_all()
                elif self.ending is not None:
                    return
                else:
                    await self._queued.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.end(_broken(error))
        finally:
            self._flushed.set()

    async def _keep_time(self) -> None:
        while self.core.tick(now := trio.current_time()):
            if self.core.closed:
                return
            self._poke()
            self._retimed = trio.Event()
            self._next_look = max(now, self.core.pings.deadline())
            with trio.move_on_at(self._next_look):
                await self._retimed.wait()
        seconds = self.core.pings.silence(now)
        self.end(Ending(f"The other side was silent for {seconds:.0f} seconds.", silent=True))

    def watch(self, interval: float) -> None:
        """Send a PING after so many seconds of silence from now on; after twice as many the peer is dead."""
        self.core.pings.watch(interval)
        self._retime()

    def _retime(self) -> None:
        """Look at the clock earlier than was thought, if that is so."""
        if self.core.pings.deadline() < self._next_look:
            self._retimed.set()

    def _poke(self) -> None:
        if self.core.queued:
            self._queued.unpark_all()

    # --- what happened ---------------------------------------------------------------------------------------

    def _dispatch(self, happening: Happening) -> None:
        match happening:
            case DataArrived(stream_id, data):
                if (channel := self.channels.get(stream_id)) is not None:
                    channel.arrived(data)
                else:
                    self.core.consumed(stream_id, len(data))
            case HeadersArrived(stream_id, headers):
                self._headers_arrived(stream_id, headers)
            case BodyEnded(stream_id):
                if (channel := self.channels.get(stream_id)) is not None:
                    channel.ended = True
                    channel.wake()
            case StreamReset(stream_id, code):
                self._reset_arrived(stream_id, code)
            case WindowOpened(stream_id):
                self._window_opened(stream_id)
            case SettingsArrived():
                self._window_opened(0)
                for channel in self.channels.values():
                    channel.writable.unpark_all()
                self._places(0)
            case PlacesFreed(count):
                self._retimed.set()
                self._places(count)
            case ConnectionEnded(said):
                sentence = said.sentence or "The other side said goodbye."
                self.end(Ending(sentence, said.retry_after, said=True))

    def _headers_arrived(self, stream_id: int, headers: Headers) -> None:
        channel = self.channels.get(stream_id)
        if channel is None and self._on_request is not None:
            channel = self.add(stream_id)
            channel.headers = headers
            self._on_request(channel)
        elif channel is not None:
            channel.headers = headers
            channel.wake()

    def _reset_arrived(self, stream_id: int, code: int) -> None:
        channel = self.channels.get(stream_id)
        if channel is None:
            return
        if self.core.client and channel.ended:
            # The answer is complete; the server only wants no more of the request (RFC 9113 section 8.1).
            channel.wake()
        else:
            channel.fail(_reset(code))

    def _window_opened(self, stream_id: int) -> None:
        if stream_id == 0:
            self._drained.unpark_all()
        elif (channel := self.channels.get(stream_id)) is not None:
            channel.writable.unpark_all()

    def _places(self, count: int) -> None:
        if self._on_places is not None:
            self._on_places(count)

    # --- for both ends ---------------------------------------------------------------------------------------

    def add(self, stream_id: int) -> Channel:
        """A channel for a stream that just began."""
        channel = self.channels[stream_id] = Channel(self, stream_id)
        return channel

    def start(self, headers: Headers, *, end: bool) -> Channel:
        """Begin a request."""
        channel = self.add(self.core.open(headers, trio.current_time(), end=end))
        self._poke()
        self._retime()
        return channel

    def respond(self, channel: Channel, headers: Headers, *, end: bool) -> None:
        """Begin an answer; nothing happens when the stream is over."""
        if channel.failure is None and self.core.is_open(channel.id):
            self.core.respond(channel.id, headers, end=end)
            self._poke()

    def consumed(self, channel: Channel, size: int) -> None:
        self.core.consumed(channel.id, size)
        self._poke()

    def send_now(self, channel: Channel, data: memoryview, *, end: bool) -> int:
        """Queue as much of ``data`` as the windows and the queue take; returns how much. ``end`` goes with its end."""
        sent = 0
        while not self.core.queue_full:
            room = self.core.room(channel.id)
            piece = data[sent : sent + max(0, room)]
            last = sent + len(piece) == len(data)
            if not piece and not (last and end):
                break
            self.core.send_data(channel.id, piece, trio.current_time(), end=end and last)
            sent += len(piece)
            if last:
                break
        self._poke()
        return sent

    async def send(self, channel: Channel, data: bytes, *, end: bool) -> None:
        """Send part of a body and, with ``end``, finish it. Waits for the windows; raises what the stream failed with.

        When cancelled, part of ``data`` may have been sent.
        """
        view = memoryview(data)
        while view or end:
            if channel.failure is not None:
                channel.raise_failure()
            if not self.core.is_open(channel.id):
                raise LinkLost("The stream is over.")
            room = self.core.room(channel.id)
            if self.core.queue_full or (view and self.core.connection_room <= 0):
                await self._drained.park()
            elif view and room <= 0:
                await channel.writable.park()
            else:
                piece = view[:room]
                view = view[len(piece) :]
                self.core.send_data(channel.id, piece, trio.current_time(), end=end and not view)
                self._poke()
                self._retime()
                if not view:
                    break
                # One frame a turn, so that every stream that has something to send gets its share.
                await trio.lowlevel.checkpoint()

    def drop(self, channel: Channel, code: ErrorCodes = ErrorCodes.CANCEL) -> bool:
        """Forget a stream, resetting it when it is unfinished. True when its place waits for a fence."""
        self.channels.pop(channel.id, None)
        was_reset = self.core.reset(channel.id, code)
        if was_reset:
            channel.fail(CallReset("The call was given up."))
            self._poke()
            self._retimed.set()
        return was_reset


def _broken(error: BaseException) -> Ending:
    """Why a stream broke. The kernel gives up on a peer that acknowledges nothing with a time-out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _VANISHED:
            return Ending("The other side cannot be reached any more.", silent=True)
        cause = cause.__cause__ or cause.__context__
    return Ending("The connection broke.")


def _reset(code: int) -> TowpathError:
    if code == ErrorCodes.REFUSED_STREAM:
        return CallReset("The other side has too many calls under way; try again in a moment.", code="BUSY")
    return CallReset(f"The other side gave the call up (HTTP/2 code {code}).")
