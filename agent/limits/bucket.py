"""A token bucket for bytes that serves in the order of asking, and whose rate may change while somebody waits. Pure."""

from __future__ import annotations

# What may pass at once after a pause: so many seconds' worth, and never less than a few packets.
BURST_SECONDS = 0.1
LEAST_BURST = 16 * 1024
# Who waits when the rate changes waits no longer than this from then on (seconds).
MOST_WAIT = 2.0


class TokenBucket:
    """Times are seconds of one steady clock. A rate of None lets everything pass."""

    def __init__(self, rate: float | None, now: float) -> None:
        self.rate = rate
        self._spent = 0
        # Of all bytes ever asked for, so many may have passed.
        self._allowed = 0.0
        self._since = now

    def set_rate(self, rate: float | None, now: float) -> None:
        """Go on at another rate; what has been earned so far stays. Whoever waits is not kept for minutes by a much
        lower one: nothing can end a thread that waits here."""
        self._earn(now)
        self.rate = rate
        if rate is not None:
            self._allowed = max(self._allowed, self._spent - rate * MOST_WAIT)

    def reserve(self, amount: int, now: float) -> int:
        """Ask for some bytes; `delay` tells with the number that comes back when they may pass."""
        self._earn(now)
        self._spent += amount
        return self._spent

    def delay(self, reservation: int, now: float) -> float:
        """Seconds until the bytes may pass at the present rate; 0 when they may."""
        self._earn(now)
        if self.rate is None:
            return 0.0
        return max(0.0, (reservation - self._allowed) / self.rate)

    def _earn(self, now: float) -> None:
        passed, self._since = max(0.0, now - self._since), now
        if self.rate is None:
            self._allowed = float(self._spent)
        else:
            most = self._spent + max(LEAST_BURST, self.rate * BURST_SECONDS)
            self._allowed = min(self._allowed + self.rate * passed, most)
