"""How many requests each person may make: a bucket that fills evenly and is as large as one period's allowance.

Pure bookkeeping: the caller passes the time. A person who asks for too much waits alone; nobody else's bucket changes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

# Memory stays bounded however many people there are; those who have not asked for longest are forgotten first, which
# only ever gives them a full bucket.
MAX_SUBJECTS = 100_000


@dataclass(frozen=True)
class Balance:
    """What a person has left: ``limit`` requests a period, ``remaining`` now; ``reset`` seconds until the bucket is
    full again, ``wait`` seconds until the next request is answered (0: it was)."""

    limit: int
    remaining: int
    reset: int
    wait: float


@dataclass(frozen=True)
class AllowanceStatistics:
    """People with an opened bucket, and requests refused since the start."""

    subjects: int
    refused: int


class Allowance:
    """``limit`` requests, or other things, in ``period`` seconds for each subject; a limit of 0 means none."""

    def __init__(self, limit: int, period: float) -> None:
        self._limit = limit
        self._period = period
        # For each subject how many requests it has left, and when that was true.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._refused = 0

    def take(self, subject: str, now: float, count: int = 1) -> Balance | None:
        """Count one request, or as many as ``count`` together (at most ``limit``); None where there is no limit."""
        if self._limit == 0:
            return None
        left = self._now_left(subject, now)
        wait = 0.0 if left >= count else (count - left) * self._period / self._limit
        if wait:
            self._refused += 1
        else:
            left -= count
        self._left[subject] = (left, now)
        self._left.move_to_end(subject)
        while len(self._left) > MAX_SUBJECTS:
            self._left.popitem(last=False)
        return self._balance(left, wait)

    def balance(self, subject: str, now: float) -> Balance | None:
        """What the subject has left, without counting a request."""
        return None if self._limit == 0 else self._balance(self._now_left(subject, now), 0.0)

    def statistics(self) -> AllowanceStatistics:
        """How much is asked for."""
        return AllowanceStatistics(len(self._left), self._refused)

    def _now_left(self, subject: str, now: float) -> float:
        left, then = self._left.get(subject, (float(self._limit), now))
        # A clock that was set back gives nothing and takes nothing.
        return min(float(self._limit), left + max(0.0, now - then) * self._limit / self._period)

    def _balance(self, left: float, wait: float) -> Balance:
        reset = (self._limit - left) * self._period / self._limit
        return Balance(self._limit, int(left), math.ceil(reset), wait)
