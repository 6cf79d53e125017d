"""The data port: looks at each connection's TLS greeting without terminating it and finds the session it is for."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import trio

from protocol.client_hello import MAX_CLIENT_HELLO, parse_client_hello_untrusted
from protocol.errors import ProtocolError
from protocol.session import ALPN_CONTROL, ALPN_LANE, SNI_SUFFIX

GREETING_TIMEOUT = 10.0
# Connections that have not said what they want; more are closed at once.
MAX_STRANGERS = 128
_BACKLOG = 256

Deliver = Callable[[str, str, trio.socket.SocketType], Awaitable[None]]


def bind(listen: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError, for example when the port is taken."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((listen, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _greeting(sock: trio.socket.SocketType) -> tuple[str, str] | None:
    """Session id and kind that a connection asks for, or None. The bytes stay in the socket."""
    pause = 0.005
    while True:
        data = await sock.recv(MAX_CLIENT_HELLO, socket.MSG_PEEK)
        if not data:
            return None
        hello = parse_client_hello_untrusted(data)
        if hello is not None:
            break
        # A peek does not wait for more than there is; the pause grows, the caller's time-out ends it.
        await trio.sleep(pause)
        pause = min(pause * 2, 0.25)
    if hello.server_name is None or not hello.server_name.endswith(SNI_SUFFIX):
        return None
    kinds = {ALPN_CONTROL: "control", ALPN_LANE: "lane"}
    kind = next((kinds[name] for name in hello.alpn if name in kinds), None)
    return None if kind is None else (hello.server_name.removesuffix(SNI_SUFFIX), kind)


async def serve(listening: socket.socket, deliver: Deliver) -> None:
    """Accept until cancelled. ``deliver`` gets session id, kind and the socket, which is closed after it returns."""
    listening.setblocking(False)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    strangers = 0

    async def greet(stream: trio.SocketStream) -> None:
        nonlocal strangers
        strangers += 1
        try:
            wanted = None
            if strangers <= MAX_STRANGERS:
                with trio.move_on_after(GREETING_TIMEOUT):
                    wanted = await _greeting(stream.socket)
        except (ProtocolError, OSError):
            wanted = None
        finally:
            strangers -= 1
        if wanted is not None:
            await deliver(*wanted, stream.socket)

    async with trio.open_nursery() as nursery:
        await trio.serve_listeners(greet, [listener], handler_nursery=nursery)
