"""Workers forked by one process for all tests, as an agent's are by its fork server.

An interpreter of its own, which loads what a worker needs, takes a processor for half a second and more, for each
worker of each test. Tests of how workers are started, or that look for them right below this process, start them so.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading

from agent.system.process_descriptor import has_ended, kill_process
from agent.transfer.processes.fork_messages import MOST, Ended, Fork, Made, Ready, answer, packet
from agent.transfer.processes.message_buffer import attached, rights, room
from agent.transfer.processes.spawn import Spawned, spawn_fork_server


class ForkedForTests:
    """One of the workers: what `subprocess.Popen` offers for others."""

    def __init__(self, server: _Server, number: int, pid: int, descriptor: int) -> None:
        self._server, self._number, self._descriptor = server, number, descriptor
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait() if self.returncode is None and has_ended(self._descriptor) else self.returncode

    def wait(self) -> int | None:
        if self.returncode is None:
            select.select([self._descriptor], [], [])
            self.returncode = self._server.code_of(self._number)
            os.close(self._descriptor)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            kill_process(self._descriptor)


class _Server:
    def __init__(self, processes: int) -> None:
        self._spawned = spawn_fork_server(processes)
        self._socket = self._spawned.sock
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._made: dict[int, tuple[int, int]] = {}
        self._codes: dict[int, int] = {}

    def fork(self) -> Spawned:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock, theirs:
            number = next(self._numbers)
            self._socket.sendmsg([packet(Fork(worker=number))], rights([theirs.fileno()]))
            while number not in self._made:
                self._take()
            pid, descriptor = self._made.pop(number)
        return Spawned(ForkedForTests(self, number, pid, descriptor), ours)  # type: ignore[arg-type]

    def code_of(self, number: int) -> int:
        """How one that has ended did so."""
        with self._lock:
            while number not in self._codes:
                self._take()
            return self._codes.pop(number)

    def _take(self) -> None:
        data, ancillary, _, _ = self._socket.recvmsg(MOST, room())
        assert data, "the fork server of the tests has ended"
        message = answer(data)
        if isinstance(message, Made):
            self._made[message.worker] = message.pid, attached(ancillary)[0]
        elif isinstance(message, Ended):
            self._codes[message.worker] = message.code
        else:
            assert isinstance(message, Ready), message

    def close(self) -> None:
        self._socket.close()
        self._spawned.process.wait()


class ForkServers:
    """One for each number of processes that a worker may use; started when the first is wanted."""

    def __init__(self) -> None:
        self._servers: dict[int, _Server] = {}
        self._lock = threading.Lock()

    def spawn(self, processes: int = 1) -> Spawned:
        """As `agent.transfer.processes.spawn.spawn`."""
        with self._lock:
            server = self._servers.get(processes) or self._servers.setdefault(processes, _Server(processes))
        return server.fork()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
