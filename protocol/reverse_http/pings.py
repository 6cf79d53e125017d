"""When to send a PING, and what its answer proves. Sans I/O.

A PING has two uses here. *Liveness*: a peer that was silent for an interval is asked, silent for two it is dead. The
interval is long while nobody waits for the peer, because each PING of thousands of idle agents is work for their relay,
and short while somebody does.
*Fences*: a client that reset a stream cannot use that stream's place again until the server has seen the reset,
or it would trip the server's limit, and late answers to forgotten streams would arrive. The answer to a PING sent
after the reset proves that it was seen (frames are processed in order), so the place is held until then. As fences
are spaced, they also keep an honest client below the server's guard against rapid resets.
"""

from __future__ import annotations

import math


class Pings:
    """The PINGs of one connection; at most one is unanswered at a time. ``now`` is monotonic seconds."""

    __slots__ = (
        "_covered",
        "_expecting_since",
        "_fence_interval",
        "_flight",
        "_heard",
        "_interval",
        "_number",
        "_quick_interval",
        "_sent",
        "_waiting",
    )

    def __init__(self, interval: float, quick_interval: float, fence_interval: float, now: float) -> None:
        self._interval = interval
        self._quick_interval = min(interval, quick_interval)
        self._expecting_since: float | None = None
        self._fence_interval = fence_interval
        self._heard = now
        self._sent = -math.inf
        self._number = 0
        self._flight: bytes | None = None
        self._waiting = 0
        self._covered = 0

    def watch(self, interval: float) -> None:
        """Ask after this much silence from now on."""
        self._interval = interval
        self._quick_interval = min(interval, self._quick_interval)

    @property
    def held(self) -> int:
        """Places of reset streams that the peer has not confirmed."""
        return self._waiting + self._covered

    def heard(self, now: float) -> None:
        """Any bytes came from the peer."""
        self._heard = now

    def expect(self, now: float) -> None:
        """Somebody waits for the peer from now on, until `calm`: the short interval counts, as from now."""
        if self._expecting_since is None:
            self._expecting_since = now

    def calm(self) -> None:
        """Nobody waits for the peer any more."""
        self._expecting_since = None

    def _after(self, intervals: int) -> float:
        """When the peer will have been silent for so many intervals."""
        moment = self._heard + intervals * self._interval
        if self._expecting_since is None:
            return moment
        return min(moment, max(self._heard, self._expecting_since) + intervals * self._quick_interval)

    def hold(self) -> None:
        """A stream was reset; its place waits for a fence."""
        self._waiting += 1

    def acknowledged(self, data: bytes) -> int | None:
        """An answer to a PING: how many places it sets free. None when it answers nothing we asked."""
        if self._flight is None or data != self._flight:
            return None
        self._flight = None
        freed, self._covered = self._covered, 0
        return freed

    def is_dead(self, now: float) -> bool:
        """Whether the peer was silent for two intervals."""
        return now >= self._after(2)

    def silence(self, now: float) -> float:
        """How long nothing has come, in seconds."""
        return now - self._heard

    def deadline(self) -> float:
        """When to look at `due` and `is_dead` again."""
        if self._flight is not None:
            return self._after(2)
        probe = self._after(1)
        return min(probe, self._sent + self._fence_interval) if self._waiting else probe

    def due(self, now: float) -> bytes | None:
        """The eight bytes of a PING to send now, if one is due."""
        if self._flight is not None or now < self.deadline():
            return None
        self._number += 1
        self._flight = self._number.to_bytes(8, "big")
        self._sent = now
        self._covered, self._waiting = self._waiting, 0
        return self._flight
