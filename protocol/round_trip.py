"""What the kernel knows of a TCP connection: its round-trip time, its end (Linux, tcp_info of linux/tcp.h)."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Protocol

_SIZE = 152
_LAST_ACK_RECV, _RTT, _TOTAL_RETRANS, _SEGS_OUT, _SEGS_IN, _MIN_RTT = 56, 68, 100, 136, 140, 148
# States in which the other side may still speak (net/tcp_states.h): established, and both of opening.
_OPEN = (1, 2, 3)
_UNKNOWN = 0xFFFFFFFF


class HasOptions(Protocol):
    """A socket of whatever library."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def round_trip(sock: HasOptions) -> float | None:
    """Seconds, the least that was seen where the kernel keeps it; None where the system does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, option, _SIZE)
    except OSError:
        return None
    for offset in (_MIN_RTT, _RTT):
        if len(info) >= offset + 4:
            (microseconds,) = struct.unpack_from("=I", info, offset)
            if 0 < microseconds < _UNKNOWN:
                return float(microseconds) / 1e6
    return None


def dialled_round_trip(sock: HasOptions, took: float) -> float | None:
    """As `round_trip`, of a connection that was dialled in ``took`` seconds and on which nothing was said yet.

    Where the SYNs of both sides crossed, each kernel takes the time from its SYN-ACK to the other's for the round trip,
    which is anything between nothing and the whole of it, as one side was earlier (both values together are the round
    trip). The connection has then come in exactly one round trip; what passed since then (milliseconds) is not of it.
    Linux before 6.12 measures right, with a segment more.
    """
    least = round_trip(sock)
    if not _crossed(sock):
        return least
    again, since = _numbers(sock, _TOTAL_RETRANS, _LAST_ACK_RECV)
    return None if again else max(took - since / 1e3, least or 0.0)


def _crossed(sock: HasOptions) -> bool:
    """Whether it was a SYN-ACK that ended a connection's handshake which a SYN had come for: it is acknowledged once
    more. Where only the other's SYN came through, what comes is an acknowledgement, and nothing is to be said to it."""
    again, sent, came = _numbers(sock, _TOTAL_RETRANS, _SEGS_OUT, _SEGS_IN)
    return came == 2 and sent - again >= 3


def _numbers(sock: HasOptions, *offsets: int) -> list[int]:
    """Counters of the connection; zeros where the system does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    info = b""
    if option is not None:
        with contextlib.suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, option, _SIZE)
    return [struct.unpack_from("=I", info, offset)[0] if len(info) >= offset + 4 else 0 for offset in offsets]


def has_left(sock: HasOptions) -> bool:
    """Whether the other side has closed the connection, even where bytes of it are still to be read; False where the
    system does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, option, 1)
    except OSError:
        return True
    return bool(info) and info[0] not in _OPEN
