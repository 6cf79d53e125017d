"""Starts the process of a worker, or the one that forks workers (`agent.transfer.fork_server`). Of little weight,
because the first one may be started before all else is loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from agent.system.process_descriptor import are_to_be_had

# Where a process may fork once libraries are loaded; on macOS some of them do not outlive it.
FORKS: bool = sys.platform == "linux"
# As many processes for a session as pay.
AUTO = 0
# Where workers may be forked by a process that is not the daemon, which then needs other means to wait for them.
FORK_SERVER: bool = FORKS and are_to_be_had()


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


def fork_into(
    work: Callable[[socket.socket], None],
    close: Callable[[], None],
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> tuple[Forked, socket.socket]:
    """Fork a process that does ``work`` with its end of a new pair and then ends; ``close`` closes in it what is not
    for it. Returns it with our end. To be called where `FORKS` says so, while there is no other thread. Raises
    OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)

    def let_go() -> None:
        ours.close()
        close()

    with theirs:
        try:
            pid = fork_with(theirs, work, let_go)
        except BaseException:
            ours.close()
            raise
    return Forked(pid), ours


def fork_with(sock: socket.socket, work: Callable[[socket.socket], None], close: Callable[[], None]) -> int:
    """As `fork_into`, with a socket that there is already and stays open here; the process's id."""
    pid = os.fork()
    if pid == 0:
        _work_only(sock, work, close)
    return pid


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
        try:
            # Raises where there is none, and where what is left cannot be written (a full disk, a closed terminal).
            sys.stderr.flush()
        finally:
            os._exit(code)


@dataclass(frozen=True)
class Spawned:
    """A worker that waits for its first message, or a fork server that waits to be asked, and the daemon's end of the
    pair with it."""

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
    return _start("agent.transfer.worker", processes, socket.SOCK_STREAM)


def spawn_fork_server(processes: int = 1) -> Spawned:
    """The same for a fork server, whose workers may use so many processes each; it says when it is ready."""
    return _start("agent.transfer.fork_server", processes, socket.SOCK_SEQPACKET)


def _start(module: str, processes: int, kind: socket.SocketKind) -> Spawned:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(processes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
    return Spawned(process, ours)
