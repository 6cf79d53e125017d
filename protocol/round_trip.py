"""What the kernel knows of a TCP connection: its round-trip time, its end (Linux, tcp_info of linux/tcp.h)."""

from __future__ import annotations

import socket
import struct
from typing import Protocol

_SIZE = 152
_RTT, _MIN_RTT = 68, 148
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
