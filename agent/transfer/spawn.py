"""Starts the process of a worker. Of little weight, because the first one is started before all else is loaded."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Spawned:
    """A worker that waits for its first message, and the daemon's end of its channel."""

    process: subprocess.Popen[bytes]
    sock: socket.socket


def spawn() -> Spawned:
    """Start a worker; blocks for some milliseconds. It ends when the socket is closed. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "agent.transfer.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
    return Spawned(process, ours)
