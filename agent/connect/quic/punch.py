"""Finding a way between two UDP sockets behind NATs. Sans I/O; ``now`` in seconds is passed in.

Both sides know the other's candidates and a secret of the offer. First each sends one datagram that dies on the way, so
that its own NAT has a mapping before anything of the peer arrives there (an early datagram makes some NATs move the
mapping). Then both probe, and answer probes; what answers a probe is reached in both directions. The client goes on to
QUIC with the first answer, and its QUIC says to a server whose own probes were not answered that its answer has come.
Its QUIC is a process of its own, which a busy machine takes seconds to start: a server that has heard the client waits
for that, longer than two sides look for one another.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Address = tuple[str, int]

# Probes begin so long after the opening datagrams, which both sides send with the relay's go.
OPEN_AHEAD = 0.1
INTERVAL = 0.05
# After so long there is no way.
GIVE_UP = 4.0
# A server waits so long for the QUIC of a client that it has heard, and sends seldom when the client must have gone on.
START_PATIENCE = 15.0
LATE_INTERVAL = 0.5
MAX_TARGETS = 8
# Far enough to leave a site's own NATs, not far enough to reach the peer's.
OPENING_TTL = 4
_MAGIC = b"\x00TWP"
_PROBE, _ANSWER = b"\x01", b"\x02"
_LENGTH = len(_MAGIC) + 1 + 16


@dataclass(frozen=True, slots=True)
class Send:
    """A datagram to send; ``opening`` with a short life."""

    data: bytes
    to: Address
    opening: bool = False


class Punch:
    """One side. ``client`` is the destination. Feed it datagrams and time; `found` is where the peer was reached."""

    def __init__(self, *, client: bool, secret: str, targets: Iterable[Address], now: float) -> None:
        self._client = client
        self._ours = _tag(secret, client)
        self._theirs = _tag(secret, not client)
        self._targets = list(dict.fromkeys(targets))[:MAX_TARGETS]
        self._begin = now + OPEN_AHEAD
        self._next = now
        self._opened = False
        # Where authentic probes came from.
        self._answered: set[Address] = set()
        self.found: Address | None = None

    @property
    def deadline(self) -> float:
        """When to give up, as far as is known by now."""
        return self._begin + (START_PATIENCE if self.is_heard and not self._client else GIVE_UP)

    @property
    def is_heard(self) -> bool:
        """Whether the peer's datagrams come through: a probe that was answered, or an answer."""
        return bool(self._answered) or self.found is not None

    def next_time(self) -> float:
        """When `due` has something to send next."""
        return self._next

    def due(self, now: float) -> Iterator[Send]:
        """What is to be sent now."""
        if now < self._next:
            return
        if not self._opened:
            self._opened = True
            self._next = self._begin
            for target in self._targets:
                yield Send(_MAGIC, target, opening=True)
            return
        self._next = now + (INTERVAL if now < self._begin + GIVE_UP else LATE_INTERVAL)
        for target in self._targets if self.found is None else [self.found]:
            yield Send(_MAGIC + _PROBE + self._ours, target)

    def receive_untrusted(self, data: bytes, source: Address) -> Iterator[Send]:
        """A datagram has come; what to answer. What is not the peer's is ignored."""
        if len(data) != _LENGTH or not data.startswith(_MAGIC):
            return
        kind, tag = data[4:5], data[5:]
        if not hmac.compare_digest(tag, self._theirs):
            return
        if kind == _PROBE:
            # Its NAT may show it from an address that it does not know itself.
            if source not in self._targets and len(self._targets) < 2 * MAX_TARGETS:
                self._targets.append(source)
            if source in self._targets:
                self._answered.add(source)
            yield Send(_MAGIC + _ANSWER + self._ours, source)
        elif kind == _ANSWER and self.found is None:
            self.found = source

    def is_start_untrusted(self, data: bytes, source: Address) -> bool:
        """At the server: whether this is the peer's QUIC, which begins only where our answer to its probe has come.
        Where it comes from is where the peer is found then: it goes on from there."""
        if not is_quic_start(data) or source not in self._answered:
            return False
        self.found = source
        return True


def _tag(secret: str, client: bool) -> bytes:
    label = b"towpath udp probe of the " + (b"destination" if client else b"source")
    return hmac.digest(secret.encode(), label, hashlib.sha256)[:16]


def is_quic_start(data: bytes) -> bool:
    """Whether a datagram can begin a QUIC connection: a long header (RFC 9000, 17.2)."""
    return bool(data) and bool(data[0] & 0x80)
