"""One port for everything: looks at the first bytes of a connection without taking them, then hands it over.

The TLS greeting says what a connection is for (ALPN) and for whom (SNI). It is read with MSG_PEEK, so that the bytes
are still there for the TLS handshake, or, later, for the machine the connection is passed on to.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from protocol.client_hello import MAX_CLIENT_HELLO, ClientHello, NotTLS, parse_client_hello_untrusted
from protocol.errors import ProtocolError
from protocol.link import ALPN as LINK_ALPN
from protocol.places import Places
from protocol.round_trip import has_left
from protocol.stun import looks_like_stun
from protocol.tunnel.token import ALPN as TUNNEL_ALPN
from protocol.websocket.orders import ALPN as WEBSOCKET_ALPN
from protocol.websocket.orders import SERVER_NAME
from relay.link_stream import LinkStream
from relay.proxies import Proxies
from relay.turnstile import Turnstile, WaitedTooLong

_logger = logging.getLogger("towpath.dispatch")

Handler = Callable[["trio.SSLStream[trio.SocketStream]"], Awaitable[None]]
LinkHandler = Callable[[LinkStream], Awaitable[None]]
PlainHandler = Callable[[trio.SocketStream], Awaitable[None]]
S = TypeVar("S")

# Ours first: the server's order decides (RFC 7301), and no browser offers it.
ALPN_PROTOCOLS = (LINK_ALPN, TUNNEL_ALPN, "h2", "http/1.1")
PEEK_TIMEOUT = 10.0
HANDSHAKE_TIMEOUT = 15.0
# Connections that have not finished their handshake; more are closed at once, and sooner those of who has many.
MAX_PENDING = 2000
# Agents have their handshakes this many at a time, the others wait: when all come back at once, each is served soon
# after its turn begins, and people's requests do not wait behind them. An agent that has kept us waiting for ``TURN``
# seconds holds up nobody; one that has waited for ``PATIENCE`` seconds is about to give up and comes again (who had no
# place after half of that came again into the middle of the crowd, and some of them only after a pause of 30 s).
HANDSHAKES_AT_ONCE = 128
TURN = 1.0
PATIENCE = 40.0
_PAUSE_FIRST, _PAUSE_MOST = 0.005, 0.25
_QUICK_LOOKS = 16

_PLAIN_BODY = b"This port speaks HTTPS only. Use an address that begins with https://.\n"
_PLAIN_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
    b"Content-Length: " + str(len(_PLAIN_BODY)).encode() + b"\r\n\r\n" + _PLAIN_BODY
)


class GreetingTimeout(ProtocolError):
    """The greeting was not complete in time, or will never be."""

    default_code = "TIMEOUT"


@dataclass(frozen=True, slots=True)
class DispatchStatistics:
    """Connections since the start by what became of them; ``pending`` are in their greeting or handshake now."""

    web: int
    link: int
    tunnel: int
    websocket: int
    stun: int
    plain: int
    refused: int
    failed: int
    pending: int


class Dispatcher:
    """Chooses who gets a connection. ``tls_context``, and ``link_context`` for agents' links, are prepared here; `use`
    others when the certificate is renewed. There are ``places`` for connections that have not finished their handshake;
    ``proxies`` are the operator's own.

    Without ``tunnel`` agents that bring one are told so in the handshake. ``websocket`` gives who takes
    connections of agents with a tunnel inside WebSocket before their handshake, None when nobody can now.
    """

    def __init__(
        self,
        *,
        web: Handler,
        link: LinkHandler,
        tls_context: ssl.SSLContext,
        link_context: ssl.SSLContext | None = None,
        tunnel: Handler | None = None,
        stun: PlainHandler | None = None,
        websocket: Callable[[], PlainHandler | None] = lambda: None,
        places: Places | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self._own = (LINK_ALPN,) if tunnel is None else (LINK_ALPN, TUNNEL_ALPN)
        offered = [name for name in ALPN_PROTOCOLS if name != TUNNEL_ALPN or tunnel is not None]
        self._offered = offered
        self.use(tls_context, link_context)
        self._link_handler = link
        self._tunnel_handler = tunnel
        self._web_handler = web
        self._stun_handler = stun
        self._websocket = websocket
        self._places = places or Places(MAX_PENDING)
        self._proxies = proxies or Proxies()
        self._links = Turnstile(HANDSHAKES_AT_ONCE, TURN, PATIENCE)
        self._taken: Counter[str] = Counter()
        self._web = self._websockets = self._stun = self._plain = self._refused = self._failed = 0

    def use(self, tls_context: ssl.SSLContext, link_context: ssl.SSLContext | None = None) -> None:
        """Serve whoever comes from now on with these: the certificate is another one."""
        self._context, self._link_context = tls_context, link_context or tls_context
        for context in (self._context, self._link_context):
            context.set_alpn_protocols(self._offered)

    def statistics(self) -> DispatchStatistics:
        """Counts since the start."""
        return DispatchStatistics(
            web=self._web,
            link=self._taken[LINK_ALPN],
            tunnel=self._taken[TUNNEL_ALPN],
            websocket=self._websockets,
            stun=self._stun,
            plain=self._plain,
            refused=self._refused,
            failed=self._failed,
            pending=self._places.taken,
        )

    async def handle(self, stream: trio.SocketStream) -> None:
        """Greet one connection and run its handler; closes it. Raises nothing for what a caller or a handler does."""
        try:
            async with stream:
                caller = self._proxies.caller_at(stream)
                if not self._places.take(caller):
                    self._refused += 1
                    return
                try:
                    run = await self._choose(stream)
                finally:
                    self._places.leave(caller)
                await run()
        except NotTLS:
            self._plain += 1
        except (ProtocolError, WaitedTooLong, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self._failed += 1
            _logger.debug("A connection came to nothing: %s", error)

    async def _choose(self, stream: trio.SocketStream) -> Callable[[], Awaitable[None]]:
        """What is to be done with a connection, once it has said what it wants."""
        try:
            hello = await peek_client_hello(stream.socket)
        except NotTLS:
            if self._stun_handler is not None and await _is_stun(stream.socket):
                self._stun += 1
                return partial(self._run, self._stun_handler, stream)
            await _answer_plain(stream)
            raise
        if _wants_websocket_tunnel(hello) and (take := self._websocket()) is not None:
            self._websockets += 1
            return partial(self._run, take, stream)
        # In the server's order, as the handshake chooses.
        own = next((name for name in self._own if name in hello.alpn), None)
        if own == LINK_ALPN:
            return partial(self._run, self._link_handler, await self._secure_link(stream))
        # Browsers and other HTTP clients often end without TLS's goodbye.
        secured = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
        await _shake_hands(secured)
        self._check_chosen(own, secured.selected_alpn_protocol())
        if own is not None and self._tunnel_handler is not None:
            self._taken[own] += 1
            return partial(self._run, self._tunnel_handler, secured)
        self._web += 1
        return partial(self._run, self._web_handler, secured)

    async def _secure_link(self, stream: trio.SocketStream) -> LinkStream:
        async with self._links.turn(lambda: not _has_something(stream.socket)):
            if has_left(stream.socket):
                raise GreetingTimeout("The caller left before its turn came.")
            secured = LinkStream(stream, self._link_context)
            await _shake_hands(secured)
        self._check_chosen(LINK_ALPN, secured.selected_alpn_protocol())
        self._taken[LINK_ALPN] += 1
        return secured

    def _check_chosen(self, own: str | None, chosen: str | None) -> None:
        if own != (chosen if chosen in self._own else None):
            raise ProtocolError("The handshake chose another protocol than the greeting announced.")

    async def _run(self, handler: Callable[[S], Awaitable[None]], stream: S) -> None:
        try:
            await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            _logger.debug("A connection broke.")
        except Exception:
            # One connection's fault must not end the port that all others use.
            _logger.exception("A connection ended with an error of the relay.")


def _wants_websocket_tunnel(hello: ClientHello) -> bool:
    """Whether an agent, or an operator's proxy for one, says so before it has spoken a word of TLS."""
    if tuple(hello.alpn) == WEBSOCKET_ALPN:
        return True
    return hello.server_name == SERVER_NAME and set(hello.alpn) <= set(WEBSOCKET_ALPN)


async def _shake_hands(secured: trio.SSLStream[trio.SocketStream] | LinkStream) -> None:
    with trio.move_on_after(HANDSHAKE_TIMEOUT) as scope:
        await secured.do_handshake()
    if scope.cancelled_caught:
        raise GreetingTimeout("The TLS handshake took too long.")


def _has_something(sock: trio.socket.SocketType) -> bool:
    """Whether something has come that we have not read."""
    waiting = select.poll()
    waiting.register(sock.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


async def _is_stun(sock: trio.socket.SocketType) -> bool:
    """Whether a connection that is not TLS begins as STUN over TCP does. Its first bytes come in one packet."""
    with trio.move_on_after(PEEK_TIMEOUT):
        for _ in range(_QUICK_LOOKS):
            data = await sock.recv(8, socket.MSG_PEEK)
            found = looks_like_stun(data) if data else False
            if found is not None:
                return found
            await trio.sleep(_PAUSE_MOST)
    return False


async def peek_client_hello(
    sock: trio.socket.SocketType,
    *,
    timeout: float = PEEK_TIMEOUT,  # noqa: ASYNC109 - a bound of its own, not the caller's
) -> ClientHello:
    """The greeting at the start of a connection, left in place.

    Raises `NotTLS`, `GreetingTimeout` after ``timeout`` seconds or when the peer closes, `ProtocolError` when it is
    malformed or longer than `MAX_CLIENT_HELLO`, OSError when the connection broke.
    """
    with trio.move_on_after(timeout):
        return await _peek(sock)
    raise GreetingTimeout("The TLS greeting was not complete in time.")


async def _peek(sock: trio.socket.SocketType) -> ClientHello:
    # MSG_PEEK returns what is there and does not wait for more. On Linux the low-water mark makes the socket readable
    # only once there is more; where the mark has no effect, and after the peer closed, growing pauses keep this from
    # spinning until the caller's time is up. So they do when a peer sends byte by byte to have each one looked at.
    seen, looks, pause = 0, 0, _PAUSE_FIRST
    try:
        while True:
            data = await sock.recv(MAX_CLIENT_HELLO, socket.MSG_PEEK)
            if not data:
                raise GreetingTimeout("The connection was closed before its TLS greeting.")
            hello = parse_client_hello_untrusted(data)
            if hello is not None:
                return hello
            if len(data) >= MAX_CLIENT_HELLO:
                raise ProtocolError("The TLS greeting of the peer is too long.")
            looks += 1
            if len(data) == seen or looks > _QUICK_LOOKS:
                await trio.sleep(pause)
                pause = min(2 * pause, _PAUSE_MOST)
            seen = len(data)
            _set_low_water(sock, seen + 1)
            await trio.lowlevel.wait_readable(sock)
    finally:
        if seen:
            _set_low_water(sock, 1)


def _set_low_water(sock: trio.socket.SocketType, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EINVAL):
            raise


async def _answer_plain(stream: trio.SocketStream) -> None:
    """Tell somebody who came without TLS, in the one language such callers usually understand."""
    with trio.move_on_after(2.0):
        try:
            # Unread bytes would make the kernel reset the connection and lose the answer.
            await stream.receive_some(MAX_CLIENT_HELLO)
            await stream.send_all(_PLAIN_ANSWER)
            await stream.send_eof()
            for _ in range(16):
                if not await stream.receive_some(MAX_CLIENT_HELLO):
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
