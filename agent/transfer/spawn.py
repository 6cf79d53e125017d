"""Starts the process of a worker. Of little weight, because the first one may be started before all else is loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

# Where a process may fork once libraries are loaded; on macOS some of them do not outlive it.
FORKS: bool = sys.platform == "linux"
# As many processes for a session as pay.
AUTO = 0


class Forked:
    """A process that was forked: what `subprocess.Popen` offers for others. One caller waits at a time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended, None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for its end; blocks."""
        return self._look(0)

    def kill(self) -> None:
        """End it now; nothing happens when it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork_into(work: Callable[[socket.socket], None], close: Callable[[], None]) -> tuple[Forked, socket.socket]:
    """Fork a process that does ``work`` with its end of a new pair and then ends; ``close`` closes in it what is not
    for it. Returns it with our end. To be called where `FORKS` says so, while there is no other thread. Raises
    OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        try:
            pid = os.fork()
        except BaseException:
            ours.close()
            raise
        if pid == 0:
            ours.close()
            _work_only(theirs, work, close)
    return Forked(pid), ours


def _work_only(sock: socket.socket, work: Callable[[socket.socket], None], close: Callable[[], None]) -> None:
    """In the forked process: do this, and nothing that its parent does after it; never returns."""
    code = 1
    try:
        close()
        work(sock)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Spawned:
    """A worker that waits for its first message, and the daemon's end of its channel."""

    process: subprocess.Popen[bytes] | Forked
    sock: socket.socket


def session_processes(wanted: int | None) -> int:
    """How many processes one session may use here, `AUTO` for None: a worker decides when it knows its task."""
    if not FORKS:
        return 1
    return AUTO if wanted is None else wanted


def usable_processors() -> int:
    """How many processors this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() or 1 if usable is None else len(usable(0))


def spawn(processes: int = 1) -> Spawned:
    """Start a worker that may use so many processes for its session; blocks for some milliseconds. It ends when the
    socket is closed. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "agent.transfer.worker", str(theirs.fileno()), str(processes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
    return Spawned(process, ours)
