"""What is booked when a block of a large file has arrived, whoever received it."""

from __future__ import annotations

import queue
from typing import Any, Protocol

from agent.transfer.basis.jobs import BlocksWritten, FileJob, LargeFile, RangeRequest
from agent.transfer.basis.patience import VERIFY_CHECKSUM
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.names import escape

# Blocks of one large file that wait before the settler is asked to check them, in bytes; and how many more before it is
# asked once more, where it has not begun.
CHECK_AFTER = 16 * 1024 * 1024


class Reports(Protocol):
    """What is told to the trio thread; every method returns at once and may be called from any thread."""

    def request_done(self, lane_number: int, r: int) -> None: ...
    def request_failed(self, lane_number: int, r: int, error: TowpathError) -> None: ...
    def job_failed(self, job: FileJob, error: TowpathError) -> None: ...
    def received(self, size: int) -> None: ...
    def blocks_settled(self, size: int) -> None: ...
    def file_failed(self, file: LargeFile, error: TowpathError) -> None: ...
    def block_damaged(self, file: LargeFile, index: int) -> None: ...


def damaged(source_path: bytes, what: str = "content") -> RetryLater:
    """What came from the source is not what the source says it sent: TLS had nothing to object to, so that one of the
    two machines, or the program at the source, is at fault."""
    return RetryLater(
        f"Some {what} of {escape(source_path)} arrived from the source with a digest that does not match; "
        "it is fetched again.",
        code=VERIFY_CHECKSUM,
        who="source owner",
        subject=escape(source_path),
    )


class BlockBooks:
    """Books blocks for one run; any thread may call."""

    def __init__(self, settle: queue.SimpleQueue[Any], reports: Reports) -> None:
        self._settle = settle
        self._reports = reports

    def arrived(self, request: RangeRequest, index: int, length: int, digest: bytes, *, good: bool, last: bool) -> None:
        """A block is here, written unless it is damaged or its file has failed; the first of its kind to come."""
        file = request.file
        request.arrived += length
        enough = False
        if not good:
            # Its share of the budget is kept for the next attempt.
            self._reports.block_damaged(file, index)
        elif file.failed:
            self._reports.blocks_settled(length)
        else:
            enough = not file.add_unchecked(index, digest) % max(1, CHECK_AFTER // file.block)
        # With a twin another lane may have said already that everything is here.
        if enough or last or request.twin is not None:
            self._settle.put(BlocksWritten(file))

    def ended(self, lane: int, request: RangeRequest, *, last: bool) -> None:
        """Perhaps that was all of a request. Raises `ProtocolError`."""
        if last:
            if request.arrived != request.length:
                raise ProtocolError("The source ended a range early.")
            self._reports.request_done(lane, request.r)
