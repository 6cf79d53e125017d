"""Forking the lane processes of a worker: when it has its task and no threads yet, so that they cost little time and
share its memory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import partial

from agent.system.with_parent import end_with
from agent.transfer.lane_processes.lane_process import LaneProcess
from agent.transfer.processes.spawn import FORKS, Forked, fork_into
from protocol.signs_of_life import Signs, signs_of


class Child(Forked):
    """A lane process, and our end of the pair with it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        super().__init__(pid)
        self.sock = sock

    def signs(self) -> Signs | None:
        """What the system tells of it."""
        return signs_of(self.pid)


def fork_lane_processes(count: int, *, close: int) -> list[Child]:
    """Start so many, with our ends of their pairs; ``close`` is a descriptor that is not for them. To be called before
    there is any other thread. None where the system has no fork, or none that is safe once libraries are loaded
    (macOS); fewer where it gives no more now."""
    forked: list[Child] = []

    def let_go() -> None:
        os.close(close)
        for child in forked:
            child.sock.close()

    for _ in range(count if FORKS else 0):
        try:
            process, ours = fork_into(partial(_receive, os.getpid()), let_go)
        except OSError:
            # No process to be had: those that there are do the work.
            break
        forked.append(Child(process.pid, ours))
    return forked


def _receive(worker: int, sock: socket.socket) -> None:
    """In the forked process."""
    # A stopped one would not notice that its end of the pair is closed, and hold the task's lock for ever.
    if end_with(worker):
        LaneProcess(sock).run()


def dismiss(forked: Sequence[Child]) -> None:
    """End lane processes that are not needed. Blocks for a moment."""
    for child in forked:
        child.sock.close()
        child.wait()
