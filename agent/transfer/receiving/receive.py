"""The receiving end of one lane: a thread that takes frames, checks their digests and writes blocks of large files.

Nothing is written that does not match its digest; what does not is asked for again, alone. Small files go to the
settler, whole packs at a time. To the fetcher the thread says which requests are through.
"""

from __future__ import annotations

import queue
from typing import Any

from agent.connect.lane_tls import SecuredLane
from agent.limits.pace import Pace
from agent.meter.lane import LaneMeter
from agent.meter.time_shares import Doing
from agent.storage.base import Root
from agent.storage.faults import fault
from agent.transfer.asking.arrivals import BlockBooks, Reports, damaged
from agent.transfer.asking.take_ahead import Awaited
from agent.transfer.basis import compression
from agent.transfer.basis.jobs import LargeFile, PackArrived, PackRequest, RangeRequest, Request
from protocol import lane
from protocol.errors import ProtocolError, RetryLater, error_from_document_untrusted
from protocol.session import MAX_BLOCK


class LaneReceiver:
    """One lane at the destination. `run` blocks until the lane ends; shutting the socket down ends it."""

    def __init__(
        self,
        number: int,
        sock: SecuredLane,
        root: Root,
        requests: dict[int, Request | Awaited],
        settle: queue.SimpleQueue[Any],
        reports: Reports,
        pace: Pace,
    ) -> None:
        self.number = number
        self._socket = sock
        self._root = root
        self._requests = requests
        self._settle = settle
        self._reports = reports
        self._pace = pace
        self._books = BlockBooks(settle, reports)
        self.meter = LaneMeter(sock)
        self._now = self.meter.times.now
        self._prefix = memoryview(bytearray(lane.FRAME.size))
        # Both grow to the largest seen: a session of small blocks stays small.
        self._header = memoryview(bytearray(64 * 1024))
        self._buffer = memoryview(bytearray(1024 * 1024))
        self._over = False
        # Whether the source's answer to our greeting is still to come.
        self._waits = False

    def introduce(self, instance: bytes, *, wait: bool = True) -> None:
        """Join the control stream ``instance``. Raises OSError, `ProtocolError`. Without ``wait`` the answer is the
        first thing that `run` reads."""
        self._socket.sendall(lane.encode_header(lane.LaneHello(instance, self.number)))
        if wait:
            self._accepted()
        self._waits = not wait

    def _accepted(self) -> None:
        header, _ = self._frame()
        if not isinstance(header, lane.LaneReady):
            raise ProtocolError("The source did not accept the lane.")

    def end(self) -> None:
        """Have a slow lane end with its next piece. What the kernel has of it already can be read long after the socket
        was shut down. Called from any thread."""
        self._over = True

    def run(self) -> None:
        """Take frames until the lane ends. Raises OSError or `ProtocolError`, never returns otherwise."""
        if self._waits:
            self._now(Doing.NETWORK)
            self._accepted()
        while True:
            self._now(Doing.NETWORK)
            header, payload = self._frame()
            if isinstance(header, lane.Block):
                self._block(header, payload)
            elif isinstance(header, lane.Pack):
                self._pack(header, payload)
            elif isinstance(header, lane.ReadFailed):
                self._reports.request_failed(self.number, header.r, error_from_document_untrusted(header.error))
            else:
                raise ProtocolError("The source sent a greeting in the middle of a lane.")

    # --- frames ----------------------------------------------------------------------------------------

    def _read_exactly(self, view: memoryview) -> None:
        received = 0
        total = len(view)
        receive = self._socket.recv_into
        while received < total:
            count = receive(view[received:], total - received)
            if not count:
                raise RetryLater("The source closed a lane.", code="CONNECTION_LOST")
            received += count
        self.meter.records = self._socket.records

    def _read_content(self, view: memoryview) -> None:
        """Read no faster than the pace allows; what is not read holds the source back, whatever carries the lane."""
        self._pace.moved(len(view))
        while len(view) and self._pace.limited:
            piece = view[: self._pace.piece]
            self._now(Doing.LIMITED)
            self._pace.take(len(piece))
            if self._over:
                raise RetryLater("The lane was ended.", code="CONNECTION_LOST")
            self._now(Doing.NETWORK)
            self._read_exactly(piece)
            self.meter.content += len(piece)
            view = view[len(piece) :]
        received, total = 0, len(view)
        receive, meter = self._socket.recv_into, self.meter
        while received < total:
            count = receive(view[received:], total - received)
            if not count:
                raise RetryLater("The source closed a lane.", code="CONNECTION_LOST")
            received += count
            meter.content += count
        meter.records = self._socket.records

    def _frame(self) -> tuple[lane.AnyHeader, memoryview]:
        self._read_exactly(self._prefix)
        header_length, payload_length = lane.lengths_untrusted(self._prefix)
        if header_length > len(self._header):
            self._header = memoryview(bytearray(header_length))
        raw = self._header[:header_length]
        self._read_exactly(raw)
        header = lane.header_untrusted(raw)
        if isinstance(header, lane.Pack):
            # The settler keeps it until the pack is written.
            payload = memoryview(bytearray(payload_length))
        else:
            if payload_length > len(self._buffer):
                self._buffer = memoryview(bytearray(payload_length))
            payload = self._buffer[:payload_length]
        self._read_content(payload)
        if isinstance(header, lane.Block | lane.Pack) and header.whole:
            payload = self._inflate(payload, header.whole)
        return header, payload

    def _inflate(self, payload: memoryview, whole: int) -> memoryview:
        if not len(payload) < whole <= MAX_BLOCK or not compression.usable():
            raise ProtocolError("The source sent compressed content of an impossible size.")
        self._now(Doing.DIGEST)
        content = compression.inflate_untrusted(payload, whole)
        self.meter.content += whole - len(payload)
        self.meter.saved += whole - len(payload)
        # What was spoilt on its way matches no digest: it is fetched again like anything else that does not.
        return memoryview(bytes(whole) if content is None else content)

    # --- large files -----------------------------------------------------------------------------------

    def _block(self, header: lane.Block, payload: memoryview) -> None:
        request = self._requests.get(header.r)
        self._reports.received(len(payload))
        if not isinstance(request, RangeRequest):
            # Abandoned meanwhile: a source may not know yet.
            self._reports.request_done(self.number, header.r)
            return
        file = request.file
        arrived, missing = request.arrived, request.length - request.arrived
        if header.offset != request.offset + arrived or not 0 < len(payload) <= missing:
            raise ProtocolError("The source sent a block that was not asked for.")
        index, rest = divmod(header.offset, file.block)
        if rest or len(payload) != file.length_of(index):
            raise ProtocolError("The source sent a block of the wrong size.")
        self._now(Doing.DIGEST)
        good = lane.digest(payload) == header.digest
        if request.owners.setdefault(header.offset, request.r) != request.r:
            # Another lane was faster.
            request.arrived += len(payload)
        else:
            if good and not file.failed:
                self._now(Doing.STORAGE)
                self._write_block(file, payload, header.offset)
            self._books.arrived(request, index, len(payload), header.digest, good=good, last=header.last)
        self._books.ended(self.number, request, last=header.last)

    def _write_block(self, file: LargeFile, payload: memoryview, offset: int) -> None:
        try:
            self._write(file.descriptor, payload, offset)
        except OSError as error:
            file.failed = True
            self._reports.file_failed(file, fault(error, "destination", file.job.destination_path))

    def _write(self, descriptor: int, data: memoryview, offset: int) -> None:
        written = 0
        while written < len(data):
            written += self._root.pwrite(descriptor, data[written:], offset + written)

    # --- small files -----------------------------------------------------------------------------------

    def _pack(self, header: lane.Pack, payload: memoryview) -> None:
        request = self._requests.get(header.r)
        if isinstance(request, Awaited):
            request = request.wait(lambda: self._over)
        self._reports.received(len(payload))
        if not isinstance(request, PackRequest):
            self._reports.request_done(self.number, header.r)
            return
        self._now(Doing.DIGEST)
        jobs, contents, digests = [], [], []
        wanted, seen, owners, r = request.jobs, request.seen, request.owners, request.r
        offset = 0
        for packed in header.files:
            index, size = packed.index, packed.size
            if not 0 <= index < len(wanted) or index in seen:
                raise ProtocolError("The source sent a file that was not asked for.")
            job = wanted[index]
            seen.add(index)
            # Another lane may have been faster.
            first = owners.setdefault(index, r) == r
            if packed.error is not None and not first:
                continue
            if packed.error is not None:
                self._reports.job_failed(job, error_from_document_untrusted(packed.error))
                continue
            content = payload[offset : offset + size]
            if size != job.row.size or len(content) != size:
                raise ProtocolError("The source sent a file of another size than it listed.")
            offset += size
            if not first:
                continue
            if lane.digest(content) != packed.digest:
                self._reports.job_failed(job, damaged(job.source_path))
                continue
            jobs.append(job)
            contents.append(content)
            digests.append(packed.digest)
        if offset != len(payload):
            raise ProtocolError("The source sent more than it announced.")
        self._settle.put(PackArrived(jobs, contents, digests))
        if header.last:
            if len(request.seen) != len(request.jobs):
                raise ProtocolError("The source left files out of a pack.")
            self._reports.request_done(self.number, header.r)
