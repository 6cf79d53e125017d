"""How moments are written in documents."""

from __future__ import annotations

import time


def now_iso() -> str:
    """The time of day as the wire has it: UTC, microseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1000:06d}+00:00"
