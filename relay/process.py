"""What the relay asks of its own process."""

from __future__ import annotations

import contextlib
import gc
import resource

import psutil


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; the limit that holds now. Every link is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def collect_seldom() -> None:
    """Let the cyclic collector look at less, and less often.

    What is loaded by now stays. Links are many objects that live long and few cycles: with the ordinary thresholds a
    relay to which thousands of agents come back spends a tenth of its time in looking through them again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def numbers_of_process() -> dict[str, float]:
    """Processor time (seconds), memory (bytes), descriptors and start (Unix time) of this process."""
    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        return {
            "cpu_seconds": times.user + times.system,
            "memory_bytes": process.memory_info().rss,
            "open_files": process.num_fds(),
            "max_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "started": process.create_time(),
        }
