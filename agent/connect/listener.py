"""The data port: looks at the beginning of each connection without taking it, and finds out whom it is for.

A destination's connection begins with a TLS greeting that names the session (SNI); one that a source dialled begins
with the token of an offer (`protocol.reversal`). Connections that were punched or came through the tunnel are greeted
the same way.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from protocol.client_hello import MAX_CLIENT_HELLO, NotTLS, parse_client_hello_untrusted
from protocol.errors import ProtocolError
from protocol.keep_alive import keep_alive
from protocol.places import Places, neighbourhood
from protocol.reversal import LENGTH, parse_preamble_untrusted
from protocol.session import ALPN_LANE, ALPNS_CONTROL, SNI_SUFFIX

GREETING_TIMEOUT = 10.0
# Connections that have not said what they want; more are closed at once, and sooner those of who has many.
MAX_STRANGERS = 128
_BACKLOG = 256

Deliver = Callable[[str, str, trio.socket.SocketType], Awaitable[None]]


def reusable(family: socket.AddressFamily) -> socket.socket:
    """A TCP socket that may share its local port with others of ours; set before `bind` on every one of them."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_on(host: str, port: int) -> socket.socket:
    """A listener whose port may also be used for connecting (punching needs both). Raises OSError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port:
        # With SO_REUSEPORT a second agent of one user would get the port as well, and half of our connections.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
            probe.listen(1)
    sock = reusable(family)
    try:
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def bind(listen: str, port: int) -> list[socket.socket]:
    """Listening sockets on one port; ``::`` means every IPv6 and IPv4 address, in two sockets.

    Raises OSError, for example when the port is taken. A machine without IPv6 listens on IPv4 alone.
    """
    if listen != "::":
        return [listen_on(listen, port)]
    first = listen_on("0.0.0.0", port)  # noqa: S104 - the data port is meant to be reached
    try:
        second = listen_on("::", first.getsockname()[1])
    except OSError:
        if not socket.has_ipv6 or not _ipv6_works():
            return [first]
        first.close()
        raise
    except BaseException:
        first.close()
        raise
    return [first, second]


def _ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


class DataPort:
    """Accepts and greets. ``deliver`` gets session id, kind and socket, which is closed after it returns."""

    def __init__(self, sockets: list[socket.socket], deliver: Deliver) -> None:
        self.port: int = sockets[0].getsockname()[1]
        self.families = frozenset(sock.family for sock in sockets)
        self._sockets = sockets
        self._deliver = deliver
        self._expected: dict[str, Callable[[socket.socket], None]] = {}
        self._strangers = Places(MAX_STRANGERS)

    async def serve(self) -> None:
        """Accept until cancelled."""
        listeners = []
        for sock in self._sockets:
            sock.setblocking(False)
            listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))

        async def greet(stream: trio.SocketStream) -> None:
            await self.greet(stream.socket)

        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(greet, listeners, handler_nursery=nursery)

    @contextmanager
    def expecting(self, token: str, arrived: Callable[[socket.socket], None]) -> Iterator[None]:
        """Hand connections that begin with this token to ``arrived``, which owns them from then on."""
        self._expected[token] = arrived
        try:
            yield
        finally:
            # A relay may have given one token twice.
            if self._expected.get(token) is arrived:
                del self._expected[token]

    async def greet(self, sock: trio.socket.SocketType) -> None:
        """Find out what one connection wants and hand it over. Raises nothing for what a peer does."""
        caller = _caller(sock)
        if not self._strangers.take(caller):
            return
        wanted: tuple[str, str] | str | None = None
        try:
            if sock.type == socket.SOCK_STREAM:
                keep_alive(sock)
            with trio.move_on_after(GREETING_TIMEOUT):
                wanted = await _greeting(sock)
        except (ProtocolError, OSError):
            wanted = None
        finally:
            self._strangers.leave(caller)
        if isinstance(wanted, str):
            await self._reversed(wanted, sock)
        elif wanted is not None:
            await self._deliver(*wanted, sock)

    async def _reversed(self, token: str, sock: trio.socket.SocketType) -> None:
        if token not in self._expected:
            return
        try:
            # All of it is there: it was looked at.
            await sock.recv(LENGTH)
            taken = detached(sock)
        except OSError:
            return
        # Whoever waited may be gone by now.
        arrived = self._expected.get(token)
        if arrived is not None:
            arrived(taken)
        else:
            taken.close()


def _caller(sock: trio.socket.SocketType) -> str:
    """As whom a connection is counted; empty where it has no address, as those inside WebSocket."""
    try:
        name = sock.getpeername()
    except OSError:
        return ""
    return neighbourhood(name[0]) if isinstance(name, tuple) else ""


def detached(sock: trio.socket.SocketType) -> socket.socket:
    """The same connection as a plain socket of its own; the given one may be closed."""
    plain = sock.dup()
    return socket.socket(fileno=plain.detach())


async def _greeting(sock: trio.socket.SocketType) -> tuple[str, str] | str | None:
    """Session id and kind that a connection asks for, or an offer's token, or None. TLS bytes stay in the socket."""
    pause = 0.005
    while True:
        data = await sock.recv(MAX_CLIENT_HELLO, socket.MSG_PEEK)
        if not data:
            return None
        try:
            hello = parse_client_hello_untrusted(data)
        except NotTLS:
            may_be, token = parse_preamble_untrusted(data)
            if token is not None or not may_be:
                return token
        else:
            if hello is not None:
                break
        # A peek does not wait for more than there is; the pause grows, the caller's time-out ends it.
        await trio.sleep(pause)
        pause = min(pause * 2, 0.25)
    if hello.server_name is None or not hello.server_name.endswith(SNI_SUFFIX):
        return None
    kinds = {**dict.fromkeys(ALPNS_CONTROL, "control"), ALPN_LANE: "lane"}
    kind = next((kinds[name] for name in hello.alpn if name in kinds), None)
    return None if kind is None else (hello.server_name.removesuffix(SNI_SUFFIX), kind)
