"""What processes use: time of the processor, and memory."""

from __future__ import annotations

import contextlib
import resource

import psutil


def cpu_used() -> float:
    """CPU-seconds of this process, its living descendants and those it has waited for."""
    while True:
        waited = _waited_for()
        living = 0.0
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            living += times.user + times.system + times.children_user + times.children_system
        # One that ended meanwhile, as workers do when a task is over, would be in neither.
        if _waited_for() == waited:
            own = resource.getrusage(resource.RUSAGE_SELF)
            return own.ru_utime + own.ru_stime + waited + living


def _waited_for() -> float:
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return waited.ru_utime + waited.ru_stime


def used_memory() -> int:
    """Bytes of this process and all below it, as `_memory` counts them."""
    own = psutil.Process()
    return _memory([own, *own.children(recursive=True)])


def larger_end() -> int:
    """Bytes of this process, in which both daemons run, and of the processes of one end: the end with more."""
    own = psutil.Process()
    return _memory([own]) + max((_memory([each, *each.children(recursive=True)]) for each in own.children()), default=0)


def _memory(processes: list[psutil.Process]) -> int:
    """What forked processes share counts once, where the system can tell."""
    used = 0
    for process in processes:
        # It may have ended meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = process.memory_full_info()
            used += getattr(memory, "pss", memory.rss)
    return used
