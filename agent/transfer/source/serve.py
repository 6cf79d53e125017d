"""The source's end of a session: checks every request against ticket and policy, then lists, reads or digests.

Stateless but for what is under way: which control stream is live and which lanes belong to it. Everything a
destination sends is hostile until `Control` has looked at it.
"""

from __future__ import annotations

import hmac
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from agent.connect.lane_tls import SecuredLane
from agent.limits.pace import Pace
from agent.meter.lane import LaneMeter, readings_of
from agent.storage import access_lists, attributes
from agent.storage.base import Root
from agent.storage.faults import fault
from agent.storage.reach import Reach
from agent.transfer.asking.outgoing import send_queued
from agent.transfer.basis import compression
from agent.transfer.basis.lane_keys import LAST_RECORD
from agent.transfer.basis.storage_threads import StorageThreads
from agent.transfer.source import source_files
from agent.transfer.source.lane_queues import MAX_WAITING, LaneQueues, LaneRequest
from agent.transfer.source.send import Joined, LaneSender
from agent.transfer.source.source_attributes import read_attributes
from agent.transfer.source.source_policy import SourcePolicy
from agent.transfer.source.source_rows import Listing, SessionBegin
from agent.transfer.source.under_way import UnderWay, paths_of
from protocol import session
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath
from protocol.session_checks import check_blocks_untrusted, check_range_untrusted
from protocol.ticket import TicketVerifier

_CHUNK = 64 * 1024
HELLO_TIMEOUT = 30.0
LISTINGS_AT_ONCE = 32
# Questions of one destination that are worked on, each of which may be large. More are not read from it meanwhile; an
# honest one has fewer.
QUESTIONS_AT_ONCE = 32
# About what one request holds, one of its files, one component of a path, and one that is not shared with others.
REQUEST_BYTES, FILE_BYTES, COMPONENT_BYTES, OWN_COMPONENT_BYTES = 1000, 400, 8, 64
# How long a lane waits for the greeting of its control stream (seconds), which comes on another connection.
JOIN_PATIENCE = 2.0

# A question about what is in one file, and what is found.
R = TypeVar("R", session.DigestFile, session.FindExtents, session.DigestBlocks)
T = TypeVar("T")


class SourceSide:
    """All connections of one session at its source."""

    def __init__(
        self,
        root: Root,
        policy: SourcePolicy,
        verifier: TicketVerifier,
        pace: Pace | None = None,
        *,
        read_twice: bool = False,
        last_record: int = LAST_RECORD,
    ) -> None:
        self.read_twice = read_twice
        self.last_record = last_record
        self._whole = root
        self.root = root
        self._reach: tuple[CollectionPath, ...] | None = None
        self.policy = policy
        self.verifier = verifier
        self.pace = pace or Pace()
        self.control: Control | None = None
        self._greeted = threading.Condition()

    async def serve_control(self, stream: trio.abc.Stream, peer_fingerprint: str, *, ahead: bool = False) -> None:
        """Serve one control stream to its end; a newer one of the session takes its place. With ``ahead`` the
        destination knows that it need not wait for the answer to its greeting."""
        control = Control(self, stream, ahead=ahead)
        try:
            await control.introduce(peer_fingerprint)
            if self.control is not None:
                self.control.end()
            # Before the answer is under way: a lane may follow it at once.
            with self._greeted:
                self.control = control
                self._greeted.notify_all()
            await control.welcome()
            await control.run()
        finally:
            if self.control is control:
                self.control = None
            await trio.aclose_forcefully(stream)

    def confine(self) -> None:
        """Let symlinks lead from now on as far as the accepted ticket says. Asks the disk nothing."""
        if self.policy.reach == self._reach:
            return
        self._reach = self.policy.reach
        # The root of before stays open: lanes of an earlier control stream may still read from it.
        self.root = self._whole if self._reach is None else self._whole.narrowed(Reach(self._reach))

    def join(self, instance: bytes, number: int, meter: LaneMeter) -> Joined:
        """What a lane gets that names the live control stream, or one that comes within moments. Raises
        `ProtocolError`; any thread may call, and waits."""
        with self._greeted:
            self._greeted.wait_for(lambda: self._names(instance), JOIN_PATIENCE)
            control = self._names(instance)
        if control is None:
            raise ProtocolError("The lane names no live session.")
        return Joined(control.lanes.add(number, meter), control.root)

    def _names(self, instance: bytes) -> Control | None:
        control = self.control
        return control if control is not None and hmac.compare_digest(control.instance, instance) else None


class Control:
    """One control stream at the source."""

    def __init__(self, side: SourceSide, stream: trio.abc.Stream, *, ahead: bool) -> None:
        self.instance = b""
        # As far as its ticket reaches, from `introduce` on.
        self.root = side.root
        self._ahead = ahead
        self.lanes = LaneQueues(ahead=ahead)
        # What came with the greeting.
        self._early: list[bytes] = []
        self._side = side
        self._stream = stream
        self._reader = session.MessageReader()
        self._abandoned: set[int] = set()
        self._compression: compression.Mode = "off"
        self._listings: dict[int, tuple[trio.CancelScope, trio.Semaphore]] = {}
        self._questions = trio.Semaphore(QUESTIONS_AT_ONCE)
        self._send_out, self._receive_out = trio.open_memory_channel[bytes](1024)
        self._digests = trio.CapacityLimiter(2)
        self._listing_threads = StorageThreads(side.root.features.file_system)
        self._under_way = UnderWay()
        self._began = SessionBegin()
        self._scope = trio.CancelScope()

    def end(self) -> None:
        """A newer control stream took over."""
        self._scope.cancel()

    async def introduce(self, peer_fingerprint: str) -> None:
        """Check the greeting: ticket, session, both nodes. Raises `TowpathError` after telling the peer."""
        with trio.move_on_after(HELLO_TIMEOUT) as scope:
            try:
                first = await self._first_message()
                if not isinstance(first, session.Hello) or not 16 <= len(first.instance) <= 64:
                    raise ProtocolError("The destination began with something other than its greeting.")
                self._side.policy.accept(self._side.verifier, first.ticket, peer_fingerprint, time.time())
            except TowpathError as error:
                await self._stream.send_all(session.encode(session.Failed(0, error.to_document())))
                raise
            self._side.confine()
            self.root = self._side.root
            self.instance = first.instance
            self._compression = compression.wanted(first.abilities)
        if scope.cancelled_caught:
            raise RetryLater("The destination did not introduce itself in time.")

    async def welcome(self) -> None:
        """Tell the destination that it is accepted."""
        with trio.fail_after(HELLO_TIMEOUT):
            answer = session.HelloAnswer(abilities=_abilities(), hides=self._side.root.hides)
            await self._stream.send_all(session.encode(answer))

    async def _first_message(self) -> session.Request:
        while True:
            data = await self._stream.receive_some(_CHUNK)
            if not data:
                raise RetryLater("The destination closed the connection before it said anything.")
            bodies = self._reader.feed_untrusted(data)
            if len(bodies) > 1 and not self._ahead:
                raise ProtocolError("The destination asked before it was accepted.")
            if bodies:
                self._early = bodies[1:]
                return session.request_untrusted(bodies[0])

    async def run(self) -> None:
        """Answer until the stream ends."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    lanes = self.lanes
                    nursery.start_soon(
                        self._under_way.watch, lambda: self._side.root, self._allowed, lanes.waited_for, lanes.sent
                    )
                    await self._read(nursery)
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            # The destination is gone; whether it comes back is its business.
            self._scope.cancel()
        finally:
            self.lanes.end()

    async def _write(self) -> None:
        await send_queued(self._stream, self._receive_out)

    async def _answer(self, message: session.Message) -> None:
        await self._send_out.send(session.encode(message))

    async def _read(self, nursery: trio.Nursery) -> None:
        early, self._early = self._early, []
        for body in early:
            await self._handle(session.request_untrusted(body), nursery)
        while True:
            with trio.move_on_after(2 * session.KEEPALIVE + 5) as scope:
                data = await self._stream.receive_some(_CHUNK)
            if scope.cancelled_caught or not data:
                return
            for body in self._reader.feed_untrusted(data):
                await self._handle(session.request_untrusted(body), nursery)

    async def _handle(self, request: session.Request, nursery: trio.Nursery) -> None:
        if isinstance(request, session.ReadRange | session.ReadPack):
            await self._queue_for_lane(request)
        elif isinstance(request, session.ListDirectory):
            if len(self._listings) >= LISTINGS_AT_ONCE or request.r in self._listings:
                # Two of one number would count as one.
                raise ProtocolError("The destination asks for too many listings at once.")
            scope, credit = trio.CancelScope(), trio.Semaphore(session.LISTING_WINDOW)
            self._listings[request.r] = (scope, credit)
            nursery.start_soon(self._list, request, scope, credit)
        elif isinstance(request, session.MoreRows):
            listing = self._listings.get(request.r)
            if listing is not None:
                listing[1].release()
        elif isinstance(request, session.Abandon):
            listing = self._listings.get(request.r)
            if listing is not None:
                listing[0].cancel()
            elif len(self._abandoned) < MAX_WAITING:
                self._abandoned.add(request.r)
        elif (answer := _QUESTIONS.get(type(request))) is not None:
            await self._questions.acquire()
            nursery.start_soon(self._question, answer, request)
        elif isinstance(request, session.ReadLanes):
            await self._answer(readings_of(request.r, self.lanes.meters, silent=self._under_way.silent))
        elif isinstance(request, session.RenewTicket):
            self._side.policy.renew(self._side.verifier, request.ticket, time.time())
        elif isinstance(request, session.Ping):
            await self._answer(session.Pong())
        else:
            raise ProtocolError("The destination introduced itself twice.")

    async def _question(self, answer: Callable[[Control, Any], Awaitable[None]], request: session.Request) -> None:
        try:
            with self._under_way.waiting(*paths_of(request)):
                await answer(self, request)
        finally:
            self._questions.release()

    # --- metadata --------------------------------------------------------------------------------------

    def _allowed(self, raw: bytes) -> CollectionPath:
        """A path of the peer, checked against form, ticket and the owner's policy. Raises `TowpathError`."""
        path = session.path_untrusted(raw)
        self._side.policy.check(path, time.time())
        return path

    async def _list(self, request: session.ListDirectory, scope: trio.CancelScope, credit: trio.Semaphore) -> None:
        try:
            with scope:
                path = self._allowed(request.path)
                await self._send_rows(request, path, credit)
        except TowpathError as error:
            await self._answer(session.Failed(request.r, error.to_document()))
        except OSError as error:
            await self._answer(session.Failed(request.r, fault(error, "source", request.path).to_document()))
        finally:
            self._listings.pop(request.r, None)

    async def _send_rows(self, request: session.ListDirectory, path: CollectionPath, credit: trio.Semaphore) -> None:
        # A hop to another thread for each message and none besides: opening, reading, encoding, closing.
        listing = Listing(self._side.root, path, request, self._began)
        try:
            while not listing.ended:
                # Each turn of the event loop that is not needed costs as much as listing ten files.
                try:
                    credit.acquire_nowait()
                except trio.WouldBlock:
                    await credit.acquire()
                with self._under_way.waiting(request.path):
                    message = await self._listing_threads.run(listing.message)
                try:
                    self._send_out.send_nowait(message)
                except trio.WouldBlock:
                    await self._send_out.send(message)
        finally:
            listing.close()

    async def _stat(self, request: session.StatPaths) -> None:
        if len(request.paths) > 1000:
            raise ProtocolError("The destination asks about too many paths at once.")
        results = await trio.to_thread.run_sync(self._stat_all, request)
        await self._answer(session.Stats(request.r, results))

    async def _take(self, request: session.TakePaths) -> None:
        if len(request.paths) > 1000 or request.most > session.MAX_TAKEN:
            raise ProtocolError("The destination asks for too much at once.")
        results = await trio.to_thread.run_sync(self._stat_all, request)
        await self._answer(session.Stats(request.r, results))
        rows = [result.row for result in results[: max(0, request.count)]]
        files = [
            session.PackFile(request.paths[index], row.version)
            for index in session.fitting(rows, request.largest, request.most)
            if (row := rows[index]) is not None
        ]
        if files:
            await self._queue_for_lane(session.ReadPack(request.pack, request.lane, b"", files, request.follow))

    def _stat_all(self, request: session.StatPaths | session.TakePaths) -> list[session.StatResult]:
        results = []
        for raw in request.paths:
            try:
                path = self._allowed(raw)
                results.append(session.StatResult(source_files.row_at(self._side.root, path, follow=request.follow)))
            except TowpathError as error:
                results.append(session.StatResult(None, error.to_document()))
            except OSError as error:
                results.append(session.StatResult(None, fault(error, "source", raw).to_document()))
        return results

    async def _digest(self, request: session.DigestFile) -> None:
        await self._look_into(request, source_files.digest, session.Digest)

    async def _extents(self, request: session.FindExtents) -> None:
        await self._look_into(request, source_files.extents, session.Extents)

    async def _block_digests(self, request: session.DigestBlocks) -> None:
        check_blocks_untrusted(request)
        await self._look_into(request, source_files.digests_of_blocks, session.BlockDigests)

    async def _look_into(
        self, request: R, look: Callable[[Root, CollectionPath, R], T], answer: Callable[[int, T], session.Message]
    ) -> None:
        """Answer what has to read a file; few such looks at a time."""
        try:
            path = self._allowed(request.path)
            found = await trio.to_thread.run_sync(look, self._side.root, path, request, limiter=self._digests)
            await self._answer(answer(request.r, found))
        except TowpathError as error:
            await self._answer(session.Failed(request.r, error.to_document()))
        except OSError as error:
            await self._answer(session.Failed(request.r, fault(error, "source", request.path).to_document()))

    async def _attributes(self, request: session.ReadAttributes) -> None:
        answer = await trio.to_thread.run_sync(read_attributes, self._side.root, request, self._allowed)
        await self._answer(answer)

    # --- contents --------------------------------------------------------------------------------------

    async def _queue_for_lane(self, request: session.ReadRange | session.ReadPack) -> None:
        try:
            if isinstance(request, session.ReadRange):
                check_range_untrusted(request)
                path = self._allowed(request.path)
                size = REQUEST_BYTES + len(request.path) + len(path) * OWN_COMPONENT_BYTES
                work = LaneRequest(
                    request, path, (), abandoned=self._abandoned, compression=self._compression, size=size
                )
            else:
                work = self._pack(request)
            self.lanes.submit(request.lane, work)
        except ProtocolError:
            raise
        except TowpathError as error:
            if not self.lanes.refuse(request.lane, request, error):
                await self._answer(session.Failed(request.r, error.to_document()))

    def _pack(self, request: session.ReadPack) -> LaneRequest:
        if not 0 < len(request.files) <= session.MAX_PACK_FILES:
            raise ProtocolError("A pack of an impossible number of files was asked for.")
        directory = session.path_untrusted(request.directory)
        now = time.time()
        paths: list[CollectionPath] = []
        # Files of one folder mostly come one after the other: what they have in common is checked once.
        last: bytes | None = None
        folder: CollectionPath = ()
        covered = False
        size = REQUEST_BYTES
        for file in request.files:
            above, slash, name = file.name.rpartition(b"/")
            if slash and not above:
                raise ProtocolError("A path of the peer begins with a slash.", code="ILLEGAL_NAME")
            if above != last:
                last, folder = above, directory + session.path_untrusted(above)
                covered = self._side.policy.covers(folder)
                size += len(folder) * OWN_COMPONENT_BYTES
            path = (*folder, session.name_untrusted(name))
            if not covered:
                self._side.policy.check(path, now)
            paths.append(path)
            size += FILE_BYTES + len(file.name) + len(path) * COMPONENT_BYTES
        self._side.policy.check(folder if covered else paths[-1], now)
        return LaneRequest(
            request, (), tuple(paths), abandoned=self._abandoned, compression=self._compression, size=size
        )


_QUESTIONS: dict[type[session.Request], Callable[[Control, Any], Awaitable[None]]] = {
    session.TakePaths: Control._take,
    session.StatPaths: Control._stat,
    session.DigestFile: Control._digest,
    session.FindExtents: Control._extents,
    session.DigestBlocks: Control._block_digests,
    session.ReadAttributes: Control._attributes,
}


def _abilities() -> list[str]:
    """What this source can do beyond the basics."""
    always = [session.EXTENTS, session.BLOCK_DIGESTS, session.LANE_READINGS]
    extended = [session.ATTRIBUTES, *([session.ACCESS_LISTS] if access_lists.usable() else [])]
    return [*always, *extended] if attributes.usable() else always


def serve_lane(
    side: SourceSide, sock: socket.socket, handshake: Callable[[socket.socket], tuple[SecuredLane, str]]
) -> None:
    """Serve one lane to its end, in a thread. ``handshake`` secures the socket and checks the peer.

    Raises OSError or `TowpathError` when the peer is refused or the lane breaks.
    """
    secured, _ = handshake(sock)
    try:
        LaneSender(secured, side.join, side.pace, read_twice=side.read_twice, last_record=side.last_record).run()
    finally:
        secured.close()
