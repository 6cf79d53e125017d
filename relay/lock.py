"""One relay process for one directory."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import NeedsPerson

LOCK = "relay.lock"
# How often to try before another process counts as running here.
_LOOKS = 10


class AlreadyRunning(NeedsPerson):
    """Another process serves this directory."""

    default_code = "ALREADY_RUNNING"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory's lock. The kernel gives it back when the process ends, however it ends.

    Raises `AlreadyRunning`, which names the process that holds it.
    """
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(_LOOKS):
            if _try_lock(descriptor, fcntl.LOCK_EX):
                break
            # `holder_of` takes the lock for a moment, to look.
            time.sleep(0.02)
        else:
            raise AlreadyRunning(
                f"A relay is running on {directory} already (process {_written(descriptor) or 'unknown'}).",
                who="relay operator",
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder_of(directory: Path) -> str | None:
    """The process that serves this directory, "" when it does not say which, or None."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared, so that two who look at once do not take each other for a relay.
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _written(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _written(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip()
