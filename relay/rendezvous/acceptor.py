"""Takes a TLS connection that an agent opened, finds out who is calling, and registers the link while it lasts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import trio

from protocol.control import AgentHello, encode
from protocol.errors import ProtocolError, TowpathError
from protocol.keep_alive import give_up_unacknowledged, keep_alive
from protocol.link import (
    HELLO_PATH,
    MAX_HELLO,
    make_relay_hello,
    new_nonce,
    read_agent_hello_untrusted,
    verify_agent_hello_untrusted,
    watch_untrusted,
)
from protocol.reverse_http import Client, Limits, connect
from protocol.round_trip import round_trip
from protocol.ticket import TicketSigner
from protocol.websocket.stream import WebSocketStream
from relay.link_stream import LinkStream
from relay.proxies import Proxies
from relay.rendezvous.registry import Registry

_logger = logging.getLogger("towpath.rendezvous")

HELLO_TIMEOUT = 20.0
# An agent that was refused comes back no sooner than this, in seconds.
REFUSED_RETRY = 60.0
_NO_PROXIES = Proxies()
# Agents ping too, and every sign of life counts: a relay that waits a little longer hardly ever has to ping itself.
RELAY_LIMITS = Limits(ping_interval=32.0)


class NodeDirectory(Protocol):
    """Where the certificates of enrolled nodes are kept."""

    async def certificate_of(self, node_id: str) -> str | None:
        """The node's certificate as enrolled (PEM); None when there is no such node, or no longer."""


class LinkRefused(ProtocolError):
    """The caller could not show that it is an agent of this relay."""

    default_code = "LINK_REFUSED"


async def accept_link(
    stream: trio.abc.Stream,
    *,
    registry: Registry,
    nodes: NodeDirectory,
    signer: TicketSigner,
    channel: str,
    relay_id: str,
    version: str = "",
    stun_ports: Sequence[int] = (),
    limits: Limits = RELAY_LIMITS,
    clock: Callable[[], float] = time.time,
    proxies: Proxies = _NO_PROXIES,
) -> None:
    """Greet, verify, and hold the link in ``registry`` until it ends, then close ``stream``.

    ``channel`` is the hex SHA-256 of the relay's TLS certificate (DER), ``clock`` gives Unix seconds, ``proxies`` are
    the operator's reverse proxies, whose word counts for where a link comes from. Raises nothing for what the caller
    does: a refusal is logged and told to it.
    """
    if (sock := _socket_of(stream)) is not None:
        keep_alive(sock)
        give_up_unacknowledged(sock)
    async with connect(stream, limits=limits) as client:
        try:
            watch = registry.watch_least()
            hello = await _greet(client, nodes, signer, channel, relay_id, version, clock, stun_ports, watch)
        except TowpathError as error:
            _logger.warning("A link was refused: %s", error.sentence)
            client.close(error.sentence, retry_after=REFUSED_RETRY)
            return
        if hello.watch > 0:
            # A little later than the agent, who asks for both.
            client.watch(watch_untrusted(hello.watch) + 0.5)
        address, measure = _peer_of(stream, proxies)
        with registry.registered(hello.node_id, hello, client, address=address, measure=measure):
            _logger.info("Agent %s is linked.", hello.node_id)
            await client.closed.wait()
        reason = client.ending.sentence if client.ending is not None else ""
        _logger.info("The link of agent %s ended: %s", hello.node_id, reason)


def _socket_of(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    transport = stream
    while isinstance(transport, trio.SSLStream | LinkStream | WebSocketStream):
        transport = transport.transport_stream
    return transport.socket if isinstance(transport, trio.SocketStream) else None


def _peer_of(stream: trio.abc.Stream, proxies: Proxies) -> tuple[str, Callable[[], float | None]]:
    """Where a link comes from, and how to learn its round-trip time; nothing of both on streams without a socket."""
    sock = _socket_of(stream)
    if sock is None:
        return "", lambda: None
    try:
        name = sock.getpeername()
    except OSError:
        return "", lambda: None
    if not isinstance(name, tuple):
        return "", lambda: None
    address = str(name[0]).removeprefix("::ffff:").partition("%")[0]
    if proxies.trusts(address):
        # The kernel's round trip is the one to the proxy, which says nothing.
        told = stream.header(proxies.header) if isinstance(stream, WebSocketStream) else ()
        return proxies.origin_untrusted(address, told) or "", lambda: None
    return address, partial(round_trip, sock)


async def _greet(
    client: Client,
    nodes: NodeDirectory,
    signer: TicketSigner,
    channel: str,
    relay_id: str,
    version: str,
    clock: Callable[[], float],
    stun_ports: Sequence[int],
    watch: float,
) -> AgentHello:
    nonce = new_nonce()
    greeting = make_relay_hello(signer, channel=channel, nonce=nonce, now=clock(), version=version, watch=watch)
    greeting = msgspec.structs.replace(greeting, stun_ports=list(stun_ports))
    answer = await client.request(
        "POST",
        HELLO_PATH,
        headers=[(b"content-type", b"application/json")],
        body=encode(greeting),
        timeout=HELLO_TIMEOUT,
        max_body=MAX_HELLO,
    )
    if answer.status != 200:
        raise LinkRefused(f"The agent did not accept this relay's proof (status {answer.status}).")
    hello = read_agent_hello_untrusted(answer.body)
    certificate = await nodes.certificate_of(hello.node_id)
    if certificate is None:
        raise LinkRefused(
            "This relay does not know the agent, or its operator has revoked it. Set it up anew with a new setup key; "
            "`towpath setup` says whether its state directory has to be moved away first.",
            who="you",
        )
    verify_agent_hello_untrusted(hello, certificate=certificate, nonce=nonce, channel=channel, relay_id=relay_id)
    return hello
