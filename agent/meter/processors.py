"""Whether a further thread that computes would find a processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

# Less than this part of a processor is as good as none.
_LITTLE = 0.5
# The system counts in hundredths of a second: a shorter time (seconds) says nothing.
_SHORTEST = 0.25


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds: the clock's, this process's on processors, and those in which processors of the machine had nothing to
    do, all together."""

    clock: float
    own: float
    idle: float


def processor_times() -> ProcessorTimes:
    times = psutil.cpu_times()
    return ProcessorTimes(time.monotonic(), time.process_time(), times.idle + getattr(times, "iowait", 0.0))


class Processors:
    """Looks at them from time to time."""

    def __init__(self, times: Callable[[], ProcessorTimes] = processor_times) -> None:
        self._times = times
        self._before = times()

    def room(self) -> bool:
        """Whether, since the last look, this process computed little, or the machine had a processor to spare. Where
        neither is so, a further thread only takes time from those that are at work."""
        before, now = self._before, self._times()
        self._before = now
        span = now.clock - before.clock
        if span < _SHORTEST:
            return True
        return now.own - before.own < _LITTLE * span or now.idle - before.idle >= _LITTLE * span
