"""How much may be moved: rates as token buckets, amounts as allowances. Sans I/O; ``now`` in seconds is passed in.

Zero means no limit throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

# A bucket holds what may pass in this many seconds, so that a limit is kept on average over moments, not hours.
BURST_SECONDS = 0.25
MIN_BURST = 64 * 1024
UNLIMITED = 1 << 62


class TunnelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Rates in bytes a second and amounts in bytes; both directions of a session count together."""

    session_bytes: int = 0
    user_bytes: int = 0
    session_rate: int = 0
    user_rate: int = 0
    total_rate: int = 0


class Bucket:
    """A rate. What was moved may overdraw it a little; then nothing more is granted until it is made good."""

    def __init__(self, rate: int, now: float) -> None:
        self._rate = rate
        self._burst = max(rate * BURST_SECONDS, MIN_BURST)
        self._level = self._burst
        self._last = now

    def available(self, now: float) -> int:
        """Bytes that may be moved now."""
        if not self._rate:
            return UNLIMITED
        self._level = min(self._burst, self._level + (now - self._last) * self._rate)
        self._last = now
        return max(0, int(self._level))

    def full(self, now: float) -> bool:
        """Whether it holds all it ever will."""
        return not self._rate or self.available(now) >= int(self._burst)

    def take(self, size: int) -> None:
        """Account for bytes that were moved."""
        if self._rate:
            self._level -= size

    def ready_in(self, wanted: int) -> float:
        """Seconds until ``wanted`` bytes (or as much as it ever holds) will be there, from the last look on."""
        if not self._rate:
            return 0.0
        return max(0.0, (min(wanted, self._burst) - self._level) / self._rate)


class Allowance:
    """An amount that is used up."""

    def __init__(self, amount: int) -> None:
        self._left = amount or UNLIMITED

    @property
    def left(self) -> int:
        return max(0, self._left)

    def take(self, size: int) -> None:
        """Account for bytes that were moved."""
        self._left -= size


@dataclass
class Account:
    """What is counted for one session or one user: a rate, an amount, and how much there was."""

    rate: Bucket
    amount: Allowance
    pairs: int = 0
    moved: int = 0

    def forgettable(self, now: float) -> bool:
        """Whether nothing would be lost by forgetting it: no pairs, nothing to report, no debt."""
        return not self.pairs and not self.moved and self.rate.full(now)

    def take(self, size: int) -> None:
        """Account for bytes that were moved."""
        self.rate.take(size)
        self.amount.take(size)
        self.moved += size
