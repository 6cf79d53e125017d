"""Other names of the agent's own files: hard links that somebody, or a program that makes backups or saves space, has
made somewhere in a collection. They are no more there for others than the files are.

Only a file with several names can be one, so nothing is asked for all others. Which of the agent's own files have
several is looked up when such a file is met, and again when that file has changed since: to give a file another name
changes its ctime.
"""

from __future__ import annotations

import os
import stat as stat_bits
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

# Seconds after which is looked in any case, and at the earliest for the sake of a file that is dated in the future.
_OLDEST, _FUTURE = 60.0, 1.0
# By how much the clock that dates files may be off: it ticks with the kernel's.
_OFF_NS = 50_000_000


class OwnLinks:
    """``places`` are absolute paths of folders and files. For any thread; what cannot be read is left out."""

    def __init__(self, places: Iterable[str] = ()) -> None:
        self._places = tuple(places)
        self._found: frozenset[tuple[int, int]] = frozenset()
        # When the last look began, by the clock that dates files and by the monotonic one.
        self._looked_ns, self._looked = -1, float("-inf")
        self._lock = threading.Lock()

    def hold(self, status: os.stat_result) -> bool:
        """Whether what has this status is one of the agent's own files, by whatever name it was found. May block."""
        if status.st_nlink < 2 or not self._places or not stat_bits.S_ISREG(status.st_mode):
            return False
        with self._lock:
            now, now_ns, changed_ns = time.monotonic(), time.time_ns(), status.st_ctime_ns
            patience = _OLDEST
            if changed_ns > self._looked_ns - _OFF_NS:
                patience = 0.0 if changed_ns < now_ns + _OFF_NS else _FUTURE
            if now - self._looked >= patience:
                self._looked_ns, self._looked = now_ns, now
                self._found = frozenset(self._look())
            return (status.st_dev, status.st_ino) in self._found

    def _look(self) -> Iterator[tuple[int, int]]:
        """The own files that have several names."""
        waiting = list(self._places)
        while waiting:
            place = waiting.pop()
            with suppress(OSError):
                status = os.lstat(place)
                if stat_bits.S_ISDIR(status.st_mode):
                    waiting += [os.path.join(place, name) for name in os.listdir(place)]
                elif status.st_nlink > 1 and stat_bits.S_ISREG(status.st_mode):
                    yield status.st_dev, status.st_ino
