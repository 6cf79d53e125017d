"""Which halves have come, and which belong together. Sans I/O; ``now`` is passed in.

A half counts once: whether it was joined, gave up waiting or was refused for coming twice, its token is spent. A spent
token is remembered until it would have expired anyway, so the memory is bounded by the rate of issue.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from protocol.errors import RetryLater
from protocol.tunnel.token import Half, TunnelRefused

C = TypeVar("C")

MAX_WAITING = 2000
MAX_WAITING_USER = 64
MAX_SPENT = 200_000


class TunnelBusy(RetryLater):
    """Too many connections wait to be joined."""

    default_code = "TUNNEL_BUSY"


@dataclass(frozen=True)
class PairingStatistics:
    """Halves that wait now, and since the start: pairs joined, halves refused by reason, halves given up."""

    waiting: int
    spent: int
    joined: int
    replayed: int
    mismatched: int
    busy: int
    abandoned: int


@dataclass(frozen=True)
class Waiting(Generic[C]):
    """A half that waits for its other half, with whatever stands for its connection."""

    half: Half
    connection: C


class PairingTable(Generic[C]):
    """See the module. ``C`` is what stands for a connection."""

    def __init__(self, *, max_waiting: int = MAX_WAITING, max_waiting_user: int = MAX_WAITING_USER) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_user = max_waiting_user
        self._waiting: dict[str, Waiting[C]] = {}
        self._by_user: Counter[str] = Counter()
        # Token (pair and side) to the moment it expires, oldest issue first.
        self._spent: dict[tuple[str, str], float] = {}
        self._joined = self._replayed = self._mismatched = self._busy = self._abandoned = 0

    def present(self, half: Half, connection: C, now: float) -> Waiting[C] | None:
        """A half has come. The other half, when it waits already: the two are joined; None: this one waits.

        Raises `TunnelRefused` for a half that came before (the first one is not disturbed) or does not fit, and
        `TunnelBusy`.
        """
        self._forget(now)
        token = (half.pair_id, half.side)
        if token in self._spent:
            self._replayed += 1
            raise TunnelRefused("This half of the tunnel was used already.", code="TUNNEL_REPLAYED")
        other = self._waiting.get(half.pair_id)
        if other is None and (
            len(self._waiting) >= self._max_waiting
            or self._by_user[half.user] >= self._max_waiting_user
            or len(self._spent) >= MAX_SPENT
        ):
            self._busy += 1
            raise TunnelBusy("Too many tunnel connections wait for their other side; try again in a moment.")
        self._spent[token] = half.expires
        if other is None:
            self._waiting[half.pair_id] = Waiting(half, connection)
            self._by_user[half.user] += 1
            return None
        if (other.half.session_id, other.half.user) != (half.session_id, half.user):
            self._mismatched += 1
            raise TunnelRefused("The two halves of the tunnel belong to different sessions.")
        self._remove(other)
        self._joined += 1
        return other

    def gone(self, half: Half) -> None:
        """The connection of a waiting half ended, or its time is over. Nothing happens when it does not wait."""
        waiting = self._waiting.get(half.pair_id)
        if waiting is not None and waiting.half.side == half.side:
            self._remove(waiting)
            self._abandoned += 1

    def _remove(self, waiting: Waiting[C]) -> None:
        del self._waiting[waiting.half.pair_id]
        user = waiting.half.user
        self._by_user[user] -= 1
        if not self._by_user[user]:
            del self._by_user[user]

    def _forget(self, now: float) -> None:
        # All tokens live equally long and are shown soon after their issue: what lies in front expires first, or
        # nearly so, and what is kept a little longer does no harm.
        expired = [token for token, expires in islice(self._spent.items(), 8) if expires < now]
        for token in expired:
            del self._spent[token]

    def statistics(self) -> PairingStatistics:
        """Counts."""
        return PairingStatistics(
            len(self._waiting),
            len(self._spent),
            self._joined,
            self._replayed,
            self._mismatched,
            self._busy,
            self._abandoned,
        )
