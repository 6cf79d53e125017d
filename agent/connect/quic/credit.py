"""Frames on a QUIC stream: content, and credit for the other direction. Sans I/O.

QUIC libraries widen their windows as data arrives, taken or not; a receiver with a slow disk would be flooded. So each
side may have `WINDOW` bytes under way that the other has not taken yet, and gets credit for what was taken. The end
of one direction is a frame too: QUIC's own end of a stream would leave no way to give credit for the other direction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from protocol.errors import ProtocolError

WINDOW = 4 * 1024 * 1024
MAX_CONTENT = 256 * 1024
CONTENT, CREDIT, END = 0, 1, 2
HEADER = struct.Struct(">BI")
END_FRAME = HEADER.pack(END, 0)
OPEN_FRAME = HEADER.pack(CREDIT, 0)
# Credit is given in pieces no smaller than this.
_LEAST = WINDOW // 8


def content_header(size: int) -> bytes:
    """What stands before so many bytes of content."""
    return HEADER.pack(CONTENT, size)


class Sender:
    """How much may still be sent."""

    def __init__(self) -> None:
        self.left = WINDOW

    def sent(self, size: int) -> None:
        """So many bytes of content went out."""
        self.left -= size

    def credit_untrusted(self, size: int) -> None:
        """The other side took so many. Raises `ProtocolError` for more than was sent."""
        if not 0 < size <= WINDOW - self.left:
            raise ProtocolError("The peer gives credit for what it was never sent.")
        self.left += size


class Receiver:
    """Cuts a stream into frames, and counts what was not taken yet."""

    def __init__(self) -> None:
        self._header = bytearray()
        # Bytes of the current frame's content that are still to come.
        self._left = 0
        self.waiting = 0
        self.ended = False
        self._taken = 0

    def feed_untrusted(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """What has come, in order: kind, number, content. Raises `ProtocolError`.

        Content is passed on in pieces as it comes; of credit only the number counts.
        """
        position = 0
        while position < len(data):
            if self._left:
                piece = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                self.waiting += len(piece)
                if self.waiting > WINDOW:
                    raise ProtocolError("The peer sends more over QUIC than it was given credit for.")
                yield CONTENT, len(piece), piece
                continue
            missing = HEADER.size - len(self._header)
            self._header += data[position : position + missing]
            position += missing
            if len(self._header) < HEADER.size:
                return
            kind, number = HEADER.unpack(self._header)
            self._header.clear()
            if kind == CREDIT:
                yield CREDIT, number, b""
            elif kind == END and not number and not self.ended:
                self.ended = True
            elif kind == CONTENT and 0 < number <= MAX_CONTENT and not self.ended:
                self._left = number
            else:
                raise ProtocolError("A frame over QUIC cannot be read.")

    def taken(self, size: int) -> bytes:
        """So many bytes were passed on; the frame that gives credit for them, if it is time for one."""
        self.waiting -= size
        self._taken += size
        if self._taken < _LEAST:
            return b""
        frame = HEADER.pack(CREDIT, self._taken)
        self._taken = 0
        return frame
