"""Lane processes that are threads of the test's own process, with the faults of its engine's plan."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

from agent.connect.lane_tls import SecuringLane
from agent.storage.base import Bytes
from agent.storage.faulty import Call, Plan
from agent.storage.handed import Handed
from agent.transfer.basis.lane_keys import RECORD
from agent.transfer.lane_processes.lane_forks import Child
from agent.transfer.lane_processes.lane_process import LaneProcess
from protocol.signs_of_life import Signs

# The name of the threads.
LANE_PROCESS = "lane process"


class LaneProcessDied(BaseException):
    """A lane process is dead. Nothing of it may catch this and go on."""


class FaultyHanded(Handed):
    """What a lane process calls, with faults by a plan, under the names calls have elsewhere; with ``short`` no call
    reads or writes more bytes at once."""

    def __init__(self, plan: Plan, short: int) -> None:
        self._plan, self._short = plan, short

    def _before(self, operation: str, name: bytes = b"") -> None:
        code = self._plan(Call(0, operation, 0, name))
        if code is not None:
            raise OSError(code, os.strerror(code))

    def write_whole(self, folder: int, name: bytes, mode: int, content: memoryview, mtime_ns: int | None) -> int:
        self._before("create_temporary", name)
        return super().write_whole(folder, name, mode, content, mtime_ns)

    def open_temporary(self, folder: int, name: bytes) -> int:
        self._before("open_temporary", name)
        return super().open_temporary(folder, name)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> int:
        self._before("pwrite")
        return super().pwrite(fd, memoryview(data)[: self._short] if self._short else data, offset)

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._before("preadv")
        return super().preadv(fd, buffer[: self._short] if self._short else buffer, offset)

    def close_file(self, fd: int) -> None:
        super().close_file(fd)
        self._before("close_file")


class PlainLane(SecuringLane):
    """A lane without TLS."""

    def __init__(self, sock: socket.socket, *_: object) -> None:
        self._socket = sock
        self._read = 0

    @property
    def records(self) -> int:
        return self._read

    def shake_hands(self) -> None:
        return None

    def sendall(self, data: bytes | memoryview) -> None:
        self._socket.sendall(data)

    def recv_now(self, view: memoryview, count: int) -> int:
        got = self._socket.recv_into(view, min(count, RECORD))
        self._read += 1
        return got


class LanePlayer(Child):
    """A lane process that is a thread."""

    def __init__(self, plan: Plan, short: int) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(0, ours)
        process = LaneProcess(theirs, FaultyHanded(plan, short), PlainLane)
        self._thread = threading.Thread(target=self._play, args=(process,), name=LANE_PROCESS, daemon=True)
        self._thread.start()
        # What the system would tell of it.
        self.seen: Signs | None = None
        self.on_kill: Callable[[], None] = lambda: None

    def signs(self) -> Signs | None:
        return self.seen

    def _play(self, process: LaneProcess) -> None:
        try:
            with contextlib.suppress(LaneProcessDied):
                process.run()
        finally:
            # As the system does when a process dies.
            if process._lock >= 0:
                os.close(process._lock)

    def kill(self) -> None:
        self.on_kill()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
