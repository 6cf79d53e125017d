"""What the relay asks of its own process."""

from __future__ import annotations

import contextlib
import gc
import resource


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
