"""A process of our own, beside the one that speaks: it gets one end of a line and ends when the line does."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

# Seconds such a process has for ending by itself.
_PATIENCE = 2.0


@asynccontextmanager
async def line_process(module: str, *, room: int | None = None) -> AsyncIterator[trio.socket.SocketType]:
    """Start ``python -m module FD``; FD is the other end of the SOCK_SEQPACKET line that this gives.

    ``room``: bytes that either end may have under way, the system's usual if None. On leaving, the line is closed, and
    a process that does not end by that is killed. Raises OSError when it cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with trio.socket.from_stdlib_socket(ours) as line:
        with theirs:
            if room is not None:
                for end in (ours, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        try:
            yield line
        finally:
            line.close()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(_PATIENCE):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
