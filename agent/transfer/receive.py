"""The receiving end of one lane: a thread that takes frames, checks their digests and writes them to temporaries.

Nothing is written that does not match its digest. The thread never touches the journal: what it wrote it hands
to the settler, and to the fetcher it says which requests are through.
"""

from __future__ import annotations

import contextlib
import queue
import ssl
from collections.abc import Callable
from typing import Protocol

from agent.storage.base import Root
from agent.storage.faults import fault
from agent.transfer.jobs import (
    BlocksWritten,
    FileJob,
    LargeFile,
    PackRequest,
    RangeRequest,
    Request,
    SmallWritten,
    ToSettle,
)
from protocol import lane
from protocol.errors import ProtocolError, RetryLater, TowpathError, error_from_document_untrusted
from protocol.session import MAX_BLOCK

# Blocks of one large file that wait before the settler is asked to check them, in bytes.
CHECK_AFTER = 16 * 1024 * 1024
# A temporary must be readable for its check; a mode without these bits is set just before the rename.
OWNER_ACCESS = 0o600
_BUFFER = MAX_BLOCK + lane.MAX_HEADER


class Reports(Protocol):
    """What a lane thread tells the trio thread; every method returns at once and may be called from any thread."""

    def request_done(self, lane_number: int, r: int) -> None: ...
    def request_failed(self, lane_number: int, r: int, error: TowpathError) -> None: ...
    def job_failed(self, job: FileJob, error: TowpathError) -> None: ...
    def received(self, size: int) -> None: ...
    def blocks_settled(self, size: int) -> None: ...
    def file_failed(self, file: LargeFile, error: TowpathError) -> None: ...


class LaneReceiver:
    """One lane at the destination. `run` blocks until the lane ends; shutting the socket down ends it."""

    def __init__(
        self,
        number: int,
        sock: ssl.SSLSocket,
        root: Root,
        requests: dict[int, Request],
        settle: queue.SimpleQueue[ToSettle | None],
        reports: Reports,
        temporary_name: Callable[[], bytes],
        mode_mask: int,
        preserve_timestamp: bool,
    ) -> None:
        self.number = number
        self._socket = sock
        self._root = root
        self._requests = requests
        self._settle = settle
        self._reports = reports
        self._temporary_name = temporary_name
        self._mode_mask = mode_mask
        self._preserve_timestamp = preserve_timestamp
        # Grows to the largest frame seen: a session of small blocks stays small.
        self._buffer = memoryview(bytearray(2 * 1024 * 1024))

    def introduce(self, instance: bytes) -> None:
        """Join the control stream ``instance``. Raises OSError, `ProtocolError`."""
        self._socket.sendall(lane.encode_header(lane.LaneHello(instance, self.number)))
        header, _ = self._frame()
        if not isinstance(header, lane.LaneReady):
            raise ProtocolError("The source did not accept the lane.")

    def run(self) -> None:
        """Take frames until the lane ends. Raises OSError or `ProtocolError`, never returns otherwise."""
        while True:
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

    def _frame(self) -> tuple[lane.AnyHeader, memoryview]:
        prefix = self._buffer[: lane.FRAME.size]
        self._read_exactly(prefix)
        header_length, payload_length = lane.lengths_untrusted(prefix)
        needed = header_length + payload_length
        if needed > len(self._buffer):
            self._buffer = memoryview(bytearray(min(_BUFFER, needed)))
        whole = self._buffer[:needed]
        self._read_exactly(whole)
        return lane.header_untrusted(whole[:header_length]), whole[header_length:]

    # --- large files -----------------------------------------------------------------------------------

    def _block(self, header: lane.Block, payload: memoryview) -> None:
        request = self._requests.get(header.r)
        self._reports.received(len(payload))
        if not isinstance(request, RangeRequest):
            # Abandoned meanwhile: a source may not know yet.
            return
        file = request.file
        if header.offset != request.offset + request.arrived or len(payload) > request.length - request.arrived:
            raise ProtocolError("The source sent a block that was not asked for.")
        index, rest = divmod(header.offset, file.block)
        if rest or len(payload) != file.length_of(index):
            raise ProtocolError("The source sent a block of the wrong size.")
        if lane.digest(payload) != header.digest:
            raise ProtocolError("A block arrived damaged: its digest does not match.")
        if not file.failed:
            try:
                self._write(file.descriptor, payload, header.offset)
            except OSError as error:
                file.failed = True
                self._reports.file_failed(file, fault(error, "destination", file.job.destination_path))
        request.arrived += len(payload)
        waiting = 0
        if file.failed:
            self._reports.blocks_settled(len(payload))
        else:
            waiting = file.add_unchecked(index, header.digest)
        if waiting * file.block >= CHECK_AFTER or header.last:
            self._settle.put(BlocksWritten(file))
        if header.last:
            if request.arrived != request.length:
                raise ProtocolError("The source ended a range early.")
            self._reports.request_done(self.number, header.r)

    def _write(self, descriptor: int, data: memoryview, offset: int) -> None:
        written = 0
        while written < len(data):
            written += self._root.pwrite(descriptor, data[written:], offset + written)

    # --- small files -----------------------------------------------------------------------------------

    def _pack(self, header: lane.Pack, payload: memoryview) -> None:
        request = self._requests.get(header.r)
        self._reports.received(len(payload))
        if not isinstance(request, PackRequest):
            return
        offset = 0
        for packed in header.files:
            if not 0 <= packed.index < len(request.jobs) or packed.index in request.seen:
                raise ProtocolError("The source sent a file that was not asked for.")
            job = request.jobs[packed.index]
            request.seen.add(packed.index)
            if packed.error is not None:
                self._reports.job_failed(job, error_from_document_untrusted(packed.error))
                continue
            content = payload[offset : offset + packed.size]
            if packed.size != job.row.size or len(content) != packed.size:
                raise ProtocolError("The source sent a file of another size than it listed.")
            if lane.digest(content) != packed.digest:
                raise ProtocolError("A file arrived damaged: its digest does not match.")
            offset += packed.size
            self._small(job, content, packed.digest)
        if offset != len(payload):
            raise ProtocolError("The source sent more than it announced.")
        if header.last:
            if len(request.seen) != len(request.jobs):
                raise ProtocolError("The source left files out of a pack.")
            self._reports.request_done(self.number, header.r)

    def _small(self, job: FileJob, content: memoryview, digest: bytes) -> None:
        name = self._temporary_name()
        try:
            descriptor = job.group.handle.create_temporary(name, job.row.mode & self._mode_mask | OWNER_ACCESS)
            try:
                self._write(descriptor, content, 0)
                if self._preserve_timestamp:
                    self._root.futimes(descriptor, job.row.mtime_ns)
            finally:
                self._root.close_file(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                job.group.handle.unlink(name)
            self._reports.job_failed(job, fault(error, "destination", job.destination_path))
            return
        self._settle.put(SmallWritten(job, name, digest))
