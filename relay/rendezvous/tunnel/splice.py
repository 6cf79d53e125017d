"""Moves bytes from one socket to another inside the kernel: splice(2) by way of a pipe, never blocking.

A pipe is borrowed only while bytes are in it, so a connection that is silent costs two descriptors and no memory.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass, field

PIPE_SIZE = 512 * 1024
_KEPT_PIPES = 64
_FLAGS = getattr(os, "SPLICE_F_MOVE", 1) | getattr(os, "SPLICE_F_NONBLOCK", 2)


class Pipes:
    """Pipes for use and return. Raises OSError (EMFILE) when no more are to be had."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        self.lent = 0

    def borrow(self) -> tuple[int, int]:
        """An empty pipe: its reading and its writing end."""
        self.lent += 1
        if self._free:
            return self._free.pop()
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self.lent -= 1
            raise
        try:
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except PermissionError:
            # An unprivileged user's pipes together may only hold so much; a small one works, with more calls.
            pass
        return pipe

    def give_back(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Return a pipe; one with bytes in it is closed."""
        self.lent -= 1
        if empty and len(self._free) < _KEPT_PIPES:
            self._free.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close those not in use."""
        for pipe in self._free:
            os.close(pipe[0])
            os.close(pipe[1])
        self._free.clear()


@dataclass(slots=True)
class Direction:
    """One way through a pair. ``readable`` and ``writable`` are what the kernel last said of the two sockets."""

    source: socket.socket
    target: socket.socket
    pipes: Pipes
    # Bytes that were read off the source before it came here.
    head: bytes = b""
    readable: bool = True
    writable: bool = True
    ended: bool = False
    done: bool = False
    filled: int = 0
    moved: int = 0
    _pipe: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def can_move(self) -> bool:
        """Whether another `step` could do something before the kernel says anything new."""
        if self.done:
            return False
        if self.filled or self.head:
            return self.writable
        return self.readable or self.ended

    @property
    def held(self) -> int:
        """Bytes taken from the source that the target has not got yet."""
        return self.filled + len(self.head)

    def step(self, budget: int, now: float = 0.0) -> int:
        """Move up to ``budget`` bytes (at least something where something can be); returns the bytes taken in.

        Raises OSError when either side is broken. At the source's end, and once all is delivered, the target's
        sending side is shut down and the direction is done.
        """
        taken = len(self.head) if self.moved == 0 else 0
        self.moved += taken
        while self.can_move:
            if self.head:
                self._deliver_head()
            elif self.filled and self.writable:
                self._drain()
            elif self.ended:
                self._finish()
            elif taken >= budget:
                break
            else:
                size = self._fill(budget - taken)
                taken += size
                self.moved += size
        if not self.filled:
            self._release()
        return taken

    def _deliver_head(self) -> None:
        try:
            self.head = self.head[self.target.send(self.head) :]
        except BlockingIOError:
            self.writable = False

    def _drain(self) -> None:
        assert self._pipe is not None
        try:
            self.filled -= os.splice(self._pipe[0], self.target.fileno(), self.filled, flags=_FLAGS)
        except BlockingIOError:
            self.writable = False

    def _fill(self, most: int) -> int:
        """Take bytes in; called with an empty pipe only, so that EAGAIN can mean nothing but an empty socket."""
        if self._pipe is None:
            self._pipe = self.pipes.borrow()
        try:
            size = os.splice(self.source.fileno(), self._pipe[1], min(most, PIPE_SIZE), flags=_FLAGS)
        except BlockingIOError:
            self.readable = False
            return 0
        if size == 0:
            self.ended = True
        self.filled += size
        return size

    def _finish(self) -> None:
        self.done = True
        try:
            self.target.shutdown(socket.SHUT_WR)
        except OSError:
            # The target has gone altogether, which its own direction reports.
            pass

    def _release(self) -> None:
        if self._pipe is not None:
            self.pipes.give_back(self._pipe, empty=not self.filled)
            self._pipe = None

    def close(self) -> None:
        """Give the pipe back, whatever is in it."""
        self._release()
