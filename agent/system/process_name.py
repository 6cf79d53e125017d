"""What the system's list of processes shows for a process that was forked and does something else now (Linux)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence


def rename_process(words: Sequence[str]) -> None:
    """Show these words as this process's command line, as far as they fit where the old ones are; else leave it.

    Linux reads a command line from the process's own memory, at the place that proc(5) names (``arg_start`` and
    ``arg_end`` of ``/proc/self/stat``).
    """
    line = b"".join(word.encode() + b"\0" for word in words)
    # Systems without such files, or that do not let a process write there: only what people see is concerned.
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", "rb") as stat:
            # The second field is a name that may contain anything, in brackets.
            fields = stat.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        if start <= 0 or len(line) > end - start:
            return
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(line.ljust(end - start, b"\0"))
