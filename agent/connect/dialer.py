"""Plain TCP to one address."""

from __future__ import annotations

import errno
import socket

import trio

from agent.connect.listener import detached
from agent.connect.punch import family_of
from protocol.candidates import Candidate

DIAL_TIMEOUT = 5.0


async def dial(candidate: Candidate, patience: float = DIAL_TIMEOUT) -> socket.socket:
    """A connected socket. Raises OSError, after ``patience`` seconds at the latest."""
    with trio.socket.socket(family_of(candidate.host), socket.SOCK_STREAM) as sock:
        with trio.move_on_after(patience):
            await sock.connect((candidate.host, candidate.port))
            return detached(sock)
    raise OSError(errno.ETIMEDOUT, "no answer")
