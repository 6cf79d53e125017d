"""One agent per state directory.

A kernel lock on ``agent.lock`` decides; it goes away with its process, however that ends. The file's text says who
holds it, for people, and serves where kernel locks do not reach: on a network file system another machine may not see
our lock, so the holder's record names its host and is renewed as long as it runs, and a fresh record of another host
counts as held.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.system.file_lock import try_lock
from agent.system.files import BINARY, CLOEXEC, NOFOLLOW
from protocol.errors import TowpathError

LOCK_FILE = "agent.lock"
MAX_RECORD = 4096
# Seconds. The record of a holder on another host counts for this long after it was last renewed.
RENEW_EVERY = 30.0
FOREIGN_LIFE = 150.0
LOOKS = 10


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: host, process, when the process began and when it last said so (Unix seconds)."""

    host: str
    pid: int
    began: float
    renewed: float = 0.0


class AlreadyRunning(TowpathError):
    """Another agent uses this state directory."""

    default_code = "ALREADY_RUNNING"

    def __init__(self, state_dir: Path, holder: Holder | None) -> None:
        self.holder = holder
        who = "another process" if holder is None else f"process {holder.pid} on host {holder.host}"
        super().__init__(
            f"An agent already runs on the state directory {state_dir}: {who} holds it. "
            "Stop it with `towpath stop`, or give this agent a state directory of its own.",
            who="you",
        )


class InstanceLock:
    """Held until `release` or the end of the process. Made by `acquire`."""

    def __init__(self, descriptor: int, path: Path, holder: Holder) -> None:
        self._descriptor = descriptor
        self._path = path
        self.holder = holder

    def renew(self, now: float) -> None:
        """Say again that we are here; call it every `RENEW_EVERY` seconds. Raises OSError (a full disk)."""
        if self._descriptor >= 0:
            self.holder = Holder(self.holder.host, self.holder.pid, self.holder.began, now)
            _write_record(self._descriptor, self.holder)

    def forget(self) -> None:
        """In a process that was forked from the holder: let go of what was inherited. The holder keeps the lock."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def release(self) -> None:
        """Give the lock back and take our name off it. Doing it twice is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        # Emptied, not removed: a file that is removed while another agent waits for its lock makes two locks.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def acquire(state_dir: Path, *, clock: Callable[[], float] = time.time, host: str | None = None) -> InstanceLock:
    """Take the lock of a state directory at once. Raises `AlreadyRunning` or OSError."""
    path = state_dir / LOCK_FILE
    host = host or socket.gethostname()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | CLOEXEC | NOFOLLOW | BINARY, 0o600)
    try:
        now = clock()
        _ensure_free(descriptor, state_dir, host, now)
        holder = Holder(host, os.getpid(), process_start(os.getpid()), now)
        _write_record(descriptor, holder)
    except BaseException:
        os.close(descriptor)
        raise
    return InstanceLock(descriptor, path, holder)


@contextlib.contextmanager
def held(state_dir: Path) -> Iterator[InstanceLock]:
    """The lock for the length of a block."""
    lock = acquire(state_dir)
    try:
        yield lock
    finally:
        lock.release()


def holder_of(state_dir: Path, *, clock: Callable[[], float] = time.time) -> Holder | None:
    """Who holds the lock now, or None. Raises OSError other than for a missing file."""
    try:
        descriptor = os.open(state_dir / LOCK_FILE, os.O_RDWR | CLOEXEC | NOFOLLOW | BINARY)
    except FileNotFoundError:
        return None
    try:
        kernel = try_lock(descriptor, shared=True)
        record = _read_record(descriptor)
        host = socket.gethostname()
        if kernel is False:
            return record or Holder(host, 0, 0.0)
        there = record is not None and _still_there(record, host, clock(), known_to_kernel=kernel)
        return record if there else None
    finally:
        # Closing gives a lock taken to look back.
        os.close(descriptor)


def process_start(pid: int) -> float:
    """When a process began (Unix seconds), or 0.0 if there is none; tells a reused process id from the old one."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def _ensure_free(descriptor: int, state_dir: Path, host: str, now: float) -> None:
    kernel = try_lock(descriptor)
    for _ in range(LOOKS):
        if kernel is not False:
            break
        # `holder_of` takes the lock for a moment, to look.
        time.sleep(0.02)
        kernel = try_lock(descriptor)
    record = _read_record(descriptor)
    if kernel is False or (record is not None and _still_there(record, host, now, known_to_kernel=kernel)):
        raise AlreadyRunning(state_dir, record)


def _still_there(record: Holder, host: str, now: float, *, known_to_kernel: bool | None) -> bool:
    if record.host != host:
        # A clock that is ahead over there must not hold us up for ever, so the difference counts either way.
        return abs(now - record.renewed) < FOREIGN_LIFE
    if known_to_kernel:
        return False
    return record.pid != os.getpid() and abs(process_start(record.pid) - record.began) < 2.0 and record.began > 0


def _read_record(descriptor: int) -> Holder | None:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        document = json.loads(os.read(descriptor, MAX_RECORD))
        return Holder(
            str(document["host"])[:255], int(document["pid"]), float(document["began"]), float(document["renewed"])
        )
    except (ValueError, KeyError, TypeError):
        # Empty after a clean end, or cut short by a full disk: nobody is named.
        return None


def _write_record(descriptor: int, holder: Holder) -> None:
    data = json.dumps(asdict(holder)).encode() + b"\n"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, data)
    os.ftruncate(descriptor, len(data))
