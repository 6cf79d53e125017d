"""Which congestion control a connection's sender should use, by the round-trip time it has.

On a path with a round-trip time BBR keeps its rate where loss-based control gives it up: measured with 0.1 % random
loss at 200 Mbit/s and 100 ms, one stream 190 against 9 Mbit/s. Between processes of one machine or
rack it only costs: 2.5 against 7.3 GB/s over loopback. An unprivileged process may choose what the system lists in
`tcp_allowed_congestion_control`; where that is not enough, more lanes are.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Protocol

# Round-trip times from here on (seconds) are a path and not a local network.
LONG_PATH = 0.003
# `struct tcp_info` (linux/tcp.h), as far as it is of use here. Times are microseconds.
_RTT = struct.Struct("=68xI")
# Offsets of `tcpi_total_retrans` and of `tcpi_busy_time` with `tcpi_rwnd_limited` behind it.
_RETRANSMISSIONS, _BUSY, _FULL = 100, 168, 184
_LENGTH = 256


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
    return TcpFacts(rtt / 1e6 or None, retransmissions, busy / 1e6, window / 1e6)


def round_trip_time(sock: Connection) -> float | None:
    """The smoothed round-trip time in seconds, or None where the system does not tell (or it is no TCP socket)."""
    facts = tcp_facts(sock)
    return None if facts is None else facts.rtt


def tune_sender(sock: Connection) -> None:
    """Choose the congestion control of a connection that is established. Where it may not be chosen it stays."""
    time = round_trip_time(sock)
    option = getattr(socket, "TCP_CONGESTION", None)
    if time is None or option is None:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, option, b"bbr" if time >= LONG_PATH else b"cubic")
