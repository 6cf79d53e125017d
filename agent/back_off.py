"""How long to wait before the relay is dialled again. Sans I/O.

Exponential with full jitter, because what made one agent lose its relay made thousands lose it. The longest pause is
short enough for all of them to be back within a minute of a relay's start, however long it was away.
"""

from __future__ import annotations

import random

FIRST = 2.0
MOST = 30.0
# A link that lasted this long, in seconds, counts as good: the next attempt starts from the shortest back-off.
GOOD_AFTER = 10.0


class BackOff:
    """The pauses of one agent, in seconds; ``jitter`` draws them."""

    def __init__(self, jitter: random.Random) -> None:
        self._jitter = jitter
        self._failures = 0

    def pause_after(self, lasted: float, retry_after: float | None) -> float:
        """The pause after a link (or an attempt) that lasted so long. ``retry_after`` is what the relay asked for."""
        if lasted >= GOOD_AFTER:
            self._failures = 0
        elif retry_after is not None:
            # Whatever a relay says, connections that do not last are not repeated without a pause.
            retry_after = max(retry_after, FIRST)
        if retry_after is not None:
            # Full jitter on top: what the relay told one agent it told thousands.
            pause = retry_after + self._jitter.uniform(0, min(retry_after, MOST))
        else:
            pause = self._jitter.uniform(0, min(MOST, FIRST * 2.0 ** min(self._failures, 16)))
        self._failures += 1
        return pause

    def forget(self) -> None:
        """Begin from the shortest pause again: what stood in the way may have gone (a changed network, a wake-up)."""
        self._failures = 0
