"""What every way between two agents has in common, and the register of the ways there are.

A transport yields `Connection`s: connected sockets on which nothing of the session was sent yet. Whatever carries them,
their bytes from here on are the session's own TLS (or QUIC), end to end between the agents, with the destination as
the TLS client. The daemon dials and arranges; the sockets go to worker processes as file descriptors.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from protocol.candidates import Candidate, PathAnswer, PathGo, PathOffer

# Kinds of paths, best first: a lower rank is better. Dialled by the destination; dialled by the source; both dialled
# at once so that their SYNs crossed; UDP punched; through the relay.
RANKS = {"direct": 0, "reversed": 1, "punched": 2, "quic": 3, "tunnel": 9}


@dataclass(frozen=True, kw_only=True)
class Path:
    """How a connection goes. ``rtt`` in seconds where known, ``why`` says why it is no better one."""

    kind: str
    transport: str = "tcp"
    remote: str = ""
    rtt: float | None = None
    why: str = ""

    @property
    def rank(self) -> int:
        return RANKS.get(self.kind, 5)


@dataclass(frozen=True)
class Connection:
    """A stream socket to the peer and how it goes. For ``quic`` it is a local one whose bytes a process carries."""

    sock: socket.socket
    path: Path


def send_at_once(sock: socket.socket) -> None:
    """Have TCP send small messages without waiting for more; a local socket does so anyway."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# The source's side of a transport hands each connection to this, which looks at its TLS greeting, as for those that
# came in at the data port. Takes the socket over.
Greet = Callable[[Connection], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the destination wants: one connection more for this session, ``kind`` is ``control`` or ``lane``."""

    session_id: str
    task_id: str
    kind: str


class Transport(Protocol):
    """One way between agents that needs arranging (direct TCP and punching are part of the race itself).

    All methods may be cancelled at any time and then leave nothing open.
    """

    name: str

    async def offer(self, wish: Wish) -> list[Candidate]:
        """Destination: what the offer should carry so that the source can do its part. Answers quickly."""

    async def connect(self, wish: Wish, go: PathGo) -> Connection:
        """Destination: a connection, once the relay gave its go. Raises `RetryLater` with the reason."""

    async def another(self, wish: Wish) -> Connection | None:
        """Destination: one connection more without any arrangement, where what is there already can bring it."""

    def doubt(self, session_id: str, instance: str) -> None:
        """Destination: the source may have been started again; ``instance`` is what its agent is now, empty if that is
        not known. What this session has of this way ends at once or soon if so."""

    async def look(self, wish: Wish, go: PathGo) -> None:
        """Destination: whether this way is open, nothing more: what comes up is closed without a word. Raises
        `RetryLater` with the reason why not."""

    def prepare(self, session_id: str) -> None:
        """Source: an offer for this session will mostly come in a moment; begin what its answer would wait for."""

    async def answer(self, offer: PathOffer) -> list[Candidate]:
        """Source: what the answer should carry."""

    async def serve(self, offer: PathOffer, go: PathGo, greet: Greet) -> None:
        """Source: do this side's part of one offer, or of a look; returns when it is done with it. Raises
        `RetryLater`."""


@dataclass
class Transports:
    """The transports of this agent, made in `agent.data_side`: ``tunnel``, ``quic``; absent ones are not used."""

    tunnel: Transport | None = None
    quic: Transport | None = None
    # Why one is absent, for people.
    absent: dict[str, str] = field(default_factory=dict)


__all__ = [
    "RANKS",
    "Connection",
    "Greet",
    "Path",
    "PathAnswer",
    "PathGo",
    "PathOffer",
    "Transport",
    "Transports",
    "Wish",
    "send_at_once",
]
