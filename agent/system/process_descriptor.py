"""Descriptors of processes (pidfd_open(2), Linux 5.3). A process id may be given to another process once the one that
had it was waited for; a descriptor never means another one, so whoever is not the parent can wait and kill by it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys


def open_process(pid: int) -> int:
    """A descriptor of a process that nobody has waited for yet. Raises OSError, ENOSYS on other systems."""
    if sys.platform == "linux":
        return os.pidfd_open(pid)
    else:  # noqa: RET505 - mypy takes what follows an `if` of the platform for unreachable
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def kill_process(descriptor: int) -> None:
    """End it now; nothing happens when it has ended."""
    if sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def collect(descriptor: int) -> int | None:
    """How a process that has ended did so, if it became a child of this one when its parent died."""
    if sys.platform == "linux":
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    return None


def has_ended(descriptor: int) -> bool:
    """Whether the process is no more."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def are_to_be_had() -> bool:
    """Whether this system gives such descriptors, and lets this process use them: older kernels and some containers do
    not."""
    if not (hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")):
        return False
    try:
        descriptor = open_process(os.getpid())
        try:
            # Signal 0 only asks whether one could be sent.
            signal.pidfd_send_signal(descriptor, 0)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True
