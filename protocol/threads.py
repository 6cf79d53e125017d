"""Threads where the system gives none for a while (a limit of processes, a cgroup's, no memory): that passes. Who asks
trio for one waits until there is one, and everybody else hears of it as of any other fault of the system.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import trio

logger = logging.getLogger("towpath.threads")

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
# Seconds between two lines in the log.
_SAY_AGAIN = 60.0
_run_sync = trio.to_thread.run_sync


class NoThread(OSError):
    """No more threads are to be had now."""

    def __init__(self) -> None:
        super().__init__(errno.EAGAIN, "no more threads or processes are to be had on this machine")


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises `NoThread`."""
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        if thread.ident is not None:
            raise
        raise NoThread from error


def check_room(count: int) -> None:
    """Raise `NoThread` unless so many threads can be started now: for libraries that start several and are left in a
    bad way when one cannot be."""
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=enough.wait, daemon=True)
            start(thread)
            started.append(thread)
    finally:
        enough.set()
        for thread in started:
            thread.join()


def wait_for_threads(tell: Callable[[], None] | None = None) -> None:
    """From now on, have `trio.to_thread.run_sync` wait until there is a thread, in this process; what is to be said of
    that goes to the log, and ``tell`` is called with it, in the trio thread.

    In one place instead of at every call, because trio itself needs threads, too: to look up names and to start
    processes. Whoever waits may be cancelled, as while all of trio's threads are in use.
    """
    _lack.tell = tell
    setattr(trio.to_thread, "run_sync", _patient_run_sync)  # noqa: B010 - mypy knows it as what it is


async def _patient_run_sync(
    sync_fn: Callable[..., T],
    *args: Any,
    thread_name: str | None = None,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    begun = False

    def run() -> T:
        nonlocal begun
        begun = True
        return sync_fn(*args)

    if thread_name is None:
        thread_name = f"{getattr(sync_fn, '__name__', None)} from {trio.lowlevel.current_task().name}"
    pause = FIRST_PAUSE
    while True:
        try:
            return await _run_sync(run, thread_name=thread_name, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
        except (RuntimeError, MemoryError):
            # What was begun says so itself.
            if begun:
                raise
        _lack.say()
        await trio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


class _Lack:
    """Says that there are no threads, once in a while. In the trio thread."""

    def __init__(self) -> None:
        self._said = float("-inf")
        self.tell: Callable[[], None] | None = None

    def say(self) -> None:
        now = trio.current_time()
        # The clock of another run may be another one.
        if not 0 <= now - self._said < _SAY_AGAIN:
            self._said = now
            logger.warning(
                "The system gives this program no more threads: a limit of processes or of memory is reached. What "
                "needs one waits until there is one."
            )
            if self.tell is not None:
                self.tell()


_lack = _Lack()
