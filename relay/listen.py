"""Takes connections from listening sockets, many at a time: after a restart thousands of agents call at once."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from protocol.errors import NeedsPerson

_logger = logging.getLogger("relay.listen")

# Connections taken in one go before the others have their turn.
BURST = 32
# How long to wait when the machine has no descriptors or memory left for another connection, in seconds.
EXHAUSTED_PAUSE = 0.1
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_ADVICE = {
    errno.EADDRINUSE: "another program has the port (`ss -ltnp` names it)",
    errno.EACCES: "ports below 1024 need the capability CAP_NET_BIND_SERVICE, as in systemd/towpath-relay.service",
    errno.EADDRNOTAVAIL: "listen.host must be an address of this machine",
}
# The listening socket itself is gone or none.
_FATAL = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}


class PortUnusable(NeedsPerson):
    """The relay's port cannot be had; the sentence says why."""

    default_code = "PORT"


async def open_port(host: str, port: int, backlog: int) -> list[trio.SocketListener]:
    """Listen on the relay's port. Raises `PortUnusable`."""
    # One wildcard means both families; trio's ``::`` is IPv6 alone.
    try:
        return await trio.open_tcp_listeners(port, host=None if host == "::" else host, backlog=backlog)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "see `listen` in the configuration")
        if isinstance(error, socket.gaierror):
            advice = "listen.host must be an address of this machine"
        reason = error.strerror or str(error)
        raise PortUnusable(
            f"Nothing can listen on {host} port {port}: {reason}; {advice}.", who="relay operator"
        ) from error


async def accept_all(
    listeners: Sequence[trio.SocketListener],
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    connections: trio.Nursery,
) -> None:
    """Run ``handle`` in ``connections`` for everybody who calls, until cancelled; closes ``listeners``.

    Raises OSError when a listening socket breaks.
    """
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, handle, connections)


async def _accept(
    listener: trio.SocketListener, handle: Callable[[trio.SocketStream], Awaitable[None]], connections: trio.Nursery
) -> None:
    async with listener:
        # The same open socket under another descriptor: trio's own takes one connection for each turn of its loop.
        with socket.socket(fileno=socket.dup(listener.socket.fileno())) as raw:
            raw.setblocking(False)
            while True:
                await trio.lowlevel.wait_readable(raw)
                if not _take_burst(raw, handle, connections):
                    _logger.error("No descriptors or memory are left for more connections.")
                    await trio.sleep(EXHAUSTED_PAUSE)


def _take_burst(
    raw: socket.socket, handle: Callable[[trio.SocketStream], Awaitable[None]], connections: trio.Nursery
) -> bool:
    """Take what waits, up to a burst; False when the machine has no room for more."""
    for _ in range(BURST):
        try:
            taken, _ = raw.accept()
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno in _FATAL:
                raise
            if error.errno in _EXHAUSTED:
                return False
            # The caller has given up already, or its network reports trouble (accept(2)).
            continue
        connections.start_soon(handle, trio.SocketStream(trio.socket.from_stdlib_socket(taken)))
    return True
