"""Counts frames before they are parsed, so that a flood ends the connection while it is still cheap.

Covers the known exhaustion attacks on HTTP/2: rapid reset, settings, ping, priority, empty DATA and CONTINUATION
floods, frames longer than announced. Only the nine bytes of each frame header are looked at (RFC 9113 section 4.1).
"""

from __future__ import annotations

from protocol.reverse_http.errors import Flood
from protocol.reverse_http.limits import Budget, Limits

PREFACE = 24
FRAME_HEADER = 9
# SETTINGS_MAX_FRAME_SIZE stays at its default, the least RFC 9113 allows.
MAX_FRAME = 16 * 1024
MAX_CONTINUATIONS = 32

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = 0x01

_NAMES = {
    PRIORITY: "PRIORITY",
    RST_STREAM: "RST_STREAM",
    SETTINGS: "SETTINGS",
    PING: "PING",
    WINDOW_UPDATE: "WINDOW_UPDATE",
    DATA: "empty DATA",
}
# Burst and rate per second.
_RATES: dict[int, tuple[float, float]] = {
    PRIORITY: (100, 1),
    RST_STREAM: (5000, 500),
    SETTINGS: (20, 1),
    PING: (100, 20),
    WINDOW_UPDATE: (2000, 200),
    DATA: (200, 20),
}
_OTHER = (100, 10)
# Streams that a client resets while a handler works on them. An honest client paces its resets below this rate
# (`Limits.fence_interval`).
_CANCELS = (1000, 500)
# One WINDOW_UPDATE is earned by so many bytes of DATA sent to the peer.
_BYTES_PER_UPDATE = 1024


class FrameMeter:
    """Follows the frame headers of one direction and raises `Flood`. ``server`` expects the client's preface."""

    def __init__(self, *, server: bool, limits: Limits, now: float) -> None:
        self._skip = PREFACE if server else 0
        self._head = bytearray()
        self._budgets = {kind: Budget(burst, rate, now) for kind, (burst, rate) in _RATES.items()}
        self._other = Budget(*_OTHER, now)
        self._cancels = Budget(*_CANCELS, now)
        self._max_block = 2 * limits.max_header_list
        self._block = 0
        self._continuations = 0

    def sent(self, size: int) -> None:
        """One frame of ``size`` bytes of DATA went to the peer: it may open its window again, and answer with a
        reset if it has given the stream up meanwhile."""
        self._budgets[WINDOW_UPDATE].earn(size / _BYTES_PER_UPDATE)
        self._budgets[RST_STREAM].earn(1)

    def opened(self) -> None:
        """A request went to the peer, which it may reset."""
        self._budgets[RST_STREAM].earn(1)

    def cancelled_untrusted(self, now: float) -> None:
        """The peer reset a request that was under way. Raises only `Flood`."""
        if not self._cancels.spend(now):
            raise Flood("The peer begins requests and resets them, too many in too short a time.")

    def oddity_untrusted(self, now: float) -> None:
        """Count something that is allowed but rare, such as an informational answer. Raises only `Flood`."""
        if not self._other.spend(now):
            raise Flood("The peer sent too many frames that carry nothing.")

    def feed_untrusted(self, data: bytes, now: float) -> None:
        """Look at the next bytes from the peer. Raises only `Flood`."""
        position, end = 0, len(data)
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
                position += step
                continue
            step = min(FRAME_HEADER - len(self._head), end - position)
            self._head += data[position : position + step]
            position += step
            if len(self._head) == FRAME_HEADER:
                self._skip = int.from_bytes(self._head[:3], "big")
                self._frame(self._head[3], self._head[4], self._skip, now)
                self._head.clear()

    def _frame(self, kind: int, flags: int, length: int, now: float) -> None:
        if length > MAX_FRAME:
            raise Flood(f"The peer sent a frame of {length} bytes; at most {MAX_FRAME} are allowed.")
        if kind in (HEADERS, CONTINUATION):
            self._header_block(kind, length)
        elif kind == DATA:
            if length == 0 and not flags & END_STREAM:
                self._spend(DATA, now)
        elif kind in self._budgets:
            self._spend(kind, now)
        else:
            self.oddity_untrusted(now)

    def _header_block(self, kind: int, length: int) -> None:
        if kind == HEADERS:
            self._block = self._continuations = 0
        else:
            self._continuations += 1
        self._block += length
        if self._continuations > MAX_CONTINUATIONS:
            raise Flood(f"The peer sent a header block of more than {MAX_CONTINUATIONS} CONTINUATION frames.")
        if self._block > self._max_block:
            raise Flood(f"The peer sent a header block of more than {self._max_block} bytes.")

    def _spend(self, kind: int, now: float) -> None:
        if not self._budgets[kind].spend(now):
            raise Flood(f"The peer sent too many {_NAMES[kind]} frames.")
