"""Which congestion control a connection's sender should use, by the round-trip time it has.

On a path with a round-trip time BBR keeps its rate where loss-based control gives it up: measured with 0.1 % random
loss at 200 Mbit/s and 100 ms, one stream 190 against 9 Mbit/s. Between processes of one machine or
rack it only costs: 2.5 against 7.3 GB/s over loopback. An unprivileged process may choose what the system lists in
`tcp_allowed_congestion_control`; where that is not enough, more lanes are.

BBR keeps no more on its way than fits into the least round trip of the connection, which where SYNs crossed may be next
to nothing (`protocol.round_trip`): it then sends ten packets a round trip for ten seconds and more, 0.2 MB/s where 24
are possible. Such connections are left to a loss-based control.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Protocol

# Round-trip times from here on (seconds) are a path and not a local network.
LONG_PATH = 0.003
# `struct tcp_info` (linux/tcp.h), as far as it is of use here. Times are microseconds.
_RTT = struct.Struct("=68xI")
# Offsets of `tcpi_total_retrans` and of `tcpi_busy_time` with `tcpi_rwnd_limited` behind it.
_RETRANSMISSIONS, _LEAST, _DATA_OUT, _BUSY, _FULL, _DELIVERED = 100, 148, 156, 168, 184, 192
_LENGTH = 256
# BBR gets on with a least round trip that is this part of the true one (measured: half is enough, 0.3 is not).
ENOUGH = 0.4
_BY_LOSS = (b"cubic", b"reno")
# Of the smoothed round trip each sample is this part (RFC 6298).
_SHARE = 1 / 8


class Connection(Protocol):
    """What can be asked of a socket here, whatever is around it."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes: ...
    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...


@dataclass(frozen=True)
class TcpFacts:
    """What the kernel knows of a connection. Times in seconds; those of the sender count since its beginning: in how
    much of it there was something to send (``busy``), and the receiver's window was in the way (``window``)."""

    rtt: float | None
    retransmissions: int = 0
    busy: float | None = None
    window: float = 0.0
    # The least round trip, and what the ones of data must have been, where the connection's own SYN was acknowledged
    # twice, as it is where SYNs cross.
    least: float | None = None
    at_least: float | None = None


def tcp_facts(sock: Connection) -> TcpFacts | None:
    """None where the system does not tell, for what is no TCP socket, and for one that is closed."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, option, _LENGTH)
    except OSError:
        return None
    if len(info) < _RTT.size:
        return None
    (rtt,) = _RTT.unpack_from(info)
    # Older kernels, and other systems, know less.
    if len(info) < _FULL:
        return TcpFacts(rtt / 1e6 or None)
    (retransmissions,) = struct.unpack_from("=I", info, _RETRANSMISSIONS)
    busy, window = struct.unpack_from("=QQ", info, _BUSY)
    least, data_out = (struct.unpack_from("=I", info, offset)[0] for offset in (_LEAST, _DATA_OUT))
    at_least = None
    if len(info) >= _DELIVERED + 4:
        (delivered,) = struct.unpack_from("=I", info, _DELIVERED)
        if data_out and delivered >= data_out + 2:
            # There were no more samples than segments; the first one was the SYN's.
            at_least = (least + (rtt - least) / (1 - (1 - _SHARE) ** data_out)) / 1e6
    return TcpFacts(rtt / 1e6 or None, retransmissions, busy / 1e6, window / 1e6, least / 1e6 or None, at_least)


def trusts_least(facts: TcpFacts) -> bool:
    """Whether the least round trip of a connection is one of its path."""
    return facts.least is None or facts.at_least is None or facts.least >= ENOUGH * facts.at_least


def tune_sender(sock: Connection) -> None:
    """Choose the congestion control of a connection that is established and has been spoken on, as in TLS's handshake.
    Where it may not be chosen it stays."""
    facts = tcp_facts(sock)
    option = getattr(socket, "TCP_CONGESTION", None)
    if facts is None or facts.rtt is None or option is None:
        return
    wanted: tuple[bytes, ...] = (b"bbr",) if facts.rtt >= LONG_PATH else (b"cubic",)
    if not trusts_least(facts):
        # The system's own choice may be BBR.
        wanted = _BY_LOSS
    _choose(sock, option, wanted)


def leave_bbr(sock: Connection, rtt: float) -> None:
    """Where the system chose BBR for a fresh connection and the kernel takes far less than ``rtt`` for its round trip,
    have another congestion control."""
    facts, option = tcp_facts(sock), getattr(socket, "TCP_CONGESTION", None)
    if facts is None or facts.least is None or facts.least >= ENOUGH * rtt or option is None:
        return
    if sock.getsockopt(socket.IPPROTO_TCP, option, 16).rstrip(b"\0") == b"bbr":
        _choose(sock, option, _BY_LOSS)


def _choose(sock: Connection, option: int, names: tuple[bytes, ...]) -> None:
    for name in names:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, name)
        except OSError:
            continue
        return
