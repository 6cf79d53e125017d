"""How long to wait after a worker that died. Pure."""

from __future__ import annotations

from protocol.control import Counters

CRASH_PAUSE, LONGEST_CRASH_PAUSE = 0.1, 30.0
LIVED_LONG = 60.0


class CrashPauses:
    """How long, in seconds, before a worker that died is followed by another: longer each time, until one gets
    somewhere or has lived for a while."""

    def __init__(self) -> None:
        self._next = CRASH_PAUSE

    def after(self, lived: float, before: Counters, now: Counters) -> float:
        """``lived`` in seconds; the task's counters when the worker began, and when it died."""
        further = now.bytes_transferred > before.bytes_transferred or now.files > before.files
        if further or lived > LIVED_LONG:
            self._next = CRASH_PAUSE
        pause, self._next = self._next, min(self._next * 2, LONGEST_CRASH_PAUSE)
        return pause
