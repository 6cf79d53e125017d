"""Holds the processor time of a worker within a limit by moving content more slowly. Pure."""

from __future__ import annotations

# How fast the rate may rise again, for each look; falling is as fast as it must be.
RISE = 1.25
# Bytes a second that are always allowed: a worker that computes for other reasons must still come to an end.
LEAST_RATE = 16 * 1024


class Governor:
    """Feed it what a process has computed and moved; it answers with the rate that the limit allows."""

    def __init__(self, now: float, processor: float, moved: int) -> None:
        self._before = (now, processor, moved)
        self._rate: float | None = None

    def look(self, limit: int | None, now: float, processor: float, moved: int) -> int | None:
        """Bytes a second from now on, None for any. ``limit``: percent of one processor; ``processor``: seconds of
        processor time so far; ``moved``: content bytes so far."""
        before, self._before = self._before, (now, processor, moved)
        seconds = now - before[0]
        if limit is None or seconds <= 0:
            self._rate = None
            return None
        share = (processor - before[1]) / seconds * 100
        rate = (moved - before[2]) / seconds
        if share > limit:
            # What content costs is taken for proportional to its amount.
            self._rate = rate * limit / share
        elif self._rate is not None:
            self._rate *= min(RISE, limit / max(share, 1e-6))
        if self._rate is not None:
            self._rate = max(self._rate, LEAST_RATE)
        return None if self._rate is None else int(self._rate)
