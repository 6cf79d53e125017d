"""A relay's port with a tunnel behind it, over real sockets, TLS and the real moving process."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.connect.tunnel import enter_websocket, open_tunnel, tunnel_context
from protocol.ticket import RelayRoot, TicketSigner
from protocol.websocket.carrier import Carrier
from relay.dispatch import Dispatcher
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.service import TunnelService
from relay.rendezvous.tunnel.websocket import WebSocketTunnels
from relay.upgrade import Replayed, Upgrade

RELAY = "00000000-0000-4000-8000-00000000000a"
SESSION = "22222222-2222-4222-8222-222222222222"
USER = "44444444-4444-4444-8444-444444444444"
ROOT = RelayRoot.generate()
KEY = Ed25519PrivateKey.generate()
SIGNER = TicketSigner(RELAY, KEY, ROOT.certify(KEY.public_key(), "k", time.time() - 10, time.time() + 99999), "k")
CA = trustme.CA()
LEAF = CA.issue_cert("localhost")


@dataclass
class TunnelWorld:
    """The service, its port, and the agents' view of it."""

    service: TunnelService
    dispatcher: Dispatcher
    port: int
    # What carries WebSocket for the agents, and how many of the two sides are in it.
    agents: Carrier
    relay: Carrier
    inside: int = 0

    def context(self) -> ssl.SSLContext:
        return tunnel_context(CA.cert_pem.bytes().decode())

    async def enter(self, token: str, *, websocket: bool = False) -> trio.SocketStream:
        """Be one side of a tunnel."""
        if websocket:
            pem = CA.cert_pem.bytes().decode()
            sock = await (await enter_websocket(dial, "localhost", self.port, pem, self.agents)).join(token)
        else:
            sock = await open_tunnel(dial, "localhost", self.port, self.context(), token)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    @asynccontextmanager
    async def pair(
        self, session: str = SESSION, user: str = USER
    ) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
        """Both sides of a new tunnel: source, destination."""
        async with await self.enter_both(self.service.issue(session, user)) as ends:
            yield ends

    async def enter_both(
        self, offers: tuple[str, str]
    ) -> AbstractAsyncContextManager[tuple[trio.SocketStream, trio.SocketStream]]:
        """Both sides with these tokens."""
        ends: dict[int, trio.SocketStream] = {}

        async def enter(number: int) -> None:
            ends[number] = await self.enter(offers[number], websocket=number < self.inside)

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(enter, number)
        return _both(ends[0], ends[1])


@asynccontextmanager
async def _both(
    source: trio.SocketStream, destination: trio.SocketStream
) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    async with source, destination:
        yield source, destination


async def dial(host: str, port: int) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port)


async def _nobody(stream: trio.abc.Stream | Replayed) -> None:
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def tunnel_world(
    limits: TunnelLimits = TunnelLimits(),  # noqa: B008 - immutable
    *,
    processes: int = 1,
    max_pairs: int = 2000,
    signer: TicketSigner = SIGNER,
    websocket: int = 0,
    handed_over: bool = True,
) -> AsyncIterator[TunnelWorld]:
    service = TunnelService(signer, ROOT.public_pem, limits, processes=processes, max_pairs=max_pairs)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    LEAF.configure_cert(context)
    relay, agents = service.carrier, Carrier()
    tunnels = WebSocketTunnels(service.acceptor, relay)
    dispatcher = Dispatcher(
        web=Upgrade(_nobody, _nobody, tunnels.carry).serve,
        link=_nobody,
        tunnel=service.acceptor.accept,
        tls_context=context,
        websocket=lambda: tunnels.take if handed_over else None,
    )
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    with LEAF.private_key_and_cert_chain_pem.tempfile() as certificate:
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            if websocket:
                await relay.serve(certificate, None)
                nursery.start_soon(relay.run)
                nursery.start_soon(agents.run)
            nursery.start_soon(trio.serve_listeners, dispatcher.handle, [listener])
            yield TunnelWorld(service, dispatcher, port, agents, relay, websocket)
            nursery.cancel_scope.cancel()
