"""UDP sockets for IPv4 and IPv6 at once, and addresses as such a socket wants them (RFC 4291, section 2.5.5.2).

One socket means one thing to offer, to punch from and to hand to the process that speaks QUIC, whichever family turns
out to be the way. Everywhere else addresses are written plainly: IPv4 as IPv4.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Protocol

Address = tuple[str, int]

_MAPPED = "::ffff:"


class HasOptions(Protocol):
    """A socket of whatever library."""

    def getsockopt(self, level: int, option: int, /) -> int: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def open_udp() -> socket.socket:
    """A socket on a port of its own: for both families where the system lets one socket serve both, else for IPv4."""
    with contextlib.suppress(OSError):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # Punching limits how far datagrams go, and must be able to for both.
            set_hops(sock, "127.0.0.1", get_hops(sock, "127.0.0.1"))
            sock.bind(("::", 0))
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind(("0.0.0.0", 0))  # noqa: S104 - a client's port
    except BaseException:
        sock.close()
        raise
    return sock


def has_ipv6(family: int) -> bool:
    """Whether a socket of `open_udp` with this family also reaches IPv6 addresses."""
    return family == socket.AF_INET6


def outgoing(family: int, address: Address) -> Address:
    """A plain address as a socket of this family sends to it."""
    if family == socket.AF_INET6 and ":" not in address[0]:
        return _MAPPED + address[0], address[1]
    return address


def incoming(address: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    """Where a datagram came from, plainly."""
    return address[0].removeprefix(_MAPPED).partition("%")[0], address[1]


def _option(host: str) -> tuple[int, int]:
    if ":" in host:
        return socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS
    return socket.IPPROTO_IP, socket.IP_TTL


def get_hops(sock: HasOptions, host: str) -> int:
    """How many routers datagrams to addresses like this one may pass. Raises OSError."""
    return sock.getsockopt(*_option(host))


def set_hops(sock: HasOptions, host: str, hops: int) -> None:
    """Limit how many routers datagrams to addresses like this one may pass. Raises OSError."""
    sock.setsockopt(*_option(host), hops)
