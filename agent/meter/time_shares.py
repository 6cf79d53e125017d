"""Where the time of a thread goes: it says what it is about to do, anybody may ask how long it did what. Pure."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from time import monotonic


class Doing(IntEnum):
    """What a lane's thread does, at either end."""

    # Nothing was asked of it.
    IDLE = 0
    # A limit of bandwidth holds it back.
    LIMITED = 1
    # Reading files (source) or writing them (destination).
    STORAGE = 2
    # Digesting.
    DIGEST = 3
    # Sending or receiving, encryption included.
    NETWORK = 4


class TimeShares:
    """Written by one thread and read by others; a reader sees times that are at most one step old."""

    __slots__ = ("_clock", "_doing", "_since", "_totals")

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._doing = Doing.IDLE
        self._since = clock()
        self._totals = [0.0] * len(Doing)

    def now(self, doing: Doing) -> None:
        """From now on it does this."""
        moment = self._clock()
        self._totals[self._doing] += moment - self._since
        self._since = moment
        self._doing = doing

    @property
    def doing(self) -> Doing:
        """What it does now."""
        return self._doing

    def totals(self) -> list[float]:
        """Seconds for each `Doing` so far, the present step included."""
        totals = list(self._totals)
        totals[self._doing] += max(0.0, self._clock() - self._since)
        return totals
