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
    """Equal as long as nobody has changed any of them (`renice`, `prlimit`, `choom`, `taskset`, a move to another
    control group). What the system does not tell counts as unchanged."""
    status = b"\n".join(line for line in _read("status").splitlines() if line.startswith(_LASTING))
    priorities = str((os.getpriority(os.PRIO_PROCESS, 0), _disk_priority())).encode()
    return _read("limits"), _read("cgroup"), _read("oom_score_adj"), status, priorities


def _disk_priority() -> object:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, psutil.Error):
            return psutil.Process().ionice()
    return None


def _read(name: str) -> bytes:
    with contextlib.suppress(OSError):
        return (_OWN / name).read_bytes()
    return b""
