"""When a process that says nothing counts as one that stands still. Pure.

On a busy machine, or with slow storage, a process may well be silent for minutes, and is at work. So what counts is
silence of one that has done nothing at all meanwhile: no time of a processor, no wait begun or ended. Time counts only
as far as whoever looks was awake: neither a machine that slept, nor a whole group of processes that was stopped (a
batch system does that), makes anybody late.
"""

from __future__ import annotations

from protocol.signs_of_life import Posture, Signs

# How often (seconds) to look; who has said nothing since the last look is asked.
LOOK_EVERY = 5.0
# Who is stopped does not go on by itself. Who hangs in one call may: a file server that is started again takes a while.
STOPPED_FOR, HANGS_FOR = 30.0, 60.0


class Standstill:
    """Of one process, which is looked at every so often; ``now`` is any clock that never goes back."""

    def __init__(self, now: float) -> None:
        self._looked = now
        self._marks: tuple[float, ...] | None = None
        # For how long (seconds) it has stood still.
        self.seconds = 0.0

    def look(self, now: float, *, heard: bool, signs: Signs | None) -> Posture | None:
        """What it is in, when it counts as standing still. ``heard``: it has said something since the last look."""
        passed, self._looked = min(now - self._looked, 2 * LOOK_EVERY), now
        before, self._marks = self._marks, None if signs is None else signs.marks
        if heard or signs is None or signs.posture is Posture.RUNS or signs.marks != before:
            self.seconds = 0.0
            return None
        self.seconds += passed
        stopped = signs.posture in (Posture.STOPPED, Posture.TRACED)
        return signs.posture if self.seconds >= (STOPPED_FOR if stopped else HANGS_FOR) else None
