"""The destination's end of a control stream: requests to the source and their answers, many at a time.

One task reads, one task writes, one keeps the stream alive; callers wait for the answer that carries their number. When
the stream dies everybody waiting gets `SessionLost`, and the whole session is begun anew by whoever runs it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import trio

from agent.transfer.asking.outgoing import send_queued
from agent.transfer.basis.holes import check_extents_untrusted
from agent.transfer.basis.stopping import first_error
from protocol import session
from protocol.errors import ItemFailed, ProtocolError, RetryLater, TowpathError, error_from_document_untrusted
from protocol.session_checks import check_readings_untrusted

A = TypeVar("A")

_CHUNK = 256 * 1024
HELLO_TIMEOUT = 30.0
ANSWER_TIMEOUT = 120.0
# Digesting a large file takes as long as reading it; only the death of the session ends the wait.
DIGEST_TIMEOUT = math.inf
_OUTGOING = 10_000


class SessionLost(RetryLater):
    """The connection to the source is gone; a new session goes on from the journal."""

    default_code = "CONNECTION_LOST"


class SourceSession:
    """One live control stream. Run `run` in a nursery; every other method may be called meanwhile."""

    def __init__(self, stream: trio.abc.Stream, instance: bytes) -> None:
        self.instance = instance
        # What the source announced; unknown ones are never used.
        self.abilities: frozenset[str] = frozenset()
        # Whether names that begin with a dot may be there although they are not listed.
        self.hides = False
        self._stream = stream
        self._next = 1
        self._waiting: dict[int, trio.MemorySendChannel[session.Answer]] = {}
        # Listings that were asked for before anybody wanted them.
        self._ahead: dict[tuple[bytes, bool], tuple[int, trio.MemoryReceiveChannel[session.Answer]]] = {}
        self._send_out, self._receive_out = trio.open_memory_channel[bytes](_OUTGOING)
        self._heard = 0.0
        self._lost: TowpathError | None = None
        self._accepted = trio.Event()
        self._on_accepted: Callable[[], None] = lambda: None
        # Whether the source takes requests for a lane that has not greeted it yet.
        self.ahead = False
        # Told of a request for a lane that the source cannot serve for want of that lane, and why.
        self.on_unserved: Callable[[int, TowpathError], None] = lambda _r, _error: None

    def when_accepted(self, tell: Callable[[], None]) -> None:
        """Have this called once, when the source has accepted the greeting, or at once if it has."""
        self._on_accepted = tell
        if self._accepted.is_set():
            tell()

    def number(self) -> int:
        """A number for a request whose answer comes on a lane."""
        self._next += 1
        return self._next

    async def greet(self, ticket: str, version: str, abilities: Sequence[str] = ()) -> None:
        """Introduce ourselves to a source that is known to take requests at once (`session.ALPN_CONTROL_AHEAD`), which
        saves a round trip; `run` learns what it answers."""
        self.ahead = True
        await self._stream.send_all(session.encode(session.Hello(ticket, self.instance, version, list(abilities))))

    async def hello(self, ticket: str, version: str, abilities: Sequence[str] = ()) -> session.HelloAnswer:
        """Introduce ourselves and wait to be accepted. Call before `run`. Raises what the source says."""
        hello = session.Hello(ticket, self.instance, version, list(abilities))
        await self._stream.send_all(session.encode(hello))
        reader = session.MessageReader()
        with trio.move_on_after(HELLO_TIMEOUT):
            while True:
                data = await self._stream.receive_some(_CHUNK)
                if not data:
                    raise SessionLost("The source closed the connection before it said anything.")
                bodies = reader.feed_untrusted(data)
                if bodies:
                    return self._welcome(bodies[0])
        raise SessionLost("The source did not answer in time.")

    def _welcome(self, body: bytes) -> session.HelloAnswer:
        answer = session.answer_untrusted(body)
        if isinstance(answer, session.Failed):
            raise error_from_document_untrusted(answer.error)
        if not isinstance(answer, session.HelloAnswer):
            raise ProtocolError("The source began with something other than its greeting.")
        self.abilities = frozenset(answer.abilities)
        self.hides = answer.hides
        self._accepted.set()
        self._on_accepted()
        return answer

    async def run(self) -> None:
        """Read, write and keep alive until the stream ends. Raises `SessionLost`."""
        self._heard = trio.current_time()
        lost: TowpathError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._keep_alive)
                await self._read()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            lost = SessionLost("The connection to the source broke.")
        except* TowpathError as group:
            lost = first_error(group)
        # Not where it was caught: before Python 3.11.4, what is raised there is in a group again.
        if lost is not None:
            raise self._lose(lost)

    def _lose(self, error: TowpathError) -> TowpathError:
        self._lost = error
        for waiting in self._waiting.values():
            waiting.close()
        self._waiting.clear()
        return error

    async def _read(self) -> None:
        reader = session.MessageReader()
        while True:
            data = await self._stream.receive_some(_CHUNK)
            if not data:
                raise SessionLost("The source closed the connection.")
            self._heard = trio.current_time()
            for body in reader.feed_untrusted(data):
                if not self._accepted.is_set():
                    self._welcome(body)
                    continue
                self._deliver(session.answer_untrusted(body))

    def _deliver(self, answer: session.Answer) -> None:
        if isinstance(answer, session.Pong | session.HelloAnswer):
            return
        if answer.r == 0 and isinstance(answer, session.Failed):
            raise error_from_document_untrusted(answer.error)
        waiting = self._waiting.get(answer.r)
        if waiting is not None:
            try:
                waiting.send_nowait(answer)
            except trio.WouldBlock:
                raise ProtocolError("The source sent more than was asked for.") from None
            except trio.BrokenResourceError:
                self._waiting.pop(answer.r, None)
        elif isinstance(answer, session.Failed):
            self.on_unserved(answer.r, error_from_document_untrusted(answer.error))

    async def _write(self) -> None:
        await send_queued(self._stream, self._receive_out)

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(session.KEEPALIVE)
            if trio.current_time() - self._heard > 2 * session.KEEPALIVE:
                raise SessionLost("The source has been silent for too long.")
            self.post(session.Ping())

    def post(self, message: session.Message) -> None:
        """Send something without waiting. Raises `SessionLost` when the source takes nothing any more."""
        if self._lost is not None:
            raise self._lost
        try:
            self._send_out.send_nowait(session.encode(message))
        except trio.WouldBlock:
            raise SessionLost("The source does not take requests any more.") from None

    def _open(self, r: int, size: int) -> trio.MemoryReceiveChannel[session.Answer]:
        if self._lost is not None:
            raise self._lost
        send, receive = trio.open_memory_channel[session.Answer](size)
        self._waiting[r] = send
        return receive

    async def _next_answer(self, receive: trio.MemoryReceiveChannel[session.Answer], seconds: float) -> session.Answer:
        try:
            answer = await _received(receive, seconds)
        except trio.EndOfChannel:
            raise self._lost or SessionLost("The connection to the source broke.") from None
        if answer is None:
            raise SessionLost("The source did not answer a request in time.")
        if isinstance(answer, session.Failed):
            raise error_from_document_untrusted(answer.error)
        return answer

    async def _ask(
        self, kind: type[A], question: Callable[[int], session.Message], patience: float = ANSWER_TIMEOUT
    ) -> A:
        """Ask something, with the number that it is given, and wait for the one answer, which must be of this kind."""
        r = self.number()
        receive = self._open(r, 1)
        try:
            self.post(question(r))
            answer = await self._next_answer(receive, patience)
        finally:
            self._waiting.pop(r, None)
        if not isinstance(answer, kind):
            raise ProtocolError("The source answered a question that was not asked.")
        return answer

    async def stat(self, paths: list[bytes], *, follow: bool) -> list[session.StatResult]:
        """What each path is at the source. Raises `SessionLost`, or the source's error."""
        answer = await self._ask(session.Stats, lambda r: session.StatPaths(r, paths, follow))
        if len(answer.results) != len(paths):
            raise ProtocolError("The source answered a question that was not asked.")
        return answer.results

    async def take(
        self, paths: list[bytes], pack: int, lane: int, count: int, largest: int, most: int, *, follow: bool
    ) -> list[session.StatResult]:
        """As `stat`, with the content of small files among the first ``count`` (`session.TakePaths`). Only where the
        source may be asked ahead. Raises `ProtocolError` for an answer to something else, and what `stat` does."""
        answer = await self._ask(
            session.Stats, lambda r: session.TakePaths(r, paths, lane, pack, count, largest, most, follow)
        )
        if len(answer.results) != len(paths):
            raise ProtocolError("The source answered a question that was not asked.")
        return answer.results

    async def digest(self, path: bytes, algorithm: str, version: session.Version | None, *, follow: bool) -> str:
        """Hex digest of a file at the source."""
        answer = await self._ask(
            session.Digest, lambda r: session.DigestFile(r, path, algorithm, version, follow), DIGEST_TIMEOUT
        )
        return answer.value

    async def extents(self, path: bytes, version: session.Version, *, follow: bool) -> list[session.Extent] | None:
        """Which parts of a file hold data; None when the source cannot tell. Only with the ability `EXTENTS`."""
        answer = await self._ask(session.Extents, lambda r: session.FindExtents(r, path, version, follow))
        if answer.extents is not None:
            check_extents_untrusted(answer.extents, version[2])
        return answer.extents

    async def read_lanes(self) -> session.LaneReadings:
        """What the source measures of its lanes. Only with the ability `LANE_READINGS`."""
        answer = await self._ask(session.LaneReadings, session.ReadLanes)
        check_readings_untrusted(answer)
        return answer

    async def attributes(
        self, files: list[session.AttributesOf], *, follow: bool, attributes: bool = True, lists: bool = False
    ) -> list[session.FileAttributes]:
        """Extended attributes and access lists of some files, or of the first few of them. Only with the ability
        `ATTRIBUTES`, and lists with `ACCESS_LISTS`."""
        answer = await self._ask(
            session.Attributes, lambda r: session.ReadAttributes(r, files, follow, attributes, lists)
        )
        return answer.files

    async def block_digests(
        self, path: bytes, version: session.Version, block: int, first: int, count: int, *, follow: bool
    ) -> list[bytes]:
        """Digests of some blocks of a file. Only with the ability `BLOCK_DIGESTS`. Raises `ProtocolError` where the
        source answers with another number of them, and what `stat` does."""
        answer = await self._ask(
            session.BlockDigests, lambda r: session.DigestBlocks(r, path, version, block, first, count, follow)
        )
        if len(answer.digests) != count:
            raise ProtocolError("The source answered a question that was not asked.")
        return answer.digests

    def list_ahead(self, path: bytes, *, follow: bool) -> None:
        """Ask for the rows of what will probably be listed; `list_directory` then has them without a round trip, and
        `forget_ahead` ends what was not. Raises `SessionLost`."""
        if (path, follow) not in self._ahead:
            self._ahead[path, follow] = self._begin_listing(path, follow=follow)

    def forget_ahead(self) -> None:
        """What was asked for ahead and is not being listed is not wanted."""
        for r, _ in self._ahead.values():
            self._waiting.pop(r, None)
            if self._lost is None:
                self.post(session.Abandon(r))
        self._ahead.clear()

    def _begin_listing(self, path: bytes, *, follow: bool) -> tuple[int, trio.MemoryReceiveChannel[session.Answer]]:
        r = self.number()
        receive = self._open(r, session.LISTING_WINDOW + 1)
        self.post(session.ListDirectory(r, path, follow))
        return r, receive

    async def list_directory(
        self, path: bytes, *, follow: bool, on_end: Callable[[session.Rows], None] = lambda _answer: None
    ) -> AsyncGenerator[list[session.Row], None]:
        """The rows of a directory, some at a time; the source sends no faster than they are taken, and stops when the
        generator is closed. ``on_end`` is given the last answer, which says whether names changed. Raises what the
        source says of the directory, `SessionLost`, or `ProtocolError`."""
        wanted = (path, follow)
        r, receive = self._ahead.pop(wanted) if wanted in self._ahead else self._begin_listing(path, follow=follow)
        ended = False
        try:
            while not ended:
                answer = await self._next_answer(receive, ANSWER_TIMEOUT)
                if not isinstance(answer, session.Rows):
                    raise ProtocolError("The source answered a question that was not asked.")
                ended = answer.last
                if ended:
                    on_end(answer)
                yield answer.rows
                if not ended:
                    self.post(session.MoreRows(r))
        finally:
            self._waiting.pop(r, None)
            if not ended and self._lost is None:
                self.post(session.Abandon(r))


async def _received(receive: trio.MemoryReceiveChannel[session.Answer], seconds: float) -> session.Answer | None:
    """The next answer on a channel, or None when none has come after so many seconds."""
    with suppress(trio.WouldBlock):
        # A deadline costs as much as planning ten files, and what was asked for ahead is often here.
        return receive.receive_nowait()
    with trio.move_on_after(seconds):
        return await receive.receive()
    return None


def stat_error(result: session.StatResult) -> TowpathError:
    """Why the source could not say what a path is; errors about a path are its owner's to mend."""
    if result.error is None:
        return ItemFailed("The source file was replaced by something else.", code="FILE_CHANGED", who="source owner")
    return error_from_document_untrusted(result.error)
