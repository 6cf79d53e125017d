"""One relay process for one directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import NeedsPerson

LOCK = "relay.lock"


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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise AlreadyRunning(
                f"A relay is running on {directory} already (process {holder}).", who="relay operator"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
