"""The sending end of one lane: a thread that reads what was asked for, digests it and sends it.

The file's version is looked at after the last byte of every block and small file was read, so content that changed
since it was listed is noticed and never sent as if it were what was listed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from agent.connect.lane_tls import SecuredLane
from agent.limits.pace import Pace
from agent.meter.lane import LaneMeter
from agent.meter.time_shares import Doing
from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.storage.node import version_of
from agent.transfer.basis.compression import Compression, Mode
from agent.transfer.basis.lane_keys import LAST_RECORD, records_of
from agent.transfer.source.lane_queues import LaneQueue, LaneRequest
from agent.transfer.source.second_read import SecondRead
from protocol import lane
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath, format_path
from protocol.session import MAX_BLOCK, ReadPack, ReadRange, Version

INTRODUCTION_TIMEOUT = 30.0
PACK_PAYLOAD = 1024 * 1024
# How much may be said in one frame of why files of a pack cannot be read, since its header is bounded: of many such
# files with long paths more is said in further ones.
PACK_REASONS = 256 * 1024
_OPEN_FILES = 8
# Nanoseconds in which a file system may give two changes the same time: a tick of the kernel's clock, at the slowest.
CLOCK_TICK = 20_000_000


def rest(ctime_ns: int, now_ns: int) -> float:
    """Seconds until a change of a file that changed at ``ctime_ns`` will show in its version. Times to come are no
    clock of ours and not waited for."""
    age = now_ns - ctime_ns
    return (CLOCK_TICK - age) / 10**9 if 0 <= age < CLOCK_TICK else 0.0


@dataclass(frozen=True, slots=True)
class Joined:
    """What a lane gets when it joins a control stream: its work, and the root, as far as the ticket reaches."""

    work: LaneQueue
    root: Root


Join = Callable[[bytes, int, LaneMeter], Joined]


class LaneSender:
    """One lane at the source. `run` blocks until it ends; shutting the socket down ends it. With ``read_twice`` nothing
    is sent that does not read the same a second time. It ends by itself after ``last_record`` TLS records, between two
    requests: destinations open another one before that."""

    def __init__(
        self,
        sock: SecuredLane,
        join: Join,
        pace: Pace,
        *,
        read_twice: bool = False,
        last_record: int = LAST_RECORD,
    ) -> None:
        self._socket = sock
        # Known when the lane has joined: before, no ticket has said how far it may reach.
        self._root: Root
        self._join = join
        self._pace = pace
        self._last_record = last_record
        self._meter = LaneMeter(sock)
        self._now = self._meter.times.now
        self._compression = Compression()
        self._read_twice = read_twice
        self._second: SecondRead | None = None
        self._buffer = memoryview(bytearray(2 * 1024 * 1024))
        self._files: OrderedDict[tuple[CollectionPath, bool], int] = OrderedDict()
        self._parent: tuple[CollectionPath, Directory] | None = None

    def run(self) -> None:
        """Be introduced, then serve. Raises OSError when the lane breaks, `ProtocolError` for a stranger."""
        try:
            work = self._introduction()
            while (request := work.get()) is not None:
                self._serve(request)
                if self._meter.records >= self._last_record:
                    raise RetryLater("The keys of a lane have protected as much as they may.", code="CONNECTION_LOST")
                self._now(Doing.IDLE)
        finally:
            self._close()

    def _introduction(self) -> LaneQueue:
        self._socket.settimeout(INTRODUCTION_TIMEOUT)
        prefix = self._read(lane.FRAME.size)
        header_length, payload_length = lane.lengths_untrusted(prefix)
        if payload_length or header_length > 1024:
            raise ProtocolError("A lane began with content.")
        hello = lane.header_untrusted(self._read(header_length))
        if not isinstance(hello, lane.LaneHello):
            raise ProtocolError("A lane began without a greeting.")
        joined = self._join(hello.instance, hello.lane, self._meter)
        self._root = joined.root
        if self._read_twice:
            self._second = SecondRead(joined.root)
        self._socket.sendall(lane.encode_header(lane.LaneReady()))
        self._socket.settimeout(None)
        return joined.work

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._socket.recv(length - len(data))
            if not more:
                raise RetryLater("A lane was closed before it was introduced.")
            data += more
        return data

    def _close(self) -> None:
        for descriptor in self._files.values():
            self._root.close_file(descriptor)
        self._files.clear()
        if self._parent is not None:
            self._parent[1].close()
            self._parent = None

    # --- requests --------------------------------------------------------------------------------------

    def _serve(self, work: LaneRequest) -> None:
        request = work.request
        if work.refused is not None:
            self._fail(request.r, work.refused)
        elif request.r in work.abandoned:
            self._leave_out(request.r, work.abandoned)
        elif isinstance(request, ReadRange):
            self._range(request, work.path, work.abandoned, work.compression)
        else:
            self._pack(request, work.paths, work.compression)

    def _fail(self, r: int, error: TowpathError) -> None:
        self._send(lane.encode_header(lane.ReadFailed(r, error.to_document())))

    def _leave_out(self, r: int, abandoned: set[int]) -> None:
        """The destination has got it on another lane."""
        abandoned.discard(r)
        self._fail(r, RetryLater("The request was withdrawn.", code="WITHDRAWN"))

    def _range(self, request: ReadRange, path: CollectionPath, abandoned: set[int], mode: Mode) -> None:
        if request.block > len(self._buffer):
            self._buffer = memoryview(bytearray(min(request.block, MAX_BLOCK)))
        end = request.offset + request.length
        offset = request.offset
        # For each range, since the file may be open from an older version of it.
        let_rest(request.version)
        while offset < end:
            if request.r in abandoned:
                self._leave_out(request.r, abandoned)
                return
            length = min(request.block, end - offset)
            block = self._buffer[:length]
            self._now(Doing.STORAGE)
            try:
                self._read_block(path, request, block, offset)
            except OSError as error:
                self._forget(path, request.follow)
                self._fail(request.r, fault(error, "source", path))
                return
            except TowpathError as error:
                self._forget(path, request.follow)
                self._fail(request.r, error)
                return
            self._now(Doing.DIGEST)
            digest, last = lane.digest(block), offset + length >= end
            packed = self._compression.attempt(block, mode)
            header = lane.Block(request.r, offset, digest, last, 0 if packed is None else length)
            self._send_content(header, block, packed)
            offset += length

    def _read_block(self, path: CollectionPath, request: ReadRange, block: memoryview, offset: int) -> None:
        descriptor = self._open(path, follow=request.follow)
        if self._read_file(descriptor, block, offset) != len(block):
            raise _changed(path)
        try:
            if self._second is not None:
                self._second.check(descriptor, block, offset, path)
        finally:
            # What changed between two reads was not misread.
            self._check(descriptor, request.version, path)

    def _pack(self, request: ReadPack, paths: tuple[CollectionPath, ...], mode: Mode) -> None:
        self._now(Doing.STORAGE)
        files: list[lane.Packed] = []
        used = said = 0
        at_rest = time.time_ns() - CLOCK_TICK
        for index, (file, path) in enumerate(zip(request.files, paths, strict=True)):
            size = file.version[2]
            if not 0 <= size <= PACK_PAYLOAD:
                raise ProtocolError("A file too large for a pack was asked for in one.")
            if used + size > PACK_PAYLOAD or said > PACK_REASONS:
                self._send_pack(request.r, files, used, mode, last=False)
                files, used, said = [], 0, 0
            content = self._buffer[used : used + size]
            # The version holds the time of the last change, which is at rest then: one look after the last byte covers
            # everything since it was listed.
            if file.version[4] > at_rest:
                let_rest(file.version)
            try:
                self._whole_file(path, file.version, content, follow=request.follow)
            except (OSError, TowpathError) as error:
                reason = fault(error, "source", path) if isinstance(error, OSError) else error
                failed = lane.Packed(index, 0, b"", reason.to_document())
                files.append(failed)
                said += lane.size_of(failed)
                continue
            files.append(lane.Packed(index, size, lane.digest(content)))
            used += size
        self._send_pack(request.r, files, used, mode, last=True)

    def _send_pack(self, r: int, files: list[lane.Packed], used: int, mode: Mode, *, last: bool) -> None:
        content = self._buffer[:used]
        self._now(Doing.DIGEST)
        packed = self._compression.attempt(content, mode)
        self._send_content(lane.Pack(r, files, last, 0 if packed is None else used), content, packed)
        self._now(Doing.STORAGE)

    def _send_content(self, header: lane.AnyHeader, content: memoryview, packed: bytes | None) -> None:
        """Send a header and its content, compressed or as it is, no faster than the pace allows."""
        self._now(Doing.NETWORK)
        self._meter.content += len(content)
        if packed is not None:
            self._meter.saved += len(content) - len(packed)
            content = memoryview(packed)
        held_back, started = self._meter.held_back(), time.perf_counter()
        self._send(lane.encode_header(header, len(content)))
        self._send_paced(content)
        seconds = time.perf_counter() - started
        # A destination that is slower than the network is helped by nothing that makes less of the content.
        self._compression.sent(len(content), max(0.0, seconds - (self._meter.held_back() - held_back)))

    def _send_paced(self, content: memoryview) -> None:
        self._pace.moved(len(content))
        while len(content) and self._pace.limited:
            piece = content[: self._pace.piece]
            self._now(Doing.LIMITED)
            self._pace.take(len(piece))
            self._now(Doing.NETWORK)
            self._send(piece)
            content = content[len(piece) :]
        if len(content):
            self._send(content)

    def _send(self, data: bytes | memoryview) -> None:
        self._meter.records += records_of(len(data))
        self._socket.sendall(data)

    # --- files -----------------------------------------------------------------------------------------

    def _whole_file(self, path: CollectionPath, version: Version, content: memoryview, *, follow: bool) -> None:
        read, status = self._root.read_whole(self._directory(path[:-1]), path[-1], content, follow=follow)
        if version_of(status) != version:
            raise _changed(path)
        if read != len(content):
            raise _other_length(path)
        if self._second is not None:
            self._again(self._second, path, version, content, follow=follow)

    def _again(
        self, second: SecondRead, path: CollectionPath, version: Version, content: memoryview, *, follow: bool
    ) -> None:
        descriptor = self._directory(path[:-1]).open_read(path[-1], follow=follow)
        try:
            second.check(descriptor, content, 0, path)
        finally:
            try:
                self._check(descriptor, version, path)
            finally:
                self._root.close_file(descriptor)

    def _directory(self, path: CollectionPath) -> Directory:
        if self._parent is None or self._parent[0] != path:
            handle = self._root.open_directory(path)
            if self._parent is not None:
                self._parent[1].close()
            self._parent = (path, handle)
        return self._parent[1]

    def _open(self, path: CollectionPath, *, follow: bool) -> int:
        key = (path, follow)
        known = self._files.get(key)
        if known is not None:
            self._files.move_to_end(key)
            return known
        if not path:
            raise ProtocolError("The root of a collection is no file.")
        descriptor = self._directory(path[:-1]).open_read(path[-1], follow=follow)
        self._files[key] = descriptor
        while len(self._files) > _OPEN_FILES:
            _, oldest = self._files.popitem(last=False)
            self._root.close_file(oldest)
        return descriptor

    def _forget(self, path: CollectionPath, follow: bool) -> None:
        known = self._files.pop((path, follow), None)
        if known is not None:
            self._root.close_file(known)

    def _check(self, descriptor: int, version: Version, path: CollectionPath) -> None:
        if version_of(self._root.fstat(descriptor)) != tuple(version):
            raise _changed(path)

    def _read_file(self, descriptor: int, into: memoryview, offset: int) -> int:
        done = 0
        while done < len(into):
            count = self._root.preadv(descriptor, [into[done:]], offset + done)
            if not count:
                break
            done += count
        return done


def let_rest(version: Version) -> None:
    """Wait until a change of a file of this version will show. To be called before anything of it is looked at that is
    to belong to what is read later. Blocks for a tick at most."""
    seconds = rest(version[4], time.time_ns())
    if seconds:
        time.sleep(seconds)


def _changed(path: CollectionPath) -> RetryLater:
    name = format_path(path)
    return RetryLater(
        f"{name} changed at the source while it was read; it is read again.", code="FILE_CHANGED", who="source owner"
    )


def _other_length(path: CollectionPath) -> RetryLater:
    """Files of /proc, and documents that a program mounts whose length it does not know, are told to have 0 bytes."""
    sentence = f"{format_path(path)} has another length at the source than its file system says; it is read again."
    return RetryLater(sentence, code="FILE_CHANGED", who="source owner")
