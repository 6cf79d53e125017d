"""One relay process for one directory, and for one database."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from protocol.errors import NeedsPerson

LOCK = "relay.lock"
# How often to try before another process counts as running here.
_LOOKS = 10


class AlreadyRunning(NeedsPerson):
    """Another process serves this directory, or this database."""

    default_code = "ALREADY_RUNNING"


@contextmanager
def exclusive(directory: Path, database: Path | None = None) -> Iterator[None]:
    """Hold the directory's lock, and that of a database that is kept elsewhere: a copied configuration has another
    directory, and may name the same database. The kernel gives them back when the process ends, however it ends.

    Raises `AlreadyRunning`, which names the process that holds one of them.
    """
    with ExitStack() as held:
        held.enter_context(_hold(directory / LOCK, f"A relay is running on {directory} already"))
        if database is not None and (beside := lock_of(database)).parent != directory.resolve():
            held.enter_context(_hold(beside, f"Another relay is running on the database {database}"))
        yield


def lock_of(database: Path) -> Path:
    """The lock of a database that is not in its relay's directory, beside it."""
    file = database.resolve()
    return file.with_name(f"{file.name}.lock")


@contextmanager
def _hold(lock: Path, held: str) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(_LOOKS):
            if _try_lock(descriptor, fcntl.LOCK_EX):
                break
            # `holder_of` takes the lock for a moment, to look.
            time.sleep(0.02)
        else:
            raise AlreadyRunning(f"{held} (process {_written(descriptor) or 'unknown'}).", who="relay operator")
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
