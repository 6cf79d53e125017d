"""What the system tells from outside about a process that says nothing: whether it computes, waits, or was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import psutil


class Posture(Enum):
    """What a process is doing."""

    # It computes, or would if it were given a processor.
    RUNS = "runs"
    # It waits in a call.
    WAITS = "waits"
    # The same in one that cannot be broken off, mostly of storage: a signal that ends it counts when that is over.
    IN_STORAGE = "in storage"
    # By a signal (SIGSTOP).
    STOPPED = "stopped"
    # By a debugger.
    TRACED = "traced"


_POSTURES = {
    psutil.STATUS_RUNNING: Posture.RUNS,
    psutil.STATUS_WAKING: Posture.RUNS,
    psutil.STATUS_DISK_SLEEP: Posture.IN_STORAGE,
    psutil.STATUS_STOPPED: Posture.STOPPED,
    psutil.STATUS_TRACING_STOP: Posture.TRACED,
}


@dataclass(frozen=True)
class Signs:
    """One look at a process. ``marks`` are others as soon as it has done anything at all."""

    posture: Posture
    marks: tuple[float, ...]


def signs_of(pid: int) -> Signs | None:
    """How it stands with a process; None when it is gone, or where the system tells nothing."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            status, times, switches = process.status(), process.cpu_times(), process.num_ctx_switches()
    except (psutil.Error, OSError, NotImplementedError):
        # The last one is psutil's where a kernel does not count switches, the one before for want of a descriptor.
        return None
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return None
    marks = (times.user, times.system, float(switches.voluntary), float(switches.involuntary))
    return Signs(_POSTURES.get(status, Posture.WAITS), marks)
