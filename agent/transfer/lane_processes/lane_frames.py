"""One lane of a lane process: a socket that never blocks, and what has come of the frame that is being received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agent.meter.lane import LaneMeter
from agent.meter.time_shares import Doing
from agent.transfer.basis import compression
from protocol import lane
from protocol.errors import ProtocolError, RetryLater
from protocol.session import MAX_BLOCK


class Readable(Protocol):
    """What frames are read from."""

    @property
    def records(self) -> int:
        """TLS records that were read, at most."""

    def recv_now(self, view: memoryview, count: int) -> int:
        """Read up to so many bytes; 0 at the end. Raises BlockingIOError when nothing is here, OSError."""


class Allowance(Protocol):
    """How fast content may be taken."""

    def allow(self, most: int) -> int:
        """How many of so many bytes may be read now; 0 when that has to wait."""

    def took(self, count: int) -> None:
        """So many were read."""


@dataclass(slots=True)
class Frame:
    """A header with its content, unpacked. The content's memory is used again for the next frame."""

    header: lane.AnyHeader
    content: memoryview


class FrameReader:
    """Reads whole frames as far as they have come. With a blocked lane nothing else has to wait."""

    def __init__(self, sock: Readable, meter: LaneMeter) -> None:
        self._socket = sock
        self._meter = meter
        self._prefix = memoryview(bytearray(lane.FRAME.size))
        # Both grow to the largest seen: a session of small blocks stays small.
        self._raw_header = memoryview(bytearray(64 * 1024))
        self._buffer = memoryview(bytearray(1024 * 1024))
        self._header: lane.AnyHeader | None = None
        self._lengths: tuple[int, int] | None = None
        self._view = self._prefix
        self._got = 0
        # The last call ended because the allowance did.
        self.held_back = False

    def next(self, allowance: Allowance) -> Frame | None:
        """The next frame, None when not all of it is here. Raises OSError, `ProtocolError`, and `RetryLater` when the
        lane is over."""
        self.held_back = False
        while True:
            content = self._header is not None
            if self._got < len(self._view) and not self._fill(allowance if content else None):
                return None
            if self._lengths is None:
                self._lengths = lane.lengths_untrusted(self._prefix)
                if self._lengths[0] > len(self._raw_header):
                    self._raw_header = memoryview(bytearray(self._lengths[0]))
                self._want(self._raw_header[: self._lengths[0]])
            elif self._header is None:
                self._header = lane.header_untrusted(self._view)
                length = self._lengths[1]
                if length > len(self._buffer):
                    self._buffer = memoryview(bytearray(length))
                self._want(self._buffer[:length])
            else:
                return self._whole(self._header, self._view)

    def _want(self, view: memoryview) -> None:
        self._view, self._got = view, 0

    def _fill(self, allowance: Allowance | None) -> bool:
        """Read into the view; whether it is full."""
        view, got, total = self._view, self._got, len(self._view)
        receive = self._socket.recv_now
        try:
            while got < total:
                most = total - got
                if allowance is not None:
                    most = allowance.allow(most)
                    if not most:
                        self.held_back = True
                        return False
                count = receive(view[got : got + most], most)
                if not count:
                    raise RetryLater("The source closed a lane.", code="CONNECTION_LOST")
                got += count
                if allowance is not None:
                    self._meter.content += count
                    allowance.took(count)
        except BlockingIOError:
            return False
        finally:
            self._got = got
            self._meter.records = self._socket.records
        return True

    def _whole(self, header: lane.AnyHeader, content: memoryview) -> Frame:
        self._header = self._lengths = None
        self._want(self._prefix)
        if isinstance(header, lane.Block | lane.Pack) and header.whole:
            content = self._inflate(content, header.whole)
        return Frame(header, content)

    def _inflate(self, payload: memoryview, whole: int) -> memoryview:
        if not len(payload) < whole <= MAX_BLOCK or not compression.usable():
            raise ProtocolError("The source sent compressed content of an impossible size.")
        self._meter.times.now(Doing.DIGEST)
        content = compression.inflate_untrusted(payload, whole)
        self._meter.content += whole - len(payload)
        self._meter.saved += whole - len(payload)
        # What was spoilt on its way matches no digest: it is fetched again like anything else that does not.
        return memoryview(bytes(whole) if content is None else content)
