"""The agent's link: dials the relay, serves it, and dials again whenever the connection ends."""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import trio
import trio.lowlevel

from agent.back_off import BackOff
from agent.link_gate import HelloGate
from protocol.control import RelayHello
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.identity import NodeKey
from protocol.keep_alive import give_up_unacknowledged, keep_alive
from protocol.link import ALPN, HelloFields, channel_of
from protocol.reverse_http import ASGIApplication, Ending, Limits, serve
from protocol.reverse_http.carrier import Carrier
from protocol.ticket import TicketVerifier

_logger = logging.getLogger("towpath.link")

Dial = Callable[[str, int], Awaitable[trio.abc.HalfCloseableStream]]

DIAL_TIMEOUT = 30.0
HELLO_TIMEOUT = 30.0
# The kernels at both ends notice at once when the way between them is gone (`protocol.keep_alive`). Pings are for what
# they cannot see, proxies on the way and processes that hang; each ping of thousands of agents is work for their relay.
LINK_LIMITS = Limits(ping_interval=25.0)


class CannotConnect(RetryLater):
    """The relay could not be reached or could not show that it is the one this agent is enrolled with."""

    default_code = "RELAY_UNREACHABLE"


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """The link as it is. ``since`` is Unix seconds of the last change, ``attempts`` counts dials since the start,
    ``last_error`` is a sentence for people, empty while connected."""

    connected: bool
    since: float
    attempts: int
    last_error: str
    relay_url: str


async def dial_tcp(host: str, port: int) -> trio.abc.HalfCloseableStream:
    """The plain way to the relay: TCP, all its addresses tried."""
    return await trio.open_tcp_stream(host, port)


class Link:
    """One agent's link to its relay.

    ``ca_pem`` is the relay's own CA, None when the system's trust decides. ``app`` answers the relay's requests; it
    sees none before the relay has proven itself. ``hello`` is asked at every link for what to tell; ``on_hello`` hears
    what the relay told, once it has proven itself; ``on_silence`` is called when the relay, or the way to it, has
    vanished without a word, as after a change of network. ``clock`` gives Unix seconds. ``dial`` opens the way to the
    relay (a proxy's place). Raises ValueError for an address that is none.
    """

    def __init__(
        self,
        relay_url: str,
        ca_pem: str | None,
        identity: NodeKey,
        node_id: str,
        endpoint_id: str,
        relay_id: str,
        relay_root: str,
        app: ASGIApplication,
        hello: Callable[[], HelloFields],
        clock: Callable[[], float] = time.time,
        *,
        dial: Dial = dial_tcp,
        on_hello: Callable[[RelayHello], None] = lambda _hello: None,
        on_silence: Callable[[], None] = lambda: None,
        limits: Limits = LINK_LIMITS,
        jitter: random.Random | None = None,
    ) -> None:
        self._url = relay_url
        self._host, self._port = _address(relay_url)
        self._context = _tls_context(ca_pem)
        self._identity = identity
        self._node_id = node_id
        self._endpoint_id = endpoint_id
        self._verifier = TicketVerifier(relay_id, relay_root)
        self._app = app
        self._hello = hello
        self._clock = clock
        self._dial = dial
        self._on_hello = on_hello
        self._on_silence = on_silence
        self._limits = limits
        self._back_off = BackOff(jitter or random.SystemRandom())
        self._connected = trio.Event()
        self._since = clock()
        self._attempts = 0
        self._last_error = ""
        self._kicked = trio.Event()
        self._carrier: Carrier | None = None

    def statistics(self) -> LinkStatistics:
        """The link at this moment."""
        return LinkStatistics(self._connected.is_set(), self._since, self._attempts, self._last_error, self._url)

    async def wait_connected(self) -> None:
        """Return once a relay that has proven itself is linked."""
        while not self._connected.is_set():
            await self._connected.wait()

    def kick(self) -> None:
        """Connect again at once (a changed network, a wake-up): drops a connection that stands, cuts a pause short."""
        self._kicked.set()
        if self._carrier is not None:
            self._carrier.close("The agent connects anew.")

    async def run(self) -> None:
        """Keep the link up until cancelled. Raises nothing for what networks and relays do."""
        while True:
            self._kicked = trio.Event()
            self._attempts += 1
            started = trio.current_time()
            lasted, retry_after = 0.0, None
            try:
                ending = await self._connect_once()
                lasted, retry_after = trio.current_time() - started, ending.retry_after
                self._down(ending.sentence)
                if ending.silent:
                    self._on_silence()
            except TowpathError as error:
                self._down(error.sentence)
            with trio.move_on_after(self._back_off.pause_after(lasted, retry_after)):
                await self._kicked.wait()
                self._back_off.forget()

    def _down(self, sentence: str) -> None:
        if self._connected.is_set():
            self._connected = trio.Event()
            self._since = self._clock()
        if sentence != self._last_error:
            _logger.warning("No link to the relay %s: %s", self._url, sentence)
        self._last_error = sentence

    def _up(self) -> None:
        self._connected.set()
        self._since = self._clock()
        self._last_error = ""
        _logger.info("Linked to the relay %s.", self._url)

    # --- one connection --------------------------------------------------------------------------------------

    async def _connect_once(self) -> Ending:
        stream = await self._open()
        certificate = stream.getpeercert(binary_form=True)
        if certificate is None:
            await trio.aclose_forcefully(stream)
            raise CannotConnect("The relay showed no certificate.")
        gate = HelloGate(
            self._app,
            identity=self._identity,
            node_id=self._node_id,
            endpoint_id=self._endpoint_id,
            verifier=self._verifier,
            channel=channel_of(certificate),
            fields=self._hello,
            clock=self._clock,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, gate)
            try:
                ending = await serve(stream, gate, limits=self._limits, on_carrier=self._carried)
            finally:
                self._carrier = None
            nursery.cancel_scope.cancel()
        if gate.refusal is not None:
            raise gate.refusal
        return ending

    def _carried(self, carrier: Carrier) -> None:
        self._carrier = carrier

    async def _watch(self, gate: HelloGate) -> None:
        """Mark the link up once the relay has proven itself, end it when it does not."""
        with trio.move_on_after(HELLO_TIMEOUT):
            await gate.decided.wait()
        if gate.proven:
            if gate.hello is not None:
                self._on_hello(gate.hello)
            self._up()
            return
        if gate.refusal is None:
            gate.refuse(ProtocolError(f"The relay did not greet this agent within {HELLO_TIMEOUT:g} seconds."))
        if self._carrier is not None and gate.refusal is not None:
            # Let the refusal itself reach the relay before the connection goes.
            await trio.lowlevel.checkpoint()
            self._carrier.close(gate.refusal.sentence)

    async def _open(self) -> trio.SSLStream[trio.abc.HalfCloseableStream]:
        with trio.move_on_after(DIAL_TIMEOUT):
            try:
                raw = await self._dial(self._host, self._port)
            except OSError as error:
                raise CannotConnect(f"The relay {self._host}:{self._port} cannot be reached: {error}.") from error
            if isinstance(raw, trio.SocketStream):
                keep_alive(raw.socket)
                give_up_unacknowledged(raw.socket)
            return await self._secure(raw)
        raise CannotConnect(f"The relay {self._host}:{self._port} did not answer within {DIAL_TIMEOUT:g} seconds.")

    async def _secure(self, raw: trio.abc.HalfCloseableStream) -> trio.SSLStream[trio.abc.HalfCloseableStream]:
        stream = trio.SSLStream(raw, self._context, server_hostname=self._host, https_compatible=True)
        try:
            await stream.do_handshake()
            chosen = stream.selected_alpn_protocol()
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(stream)
            raise CannotConnect(_handshake_sentence(self._host, error.__cause__)) from error
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        if chosen != ALPN:
            await trio.aclose_forcefully(stream)
            raise CannotConnect(
                f"What answers at {self._host}:{self._port} is no Towpath relay, or a proxy in between changes the "
                "connection. Check the relay's address."
            )
        return stream


def _handshake_sentence(host: str, cause: BaseException | None) -> str:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"The certificate shown for the relay {host} is not the expected one: {cause.verify_message}. If a proxy "
            "on this network opens encrypted connections, ask its operator to let those to the relay through untouched."
        )
    return f"The relay {host} broke the TLS handshake off."


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"The relay's address must be an https:// URL, not {url!r}.")
    return parts.hostname, parts.port or 443


def _tls_context(ca_pem: str | None) -> ssl.SSLContext:
    # With a pinned CA nothing else is trusted.
    context = ssl.create_default_context(cadata=ca_pem) if ca_pem else ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context
