"""How many lanes a session should have: one more while that makes it faster, one less when it did not. Pure.

A further lane is tried only while every lane is busy, and once goodput no longer rises by itself: on a long path a
connection takes a second or two to find its rate, which must not be taken for the gain of another one. If goodput does
not rise by a tenth the lane goes again, and the next try waits, each time longer: paths change, but mostly they do not.
Where a lane's thread is busy and no processor is left for another one there is no try at all: two that write one file
wait for each other in the kernel, and take processor time to wait.
"""

from __future__ import annotations

# Seconds over which goodput is measured before it is judged.
SPAN = 2.0
GAIN = 1.10
# Goodput that grows by no more than this from one span to the next has found its rate.
STEADY = 1.10
FIRST_REST, LONGEST_REST = 15.0, 240.0


class LaneCount:
    """Feed it the counters now and then; it says what to do."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._since = now
        self._bytes = 0
        self._busy = True
        self._room = True
        self._before: float | None = None
        # Goodput of the span before, if every lane was busy in it.
        self._last: float | None = None
        self._rest = FIRST_REST
        self._not_before = 0.0

    def decide(self, now: float, received: int, lanes: int, *, busy: bool, room: bool = True) -> int:
        """How many lanes there should be. ``received`` counts bytes; ``busy``: every lane has work waiting; ``room``: a
        further one would find a processor."""
        self._busy = self._busy and busy
        self._room = self._room and room
        if lanes > self.limit:
            # The limit was lowered while the session runs.
            self._begin(now, received, None)
            return self.limit
        if now - self._since < SPAN:
            return lanes
        goodput = (received - self._bytes) / (now - self._since)
        was_busy, had_room, before, last = self._busy, self._room, self._before, self._last
        self._begin(now, received, None)
        self._last = goodput if was_busy else None
        if not was_busy:
            return lanes
        if before is not None:
            if goodput < before * GAIN:
                self._not_before = now + self._rest
                self._rest = min(self._rest * 2, LONGEST_REST)
                return max(1, lanes - 1)
            self._rest = FIRST_REST
        steady = last is not None and goodput <= last * STEADY
        if lanes < self.limit and had_room and now >= self._not_before and (steady or before is not None):
            self._before = goodput
            return lanes + 1
        return lanes

    def _begin(self, now: float, received: int, before: float | None) -> None:
        self._since, self._bytes, self._before, self._busy, self._room = now, received, before, True, True
