"""A process of our own, beside the one that speaks: it gets one end of a line and ends when the line does.

Such a process has a loop that turns at least once a second and never waits for storage. So one that has done nothing at
all for long stands still (`protocol.standstill`), whatever it was about to do, and is ended: whoever hears of that on
the line starts another one, as when it had died. One that a debugger holds is left to it.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from protocol.beside import beside
from protocol.signs_of_life import Posture, signs_of
from protocol.standstill import LOOK_EVERY, Standstill

_logger = logging.getLogger("towpath.process")

# Seconds such a process has for ending by itself.
_PATIENCE = 2.0


@asynccontextmanager
async def line_process(module: str, *, room: int | None = None) -> AsyncIterator[trio.socket.SocketType]:
    """Start ``python -m module FD``; FD is the other end of the SOCK_SEQPACKET line that this gives.

    ``room``: bytes that either end may have under way, the system's usual if None. On leaving, the line is closed, and
    a process that does not end by that is killed; so is one that stands still, whose end of the line closes then.
    Raises OSError when it cannot be started.
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
            async with beside(partial(_end_when_it_stands_still, process, module)):
                yield line
        finally:
            line.close()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(_PATIENCE):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def _end_when_it_stands_still(process: trio.Process, module: str) -> None:
    watch = Standstill(trio.current_time())
    while True:
        await trio.sleep(LOOK_EVERY)
        # It is one of ours as long as nobody has waited for it, whatever number others get.
        signs = signs_of(process.pid) if process.returncode is None else None
        posture = watch.look(trio.current_time(), heard=False, signs=signs)
        if posture is None or posture is Posture.TRACED:
            continue
        how = "was stopped by a signal, and stood" if posture is Posture.STOPPED else "hangs, and has stood"
        _logger.error("Process %d (%s) %s still for %.0f s; it is ended.", process.pid, module, how, watch.seconds)
        process.kill()
        return
