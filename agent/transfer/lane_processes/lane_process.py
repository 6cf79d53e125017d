"""A lane process: receives for a worker, in a process of its own, so that a session uses more than one core.

Its lanes' frames are checked against their digests and written at once, through handles that the worker opened; then
the worker is told. It settles nothing, knows no paths, and opens nothing but temporaries it made itself. One thread
does it all, because several would hand the interpreter's lock to one another at every system call; sockets never block
it.

It ends when the worker does: the pair's other end closes with it. What it had written and not told is an orphan then.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from agent.connect.lane_tls import SecuringLane, begin_lane
from agent.connect.tls import HANDSHAKE_TIMEOUT
from agent.limits.bucket import TokenBucket
from agent.limits.pace import LEAST_PIECE, MOST_PIECE, PIECE_SECONDS
from agent.meter.lane import LaneMeter
from agent.meter.time_shares import Doing
from agent.storage.handed import Handed
from agent.system.limits import open_files
from agent.transfer.lane_processes import lane_messages as say
from agent.transfer.lane_processes.lane_frames import Frame, FrameReader
from agent.transfer.lane_processes.lane_writing import GivenLargeFile, PackOrder, PackWriting, RangeOrder, Writing
from agent.transfer.processes.message_buffer import AreYouThere, Here
from protocol import lane
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.identity import NodeKey
from protocol.session import ALPN_LANE, SNI_SUFFIX

# How often (seconds) the worker is told what is measured.
TELL_EVERY = 0.2
# A frame may come before word of what was asked for, but not much (seconds).
WORD_WITHIN = 30.0
# Temporaries that are read back between one frame of a lane and the next: the time of a pack's writing, some.
CHECK_AT_ONCE = 512
# Descriptors left to folders, large files and sockets.
_OTHER_DESCRIPTORS = 1024

# Wraps a connected socket for one session (its identity, its id, the peer's certificate); the handshake comes after.
Wrap = Callable[[socket.socket, NodeKey | None, str, str], SecuringLane]


def wrap_tls(sock: socket.socket, identity: NodeKey | None, session_id: str, certificate: str) -> SecuringLane:
    """TLS as the destination's end of a lane. Raises `RetryLater` before the process was told who it is."""
    if identity is None:
        raise RetryLater("A lane came before its session.", code="CONNECT_FAILED")
    return begin_lane(sock, identity, certificate, server_name=session_id + SNI_SUFFIX, alpn=ALPN_LANE)


class _Stage(Enum):
    """How far a lane is."""

    SECURING = 1
    SECURED = 2
    GREETING = 3
    OPEN = 4


class _Lane:
    """One lane; also the allowance of its content."""

    def __init__(self, key: int, sock: SecuringLane, bucket: TokenBucket, now: float) -> None:
        self.key = key
        self.sock = sock
        self.stage = _Stage.SECURING
        self.until = now + HANDSHAKE_TIMEOUT
        self.events = select.POLLIN
        self.meter = LaneMeter(sock)
        self.reader = FrameReader(sock, self.meter)
        # There may be more to read than the system knows of.
        self.eager = True
        # A frame that came before word of its request, and since when.
        self.early: Frame | None = None
        self.early_since = 0.0
        # Requests of which nothing more is to be written, until the source is through with them.
        self.withdrawn: set[int] = set()
        self.orders: dict[int, PackOrder | RangeOrder] = {}
        self._bucket = bucket
        self._credit = self._piece = 0
        self.reservation: int | None = None
        self.waiting_since = 0.0

    def allow(self, most: int) -> int:
        rate = self._bucket.rate
        if rate is None:
            return most
        if not self._credit:
            now = time.monotonic()
            if self.reservation is None:
                piece = min(most, int(min(max(rate * PIECE_SECONDS, LEAST_PIECE), MOST_PIECE)))
                self.reservation = self._bucket.reserve(piece, now)
                self._piece = piece
                self.waiting_since = now
            if self._bucket.delay(self.reservation, now):
                return 0
            self.reservation = None
            self._credit = self._piece
        return min(most, self._credit)

    def took(self, count: int) -> None:
        self._credit = max(0, self._credit - count)


class LaneProcess:
    """`run` blocks until the worker is gone."""

    def __init__(self, sock: socket.socket, handed: Handed | None = None, wrap: Wrap = wrap_tls) -> None:
        self._pair = say.PairEnd(sock)
        self._wrap = wrap
        self._poll = select.poll()
        self._poll.register(self._pair.fileno(), select.POLLIN)
        self._polled: dict[int, int] = {}
        self._identity: NodeKey | None = None
        self._session_id = ""
        self._lock = -1
        self._lanes: dict[int, _Lane] = {}
        self._writing = Writing(handed or Handed(), max(0, open_files() - _OTHER_DESCRIPTORS))
        self._bucket = TokenBucket(None, time.monotonic())
        self._waited = 0.0
        self._told = 0.0

    def run(self) -> None:
        """Receive until the other end of the pair is closed."""
        try:
            while True:
                self._round()
        except say.PairClosed:
            return
        finally:
            try:
                self._end_run()
            finally:
                self._pair.close()

    # --- one round -------------------------------------------------------------------------------------

    def _round(self) -> None:
        self._register()
        checking = self._writing.held.checking
        ready = {fd for fd, _ in self._poll.poll(self._timeout() * 1000 if self._lanes or checking else None)}
        if self._pair.fileno() in ready:
            for message, descriptors in self._pair.receive():
                self._handle(message, descriptors)
        for each in list(self._lanes.values()):
            if self._lanes.get(each.key) is each:
                self._serve(each, ready)
        if self._writing.held.checking and (checked := self._writing.held.check(CHECK_AT_ONCE)) is not None:
            self._pair.send(say.Checked(batch=checked[0], bad=checked[1]))
        now = time.monotonic()
        if self._lanes and now - self._told >= TELL_EVERY:
            self._told = now
            self._tell()

    def _register(self) -> None:
        """Have the system watch those lanes that wait for their socket and for nothing else."""
        wanted = {
            each.sock.fileno(): each.events
            for each in self._lanes.values()
            if each.early is None and each.reservation is None and each.stage is not _Stage.SECURED
        }
        for fd in self._polled.keys() - wanted.keys():
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
        for fd, events in wanted.items():
            if self._polled.get(fd) != events:
                self._poll.register(fd, events)
        self._polled = wanted

    def _timeout(self) -> float:
        """Seconds until something is to be done although nothing came."""
        if self._writing.held.checking:
            return 0.0
        now = time.monotonic()
        wait = max(0.0, self._told + TELL_EVERY - now)
        for each in self._lanes.values():
            if each.reservation is not None:
                wait = min(wait, self._bucket.delay(each.reservation, now))
            elif each.eager and each.early is None and each.stage is not _Stage.SECURED:
                return 0.0
        return wait

    def _tell(self) -> None:
        lanes = [
            say.Reading(each.key, each.meter.content, each.meter.saved, each.meter.times.totals(), each.meter.records)
            for each in self._lanes.values()
        ]
        now = time.monotonic()
        waiting = sum(now - each.waiting_since for each in self._lanes.values() if each.reservation is not None)
        self._pair.send(say.Readings(processor=time.process_time(), waited=self._waited + waiting, lanes=lanes))

    # --- what the worker says --------------------------------------------------------------------------

    def _handle(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, say.ExpectPack):
            self._expect(message.lane, message.r, PackOrder(message.names, message.files, message.hold))
        elif isinstance(message, say.ExpectRange):
            self._expect(message.lane, message.r, RangeOrder(message.file, message.offset, message.length))
        elif isinstance(message, say.Check):
            self._writing.held.ask(message.batch, message.files, in_memory=message.in_memory)
        elif isinstance(message, say.Release):
            self._writing.held.release(message.files)
        elif isinstance(message, say.GivenFolder):
            self._writing.folders[message.folder] = descriptors[0]
        elif isinstance(message, say.GivenFile):
            self._writing.files[message.file] = GivenLargeFile(descriptors[0], message.size, message.block)
        elif isinstance(message, say.Forget):
            self._writing.forget(message.folders, message.files)
        elif isinstance(message, say.Discard):
            if (found := self._lanes.get(message.lane)) is not None:
                found.withdrawn.add(message.r)
        elif isinstance(message, say.Withdraw):
            self._withdraw(message)
        elif isinstance(message, say.Secure):
            self._secure(message, descriptors[0])
        elif isinstance(message, say.Introduce):
            self._introduce(message)
        elif isinstance(message, say.CloseLane):
            self._close_lane(message.lane)
        elif isinstance(message, say.Share):
            self._bucket.set_rate(message.rate, time.monotonic())
        elif isinstance(message, say.BeginRun):
            self._end_run()
            self._identity = NodeKey.from_pem(message.node_key) if message.node_key else None
            self._session_id = message.session_id
            self._lock = descriptors[0] if descriptors else -1
        elif isinstance(message, AreYouThere):
            self._pair.send(Here())
        elif isinstance(message, say.EndRun):
            self._end_run()
            self._pair.send(say.RunEnded())

    def _expect(self, key: int, r: int, order: PackOrder | RangeOrder) -> None:
        found = self._lanes.get(key)
        if found is not None:
            found.orders[r] = order

    def _withdraw(self, message: say.Withdraw) -> None:
        found = self._lanes.get(message.lane)
        if found is not None and found.orders.pop(message.r, None) is not None:
            found.withdrawn.add(message.r)
        self._pair.send(say.Withdrawn(r=message.r, lane=message.lane))

    def _end_run(self) -> None:
        for key in list(self._lanes):
            self._close_lane(key)
        self._writing.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # --- lanes -----------------------------------------------------------------------------------------

    def _secure(self, message: say.Secure, descriptor: int) -> None:
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        try:
            secured = self._wrap(sock, self._identity, self._session_id, message.certificate)
        except (TowpathError, OSError) as error:
            sock.close()
            self._pair.send(_ended(message.lane, error))
            return
        self._lanes[message.lane] = _Lane(message.lane, secured, self._bucket, time.monotonic())

    def _introduce(self, message: say.Introduce) -> None:
        found = self._lanes.get(message.lane)
        if found is None:
            return
        try:
            # The first bytes of a connection always fit.
            found.sock.sendall(lane.encode_header(lane.LaneHello(message.instance, message.number)))
        except OSError as error:
            self._lane_over(found, error)
            return
        found.stage, found.until, found.eager = _Stage.GREETING, time.monotonic() + WORD_WITHIN, True
        found.meter.times.now(Doing.NETWORK)

    def _close_lane(self, key: int) -> None:
        found = self._lanes.pop(key, None)
        if found is None:
            return
        fd = found.sock.fileno()
        if self._polled.pop(fd, None) is not None:
            self._poll.unregister(fd)
        found.sock.close()

    def _lane_over(self, ended: _Lane, error: Exception) -> None:
        self._close_lane(ended.key)
        self._tell()
        self._pair.send(_ended(ended.key, error))

    def _serve(self, one: _Lane, ready: set[int]) -> None:
        try:
            self._go_on(one, one.sock.fileno() in ready)
        except (TowpathError, OSError) as error:
            self._lane_over(one, error)

    def _go_on(self, one: _Lane, ready: bool) -> None:
        now = time.monotonic()
        if one.stage is _Stage.SECURED:
            return
        if one.stage is not _Stage.OPEN and now > one.until:
            raise RetryLater("The source did not answer on a lane in time.", code="CONNECT_FAILED")
        if one.stage is _Stage.SECURING:
            if ready or one.eager:
                self._shake_hands(one)
            return
        if one.early is not None:
            self._try_again(one, now)
            return
        held_back = one.reservation is not None
        if not ready and not one.eager and not held_back:
            return
        one.meter.times.now(Doing.LIMITED if held_back else Doing.NETWORK)
        frame = one.reader.next(one)
        if held_back and one.reservation is None:
            self._waited += now - one.waiting_since
        one.meter.times.now(Doing.LIMITED if one.reader.held_back else Doing.NETWORK)
        one.eager = frame is not None
        if frame is not None:
            if not self._take(one, frame):
                one.early, one.early_since = frame, now
            one.meter.times.now(Doing.NETWORK)

    def _shake_hands(self, one: _Lane) -> None:
        one.eager = False
        waits_for = one.sock.shake_hands()
        if waits_for is not None:
            one.events = select.POLLOUT if waits_for == "write" else select.POLLIN
            return
        one.events, one.stage = select.POLLIN, _Stage.SECURED
        self._pair.send(say.LaneSecured(lane=one.key))

    # --- frames ----------------------------------------------------------------------------------------

    def _take(self, one: _Lane, frame: Frame) -> bool:
        """Do what a frame is for; False when word of its request has not come."""
        header = frame.header
        if one.stage is _Stage.GREETING:
            if not isinstance(header, lane.LaneReady):
                raise ProtocolError("The source did not accept the lane.")
            one.stage = _Stage.OPEN
            self._pair.send(say.LaneReady(lane=one.key))
        elif isinstance(header, lane.LaneHello | lane.LaneReady):
            raise ProtocolError("The source sent a greeting in the middle of a lane.")
        elif header.r in one.withdrawn:
            if isinstance(header, lane.ReadFailed) or header.last:
                one.withdrawn.discard(header.r)
        elif header.r in one.orders:
            self._ordered(one, header, frame.content)
        else:
            return False
        return True

    def _try_again(self, one: _Lane, now: float) -> None:
        assert one.early is not None
        if self._take(one, one.early):
            one.early, one.eager = None, True
        elif now - one.early_since > WORD_WITHIN:
            raise RetryLater("The source sent something on a lane that belongs to no request.", code="CONNECTION_LOST")

    def _ordered(self, one: _Lane, header: lane.Block | lane.Pack | lane.ReadFailed, content: memoryview) -> None:
        order = one.orders[header.r]
        if isinstance(header, lane.ReadFailed):
            del one.orders[header.r]
            self._pair.send(say.RequestFailed(r=header.r, lane=one.key, error=header.error))
            return
        if header.last:
            del one.orders[header.r]
        now = one.meter.times.now
        if isinstance(header, lane.Block) and isinstance(order, RangeOrder):
            self._pair.send(self._writing.block(one.key, header, order, content, now))
        elif isinstance(header, lane.Pack) and isinstance(order, PackOrder):
            written = PackWriting(self._writing, one.key, header, order, content, now)
            try:
                written.write()
            finally:
                # Also of what breaks the rules in its middle: what is written is written.
                self._pair.send(written.answer())
        else:
            raise ProtocolError("The source sent something of another kind than was asked for.")


def _ended(key: int, error: Exception) -> say.LaneEnded:
    if not isinstance(error, TowpathError):
        error = RetryLater(f"The connection to the source broke: {error}.", code="CONNECTION_LOST")
    return say.LaneEnded(lane=key, error=error.to_document(), broke_rules=isinstance(error, ProtocolError))
