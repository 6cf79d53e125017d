"""The fork server: a process that waits with everything loaded and forks the workers (Linux).

Starting an interpreter and loading what a worker needs takes half a second of a processor, a fork some hundredths. It
is forked from the daemon before that has its key, or started as ``python -m agent.transfer.fork_server FD N``, with one
end of a pair and the number of processes that each worker may use, itself included. It has one thread, no event loop,
no key and no orders: what a worker is to be comes over the worker's own channel, of which it holds an end only from
the request until the fork.

It ends when the daemon's end of the pair closes. Its workers do not end with it: they belong to the daemon, which has a
descriptor of each of them, sent before its end can be collected here.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from agent.system.process_descriptor import open_process
from agent.system.process_name import rename_process
from agent.transfer.processes.fork_messages import MOST, Ended, Fork, FromServer, Made, Ready, Refused, packet, request
from agent.transfer.processes.message_buffer import attached, rights, room
from agent.transfer.processes.spawn import Spawned, fork_into, fork_with
from agent.transfer.rehearsal import rehearse
from agent.transfer.worker import leave_behind, work_as_forked
from protocol.threads import NoThread

# A thread that was waited for may take a moment (seconds) to be gone from the system's list.
_THREADS_GONE = 1.0


class ForkServer:
    """See the module. ``work`` is what a forked process does with its socket; ``prepare`` is called once, when nothing
    is asked."""

    def __init__(self, sock: socket.socket, work: Callable[[socket.socket], None], prepare: Callable[[], None]) -> None:
        self._socket = sock
        self._work = work
        self._prepare: Callable[[], None] | None = prepare
        # What was forked and not collected: descriptor of the process, its id, and which worker it is.
        self._forked: dict[int, tuple[int, int]] = {}
        self._poll = select.poll()

    def run(self) -> None:
        """Serve until the daemon is gone; blocks."""
        self._poll.register(self._socket, select.POLLIN)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                ready = self._poll.poll(None if self._prepare is None else 0)
                if not ready and self._prepare is not None:
                    self._prepare()
                    self._prepare = None
                    self._say(Ready())
                for descriptor, _ in ready:
                    if descriptor in self._forked:
                        self._tell_end(descriptor)
                    elif not self._serve():
                        return

    def _serve(self) -> bool:
        """Take one request; whether the daemon is still there."""
        data, ancillary, _, _ = self._socket.recvmsg(MOST, room())
        if not data:
            return False
        asked, descriptors = request(data), attached(ancillary)
        if not descriptors:
            self._say(Refused(worker=asked.worker, errno=errno.EMFILE))
            return True
        with socket.socket(fileno=descriptors[0]) as sock:
            try:
                self._fork(asked, sock)
            except (OSError, MemoryError) as error:
                self._say(Refused(worker=asked.worker, errno=getattr(error, "errno", None) or errno.ENOMEM))
        return True

    def _fork(self, asked: Fork, sock: socket.socket) -> None:
        """Raises OSError when there is no process to be had, or no descriptor of it."""
        pid = fork_with(sock, self._work, self._let_go)
        try:
            descriptor = open_process(pid)
        except OSError:
            # It waits for its first message, and was not waited for: the id is its own.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._forked[descriptor] = pid, asked.worker
        self._poll.register(descriptor, select.POLLIN)
        self._say(Made(worker=asked.worker, pid=pid), descriptor)

    def _let_go(self) -> None:
        """In a worker: close what is not for it."""
        self._socket.close()
        for descriptor in self._forked:
            os.close(descriptor)

    def _tell_end(self, descriptor: int) -> None:
        pid, worker = self._forked.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        self._say(Ended(worker=worker, code=os.waitstatus_to_exitcode(status)))

    def _say(self, message: FromServer, *descriptors: int) -> None:
        self._socket.sendmsg([packet(message)], rights(descriptors) if descriptors else [])


def _prepare() -> None:
    """What each worker would otherwise do itself, once for all of them."""
    with contextlib.suppress(NoThread):
        rehearse()
    until = time.monotonic() + _THREADS_GONE
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < until:
        time.sleep(0.001)
    # What is loaded by now stays, and is not to be written to, so that workers share it.
    gc.freeze()


def _serve_forks(processes: int, sock: socket.socket) -> None:
    # Ctrl-C at a terminal reaches the whole group; the daemon decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    gc.enable()
    with sock:
        ForkServer(sock, partial(work_as_forked, processes, rehearsed=True), _prepare).run()


def fork_fork_server(processes: int, let_go: Callable[[], None]) -> Spawned:
    """A fork server made of this process, which has loaded what workers need already; to be called where `FORK_SERVER`
    says so, before there is another thread, an event loop or a key. ``let_go`` is called in it and closes what is this
    process's. Raises OSError."""
    return Spawned(*fork_into(partial(_become_fork_server, processes), let_go, socket.SOCK_SEQPACKET))


def _become_fork_server(processes: int, sock: socket.socket) -> None:
    leave_behind()
    rename_process(["python", "-m", "agent.transfer.fork_server", str(sock.fileno()), str(processes)])
    _serve_forks(processes, sock)


def main() -> None:
    """Entry point of the process."""
    _serve_forks(int(sys.argv[2]), socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
