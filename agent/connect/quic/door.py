"""Which datagram begins the one connection of a server, and what else is kept away from it until it is up. Sans I/O.

The server's UDP port is known to whoever saw a packet of it. So until the handshake is done, only datagrams from where
punching has found the peer count; and since anybody can put that address on his datagrams, what began a connection has
no right to it yet: while one is half open, another Initial packet is answered with Retry (RFC 9000, section 8.1.2),
and who shows its token, which only that address can have got, takes the place of the first. So there is one half-open
connection at any time, whatever comes, and the peer's own is at most one round trip late.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass

Address = tuple[str, int]

# A datagram with an Initial packet is at least so long (RFC 9000, section 14.1).
SMALLEST_INITIAL = 1200
_VERSION_1 = 1
_LONG, _FIXED, _TYPE, _INITIAL = 0x80, 0x40, 0x30, 0x00
_CID_LENGTHS = range(8, 21)
_LIFE = 10.0
_RETRY_CID = 8


@dataclass(frozen=True, slots=True)
class Begin:
    """A new connection is to begin, with these ids for its transport parameters (RFC 9000, section 7.3)."""

    original: bytes
    retry_source: bytes | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """It belongs to the connection there is."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A datagram to send back; nothing is kept of the one that came."""

    data: bytes


Verdict = Begin | Pass | Answer | None


@dataclass(frozen=True, slots=True)
class Initial:
    """The head of an Initial packet."""

    destination: bytes
    source: bytes
    token: bytes


@dataclass(frozen=True)
class DoorStatistics:
    """Datagrams of strangers, those that are none of QUIC's, retries sent, connections begun."""

    strangers: int
    garbage: int
    retries: int
    begun: int


class Door:
    """``known`` are the addresses that count; empty for all of them. ``library`` makes the Retry packets."""

    def __init__(self, library: str, known: Collection[Address] = ()) -> None:
        self._library = library
        self._known = frozenset(known)
        self._secret = secrets.token_bytes(32)
        self._strangers = self._garbage = self._retries = self._begun = 0
        # By which ids the client of the half-open connection may call it.
        self._names: set[bytes] = set()

    def began(self, own: bytes) -> None:
        """The connection that `judge_untrusted` wanted exists, and calls itself so."""
        self._names.add(own)

    def gave_up(self) -> None:
        """The half-open connection is gone; the next one may begin without a token."""
        self._names.clear()

    def judge_untrusted(self, data: bytes, address: Address, now: float) -> Verdict:
        """What to do with a datagram (of several in a row, with the first) while the handshake is not done."""
        if self._known and address not in self._known:
            self._strangers += 1
            return None
        initial = initial_untrusted(data)
        if initial is None:
            if self._names:
                return Pass()
            self._garbage += 1
            return None
        if initial.destination in self._names:
            return Pass()
        original = self._original_of(initial, address, now)
        if original is not None:
            self._begun += 1
            self._names = {initial.destination}
            return Begin(original, initial.destination)
        if not self._names:
            self._begun += 1
            self._names = {initial.destination}
            return Begin(initial.destination)
        self._retries += 1
        return Answer(self._retry(initial, address, now))

    def statistics(self) -> DoorStatistics:
        """Counts since the beginning."""
        return DoorStatistics(self._strangers, self._garbage, self._retries, self._begun)

    # --- tokens ----------------------------------------------------------------------------------------------

    def _retry(self, initial: Initial, address: Address, now: float) -> bytes:
        source = os.urandom(_RETRY_CID)
        until = int(now + _LIFE).to_bytes(8, "big")
        token = until + initial.destination
        packet = importlib.import_module(f"{self._library}.quic.packet")
        made: bytes = packet.encode_quic_retry(
            version=_VERSION_1,
            source_cid=source,
            destination_cid=initial.source,
            original_destination_cid=initial.destination,
            retry_token=self._seal(token, source, address) + token,
        )
        return made

    def _original_of(self, initial: Initial, address: Address, now: float) -> bytes | None:
        """The id under which a client with a token of ours has called first."""
        seal, token = initial.token[:32], initial.token[32:]
        if len(token) - 8 not in _CID_LENGTHS or int.from_bytes(token[:8], "big") < now:
            return None
        good = hmac.compare_digest(seal, self._seal(token, initial.destination, address))
        return token[8:] if good else None

    def _seal(self, token: bytes, source: bytes, address: Address) -> bytes:
        place = f"{address[0]} {address[1]}".encode()
        message = b"\0".join((len(token).to_bytes(1, "big") + token, len(source).to_bytes(1, "big") + source, place))
        return hmac.digest(self._secret, message, hashlib.sha256)


def initial_untrusted(data: bytes) -> Initial | None:
    """The head of the Initial packet (version 1) at the beginning of a datagram; None for anything else."""
    if len(data) < SMALLEST_INITIAL or data[0] & (_LONG | _FIXED | _TYPE) != _LONG | _FIXED | _INITIAL:
        return None
    if int.from_bytes(data[1:5], "big") != _VERSION_1:
        return None
    at = 5
    ids = []
    for _ in range(2):
        length = data[at]
        if length > _CID_LENGTHS[-1]:
            return None
        ids.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    if len(ids[0]) not in _CID_LENGTHS:
        return None
    # A variable-length integer (RFC 9000, section 16).
    width = 1 << (data[at] >> 6)
    length = int.from_bytes(data[at : at + width], "big") & ((1 << (8 * width - 2)) - 1)
    token = data[at + width : at + width + length]
    return Initial(ids[0], ids[1], token) if len(token) == length else None
