"""The agent's link: dials the relay, serves it, and dials again whenever the connection ends."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import trio
import trio.lowlevel

from agent.back_off import BackOff
from agent.connect.link_connection import Dial, LinkConnector
from agent.connect.relay_way import RelayWay
from agent.link_gate import HelloGate
from protocol.control import RelayHello
from protocol.errors import ProtocolError, TowpathError
from protocol.identity import NodeKey
from protocol.link import HelloFields, channel_of
from protocol.reverse_http import ASGIApplication, Ending, Limits, serve
from protocol.reverse_http.carrier import Carrier
from protocol.ticket import TicketVerifier

_logger = logging.getLogger("towpath.link")

HELLO_TIMEOUT = 30.0
# A relay that has taken a connection and says nothing for so long (seconds) is said to let this agent wait.
WORTH_TELLING = 2.0
# A relay that refuses this agent hears of it first, and ends the connection within this (seconds); one that accepts it
# asks something, mostly at once.
ACCEPTED_AFTER = 1.0
# The kernels at both ends notice at once when the way between them is gone (`protocol.keep_alive`). Pings are for what
# they cannot see, proxies on the way and processes that hang; each ping of thousands of agents is work for their relay.
LINK_LIMITS = Limits(ping_interval=25.0)


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """The link as it is. ``since`` is Unix seconds of the last change, ``attempts`` counts dials since the start,
    ``last_error`` is a sentence for people on why there is none, empty while connected: the last failure, or that the
    relay lets this agent wait at this moment."""

    connected: bool
    since: float
    attempts: int
    last_error: str
    relay_url: str
    # How the connection is wrapped: raw, or inside WebSocket; empty before the first one.
    wrapping: str = ""


async def dial_tcp(host: str, port: int) -> trio.abc.HalfCloseableStream:
    """The plain way to the relay: TCP, all its addresses tried."""
    return await trio.open_tcp_stream(host, port)


class Link:
    """One agent's link to its relay.

    ``ca_pem`` is the relay's own CA, None when the system's trust decides. ``app`` answers the relay's requests; it
    sees none before the relay has proven itself. ``hello`` is asked at every link for what to tell; ``on_hello`` hears
    what the relay told, once it has proven itself; ``on_silence`` is called when the relay, or the way to it, has
    vanished without a word, as after a change of network. ``clock`` gives Unix seconds. ``dial`` opens the way to the
    relay (a proxy's place), ``way`` chooses how it is wrapped (None: raw), ``is_proxied``
    says whether something on it answers in the relay's place. Raises ValueError for an address that is
    none.
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
        way: RelayWay | None = None,
        is_proxied: Callable[[], bool] = lambda: False,
        on_hello: Callable[[RelayHello], None] = lambda _hello: None,
        on_silence: Callable[[], None] = lambda: None,
        limits: Limits = LINK_LIMITS,
        jitter: random.Random | None = None,
    ) -> None:
        self._url = relay_url
        self._host, self._port = _address(relay_url)
        self._connector = LinkConnector(self._host, self._port, ca_pem, dial, way or RelayWay("raw"))
        self._wrapping = ""
        self._is_proxied = is_proxied
        self._identity = identity
        self._node_id = node_id
        self._endpoint_id = endpoint_id
        self._verifier = TicketVerifier(relay_id, relay_root)
        self._app = app
        self._hello = hello
        self._clock = clock
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
        # Since when (trio's clock) a connection that is made waits for the relay's word.
        self._greeted_since: float | None = None

    def statistics(self) -> LinkStatistics:
        """The link at this moment."""
        sentence = "" if self._connected.is_set() else self._waits() or self._last_error
        return LinkStatistics(
            self._connected.is_set(), self._since, self._attempts, sentence, self._url, self._wrapping
        )

    def _waits(self) -> str:
        """That the relay has our connection and does not go on with it, as when all agents come back to it at once."""
        since = self._connector.waits_since or self._greeted_since
        waited = 0.0 if since is None else trio.current_time() - since
        if waited < WORTH_TELLING:
            return ""
        before = f" Before that: {self._last_error}" if self._last_error else ""
        return (
            f"The relay {self._host} has taken this agent's connection and lets it wait for its turn, for "
            f"{waited:.0f} s so far. After its start it has many agents to greet; each has its turn, or is sent away "
            f"to come again, within 45 s.{before}"
        )

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
            except OSError as error:
                # No descriptor for what is loaded or read on the way, for example.
                self._down(f"The link could not be begun: {error.strerror or error}.")
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
        self._greeted_since = None
        self._since = self._clock()
        self._last_error = ""
        _logger.info("Linked to the relay %s.", self._url)

    # --- one connection --------------------------------------------------------------------------------------

    async def _connect_once(self) -> Ending:
        connection = await self._connector.open()
        self._wrapping = connection.way
        gate = HelloGate(
            self._app,
            identity=self._identity,
            node_id=self._node_id,
            endpoint_id=self._endpoint_id,
            verifier=self._verifier,
            channel=channel_of(connection.certificate),
            fields=self._hello,
            clock=self._clock,
            blind=connection.way == "websocket" or self._is_proxied(),
        )
        self._greeted_since = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, gate)
            try:
                ending = await serve(connection.stream, gate, limits=self._limits, on_carrier=self._carried)
            finally:
                self._carrier = self._greeted_since = None
            nursery.cancel_scope.cancel()
        if gate.refusal is not None:
            raise gate.refusal
        return ending

    def _carried(self, carrier: Carrier) -> None:
        self._carrier = carrier

    async def _watch(self, gate: HelloGate) -> None:
        """Mark the link up once the relay has proven itself and accepts this agent, end it when it does not."""
        with trio.move_on_after(HELLO_TIMEOUT):
            await gate.decided.wait()
        if gate.proven:
            if gate.hello is not None:
                self._on_hello(gate.hello)
            if gate.watch and self._carrier is not None:
                self._carrier.watch(gate.watch)
            with trio.move_on_after(ACCEPTED_AFTER):
                await gate.used.wait()
            self._up()
            return
        if gate.refusal is None:
            gate.refuse(ProtocolError(f"The relay did not greet this agent within {HELLO_TIMEOUT:g} seconds."))
        if self._carrier is not None and gate.refusal is not None:
            # Let the refusal itself reach the relay before the connection goes.
            await trio.lowlevel.checkpoint()
            self._carrier.close(gate.refusal.sentence)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"The relay's address must be an https:// URL, not {url!r}.")
    return parts.hostname, parts.port or 443
