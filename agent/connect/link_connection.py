"""Opens the connection of a link: TCP or a proxy, TLS, and WebSocket inside it where nothing else passes."""

from __future__ import annotations

import os
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from agent.connect.relay_way import Blocked, CannotConnect, RelayWay, Way, tls_context
from protocol.errors import ProtocolError, TowpathError
from protocol.interception import CODE, certificate_error, certificate_sentence
from protocol.keep_alive import give_up_unacknowledged, keep_alive
from protocol.link import ALPN

Dial = Callable[[str, int], Awaitable[trio.abc.HalfCloseableStream]]
Secured = trio.SSLStream[trio.abc.HalfCloseableStream]

# For TCP, or a proxy's answer; and for the handshakes as well, which a relay that all agents come back to lets wait
# (`relay.dispatch.PATIENCE`, which is shorter): whoever waits is served sooner than whoever leaves and comes again.
CONNECT_TIMEOUT, DIAL_TIMEOUT = 30.0, 45.0
# What cuts a connection for its TLS greeting does so within this many seconds.
INSPECTION = 5.0


@dataclass(frozen=True)
class LinkConnection:
    """A stream for the link, the server's certificate (DER) under it, and how it is wrapped."""

    stream: trio.abc.Stream
    certificate: bytes
    way: Way


class LinkConnector:
    """``ca_pem`` is the relay's own CA, None when the system's trust decides."""

    def __init__(self, host: str, port: int, ca_pem: str | None, dial: Dial, way: RelayWay) -> None:
        self._host, self._port = host, port
        self._raw_context = tls_context(ca_pem, ALPN)
        self._http_context = tls_context(ca_pem, "http/1.1", least=ssl.TLSVersion.TLSv1_2)
        self._dial = dial
        self._way = way
        # Since when (trio's clock) the relay has had a connection that it does not go on with.
        self.waits_since: float | None = None

    async def open(self) -> LinkConnection:
        """Connect. Raises `CannotConnect` and what the proxy's dialler raises, within `DIAL_TIMEOUT` seconds."""
        try:
            return await self._open()
        finally:
            self.waits_since = None

    async def _open(self) -> LinkConnection:
        with trio.move_on_after(DIAL_TIMEOUT):
            (stream, certificate), way = await self._way.first(
                partial(self._open_raw), self._open_websocket, lambda late: _drop(late[0])
            )
            return LinkConnection(stream, certificate, way)
        raise self._silent(DIAL_TIMEOUT)

    def _silent(self, seconds: float) -> CannotConnect:
        return CannotConnect(f"The relay {self._host}:{self._port} did not answer within {seconds:g} seconds.")

    async def _open_raw(self) -> tuple[trio.abc.Stream, bytes]:
        stream = await self._secure(self._raw_context)
        if stream.selected_alpn_protocol() != ALPN:
            await trio.aclose_forcefully(stream)
            raise Blocked(
                f"What answers at {self._host}:{self._port} is no Towpath relay, or a proxy in between changes the "
                "connection. Check the relay's address."
            )
        return stream, await self._certificate(stream)

    async def _open_websocket(self) -> tuple[trio.abc.Stream, bytes]:
        # Here, not above: few agents need it, and it takes memory.
        from protocol.websocket.core import Core, WebSocketRefused
        from protocol.websocket.paths import LINK_PATH
        from protocol.websocket.stream import open_stream

        stream = await self._secure(self._http_context)
        try:
            certificate = await self._certificate(stream)
            core = Core.client(self._host, self._port, LINK_PATH, trio.current_time())
            return await open_stream(stream, core), certificate
        except (WebSocketRefused, ProtocolError, trio.BrokenResourceError) as error:
            await trio.aclose_forcefully(stream)
            sentence = error.sentence if isinstance(error, TowpathError) else "The connection ended early."
            raise Blocked(f"WebSocket to the relay did not open: {sentence}") from error
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    async def _secure(self, context: ssl.SSLContext) -> Secured:
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                raw = await self._dial(self._host, self._port)
        except trio.TooSlowError as error:
            raise self._silent(CONNECT_TIMEOUT) from error
        except OSError as error:
            raise CannotConnect(
                f"The relay {self._host}:{self._port} cannot be reached: {reason_of(error)}."
            ) from error
        if isinstance(raw, trio.SocketStream):
            keep_alive(raw.socket)
            give_up_unacknowledged(raw.socket)
        stream = trio.SSLStream(raw, context, server_hostname=self._host, https_compatible=True)
        began = trio.current_time()
        if self.waits_since is None:
            self.waits_since = began
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(stream)
            refused = certificate_error(error)
            if refused is not None:
                raise CannotConnect(certificate_sentence(self._host, refused), code=CODE, who="you") from error
            # Who inspects cuts at once. A relay that has too many agents to greet lets them wait, and then sends them
            # away; they must not all come back inside WebSocket.
            kind = Blocked if trio.current_time() - began < INSPECTION else CannotConnect
            raise kind(f"The relay {self._host} broke the TLS handshake off.") from error
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _certificate(self, stream: Secured) -> bytes:
        certificate: bytes | None = stream.getpeercert(binary_form=True)
        if certificate is None:
            await trio.aclose_forcefully(stream)
            raise CannotConnect("The relay showed no certificate.")
        return certificate


def reason_of(error: OSError) -> str:
    """Why nothing was reached; trio keeps what became of each address in the error's cause."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    # Trio's own words name the address again, as Python writes it.
    words = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno and cause.errno > 0 else ""
    return words or getattr(cause, "strerror", None) or error.strerror or str(error)


def _drop(stream: trio.abc.Stream) -> None:
    """Close a connection that came too late, without a word."""
    transport = stream
    while not isinstance(transport, trio.SocketStream):
        transport = transport.transport_stream  # type: ignore[attr-defined] # of TLS
    transport.socket.close()
