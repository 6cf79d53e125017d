"""Under what conditions this process runs, as far as a process inherits them when it is started: limits, control group,
priorities, processors, and what it may do (Linux)."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil

_OWN = Path("/proc/self")
# Lines of `status` that say nothing of memory and time used.
_LASTING = (b"Umask", b"Uid", b"Gid", b"Groups", b"Cap", b"NoNewPrivs", b"Seccomp:", b"Cpus_allowed:", b"Mems_allowed:")


def conditions() -> tuple[bytes, ...]:
    """What `changed` compares; empty is what the system does not tell."""
    status = b"\n".join(line for line in _read("status").splitlines() if line.startswith(_LASTING))
    priority = str(os.getpriority(os.PRIO_PROCESS, 0)).encode()
    return _read("limits"), _read("cgroup"), _read("oom_score_adj"), status, priority, _disk_priority()


def changed(before: tuple[bytes, ...], now: tuple[bytes, ...]) -> bool:
    """Whether somebody has changed any of them (`renice`, `prlimit`, `choom`, `taskset`, a move to another control
    group). What the system did not tell counts as unchanged: while no more files can be opened it tells little."""
    return any(old != new for old, new in zip(before, now, strict=True) if old and new)


def _disk_priority() -> bytes:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, psutil.Error):
            return str(psutil.Process().ionice()).encode()
    return b""


def _read(name: str) -> bytes:
    with contextlib.suppress(OSError):
        return (_OWN / name).read_bytes()
    return b""
