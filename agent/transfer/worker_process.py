"""Starting and ending worker processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from agent.transfer.channel import Channel, Message, ToDaemon

# How long a worker may take to settle what arrived when it is told to stop.
GRACE = 4.0


@asynccontextmanager
async def worker(start: Message) -> AsyncIterator[Channel]:
    """A worker process that was told what to be. At the end its channel is closed, by which it ends; one that does
    not is
    killed, like any crash it costs nothing but time."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "agent.transfer.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    channel = Channel(ours, ToDaemon)
    try:
        await channel.send(start)
        yield channel
    finally:
        channel.close()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(GRACE):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
