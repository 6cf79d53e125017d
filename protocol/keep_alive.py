"""Has the kernel notice that the other end of a TCP connection has vanished. It costs the processes nothing."""

from __future__ import annotations

import socket

import trio

# An idle peer is asked after ``IDLE`` seconds and every ``INTERVAL`` then, ``COUNT`` times. Below the 30 s after which
# the first NATs forget idle connections, and below 15 s in all.
IDLE, INTERVAL, COUNT = 5, 3, 3
# What was sent and is not acknowledged for so long (seconds) was sent to nobody.
UNACKNOWLEDGED = 14.0


def keep_alive(sock: socket.socket | trio.socket.SocketType, *, idle: int = IDLE) -> None:
    """Ask an idle peer for a sign of life: one that vanished is noticed within ``idle + 9`` seconds, and no NAT on the
    way forgets the connection. Does nothing to what is no TCP socket: other carriers keep themselves alive."""
    if not _is_tcp(sock):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", COUNT)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def give_up_unacknowledged(sock: socket.socket | trio.socket.SocketType) -> None:
    """End the connection when what was sent is not acknowledged for 14 s (RFC 5482; Linux).

    For connections whose receiver always reads: one that is held up for that long counts as gone as well.
    """
    if _is_tcp(sock) and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED * 1000))


def _is_tcp(sock: socket.socket | trio.socket.SocketType) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
