"""What an agent finds when it dials its relay, over TLS in memory and with a virtual clock."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.link import Link
from protocol.control import CollectionReport, RelayHello, encode
from protocol.identity import NodeKey
from protocol.link import (
    ALPN,
    HELLO_PATH,
    HelloFields,
    channel_of,
    make_relay_hello,
    new_nonce,
)
from protocol.reverse_http import Client, LinkLost, Response, connect
from protocol.ticket import RelayRoot, TicketSigner

NOW = 1_800_000_000.0
RELAY = "00000000-0000-4000-8000-00000000000a"
NODE = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
ENDPOINT = "33333333-3333-4333-8333-333333333333"
HOST = "relay.example"

IDENTITY = NodeKey.generate()
ROOT = RelayRoot.generate()
CA = trustme.CA()
CERTIFICATE = CA.issue_cert(HOST)
CA_PEM = CA.cert_pem.bytes().decode()


def signer_for(root: RelayRoot, relay_id: str = RELAY, life: float = 86_400) -> TicketSigner:
    key = Ed25519PrivateKey.generate()
    return TicketSigner(relay_id, key, root.certify(key.public_key(), "k1", NOW - 10, NOW + life), "k1")


SIGNER = signer_for(ROOT)


def channel() -> str:
    return channel_of(ssl.PEM_cert_to_DER_cert(CERTIFICATE.cert_chain_pems[0].bytes().decode()))


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """The application that the relay must not reach before it has proven itself."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"behind the gate"})


class FakeRelay:
    """What the agent finds when it dials: `serve` is run with a client on every connection."""

    def __init__(self, serve: Callable[[Client], Any], *, certificate: trustme.LeafCert = CERTIFICATE) -> None:
        self.serve = serve
        self.alpn = ALPN
        self.certificate = certificate
        self.dialled: list[float] = []
        self.reachable = True
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as self._nursery:
            yield
            self._nursery.cancel_scope.cancel()

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        assert (host, port) == (HOST, 8443)
        self.dialled.append(trio.current_time())
        if not self.reachable:
            raise OSError("no route")
        ours, theirs = trio.testing.memory_stream_pair()
        assert self._nursery is not None
        self._nursery.start_soon(self._accept, theirs)
        return ours

    async def _accept(self, raw: trio.testing.MemorySendStream) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.certificate.configure_cert(context)
        context.set_alpn_protocols([self.alpn])
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError:
            return
        async with connect(stream) as client:
            try:
                await self.serve(client)
            except LinkLost:
                return


def link_to(relay: FakeRelay, **changes: Any) -> Link:
    options: dict[str, Any] = {
        "relay_url": f"https://{HOST}:8443",
        "ca_pem": CA_PEM,
        "identity": IDENTITY,
        "node_id": NODE,
        "endpoint_id": ENDPOINT,
        "relay_id": RELAY,
        "relay_root": ROOT.public_pem,
        "app": behind,
        "hello": lambda: HelloFields(version="5", collections=(CollectionReport(id="c", name="n"),)),
        "clock": lambda: NOW,
        "dial": relay.dial,
        "jitter": random.Random(1),
    }
    return Link(**(options | changes))


@asynccontextmanager
async def running(relay: FakeRelay, **changes: Any) -> AsyncIterator[Link]:
    link = link_to(relay, **changes)
    async with relay.running(), trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        yield link
        nursery.cancel_scope.cancel()


def good_hello(**changes: Any) -> RelayHello:
    return make_relay_hello(SIGNER, **({"channel": channel(), "nonce": new_nonce(), "now": NOW} | changes))


async def greet(client: Client, hello: RelayHello) -> Response:
    return await client.request("POST", HELLO_PATH, body=encode(hello))


async def greet_and_stay(client: Client) -> None:
    assert (await greet(client, good_hello())).status == 200
    await client.closed.wait()
