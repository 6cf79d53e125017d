"""Holds the threads of a worker's lanes to a rate that may change at any time."""

from __future__ import annotations

import threading
import time

from agent.limits.bucket import TokenBucket

# Content is moved in pieces of about this many seconds, so that a rate is met smoothly and nobody waits for long.
PIECE_SECONDS = 0.05
LEAST_PIECE, MOST_PIECE = 512, 256 * 1024


class Pace:
    """One for all lanes of a worker; every method may be called from any thread."""

    def __init__(self, rate: int | None = None) -> None:
        # Of the rate that was set and the one that processor time allows, the lower one holds.
        self._set = rate
        self._governed: int | None = None
        self._bucket = TokenBucket(rate, time.monotonic())
        self._changed = threading.Condition()
        self._waited = 0.0
        self._moved = 0
        self._counting = threading.Lock()
        self._waiting: dict[int, float] = {}
        # The same of lanes that are held to this pace in other processes.
        self.waited_elsewhere = 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a rate to be met: whoever moves bytes must ask for them."""
        return self._bucket.rate is not None

    @property
    def rate(self) -> float | None:
        """Bytes a second."""
        return self._bucket.rate

    @property
    def piece(self) -> int:
        """How much to move at once."""
        rate = self._bucket.rate
        return MOST_PIECE if rate is None else int(min(max(rate * PIECE_SECONDS, LEAST_PIECE), MOST_PIECE))

    @property
    def content(self) -> int:
        """Bytes that were moved so far, limited or not."""
        return self._moved

    def moved(self, amount: int) -> None:
        """Count what is moved."""
        with self._counting:
            self._moved += amount

    @property
    def waited(self) -> float:
        """Seconds that threads have waited so far, added up; those who still wait count up to now."""
        with self._changed:
            now = time.monotonic()
            waiting = sum(now - since for since in self._waiting.values())
            return self._waited + self.waited_elsewhere + waiting

    def set_rate(self, rate: int | None) -> None:
        """From now on this rate holds, also for those who wait."""
        with self._changed:
            self._set = rate
            self._apply()

    def govern(self, rate: int | None) -> None:
        """From now on no more than this, whatever was set."""
        with self._changed:
            self._governed = rate
            self._apply()

    def _apply(self) -> None:
        rate = min((each for each in (self._set, self._governed) if each is not None), default=None)
        if rate != self._bucket.rate:
            self._bucket.set_rate(rate, time.monotonic())
            self._changed.notify_all()

    def take(self, amount: int) -> None:
        """Wait until so many bytes may pass."""
        with self._changed:
            began = time.monotonic()
            reservation = self._bucket.reserve(amount, began)
            delay = self._bucket.delay(reservation, began)
            if not delay:
                return
            me = threading.get_ident()
            self._waiting[me] = began
            while delay:
                self._changed.wait(delay)
                delay = self._bucket.delay(reservation, time.monotonic())
            del self._waiting[me]
            self._waited += time.monotonic() - began
