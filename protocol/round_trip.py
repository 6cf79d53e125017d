"""The round-trip time of a TCP connection as the kernel knows it (Linux, tcp_info of linux/tcp.h)."""

from __future__ import annotations

import socket
import struct
from typing import Protocol

_SIZE = 152
_RTT, _MIN_RTT = 68, 148
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
