"""What one connection may cost, as numbers, and the rates at which a peer may spend them."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one connection. Sizes in bytes, times in seconds.

    Memory for bodies that nobody has read yet is at most ``max_streams * stream_window``: the window of the
    connection is given back on receipt, that of a stream when its reader consumes.
    """

    # Requests under way at one time; also the handlers a server runs, reset ones that have not ended included.
    max_streams: int = 100
    stream_window: int = 256 * KIB
    connection_window: int = MIB
    # RFC 9113 section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE.
    max_header_list: int = 64 * KIB
    # The longest request a server takes and the longest answer a client collects unless told otherwise.
    max_body: int = 64 * MIB
    # Bodies wait while this much is queued for the socket, so that control frames never wait long.
    out_buffer: int = 128 * KIB
    # More than this queued, all of it answers to control frames, means a peer that floods and does not read.
    max_queued: int = MIB
    # A peer that is silent for this long is sent a PING; silent for twice as long, it counts as dead.
    ping_interval: float = 15.0
    # The same while a call waits for its answer, or part of a body that was sent for any sign of life.
    quick_ping_interval: float = 6.0
    # A client asks at most this often whether the server has seen its resets (see `pings`).
    fence_interval: float = 0.25
    # How long a handler may go on after its caller left.
    handler_grace: float = 3.0
    # How long a connection whose stream ids are used up waits for calls under way.
    drain: float = 30.0
    flush: float = 1.0
    last_stream_id: int = 2**31 - 1


DEFAULT_LIMITS = Limits()


class Budget:
    """A token bucket: ``capacity`` at once, ``rate`` more each second. Time is passed in."""

    __slots__ = ("_at", "_capacity", "_level", "_rate")

    def __init__(self, capacity: float, rate: float, now: float) -> None:
        self._capacity = capacity
        self._rate = rate
        self._level = capacity
        self._at = now

    def spend(self, now: float) -> bool:
        """Take one token; False when there is none."""
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def earn(self, tokens: float) -> None:
        """Give tokens back for work that justifies them, never above the capacity."""
        self._level = min(self._capacity, self._level + tokens)
