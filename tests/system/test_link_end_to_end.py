"""Dispatcher, acceptor, registry and the agent's link together, over real sockets and TLS."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from agent.link import Link
from protocol.errors import ItemFailed
from protocol.identity import NodeKey
from protocol.link import HelloFields, channel_of
from protocol.ticket import RelayRoot, TicketSigner
from relay.dispatch import Dispatcher
from relay.listen import accept_all
from relay.rendezvous.acceptor import accept_link
from relay.rendezvous.registry import CallTimeout, NodeOffline, Registry

RELAY = "00000000-0000-4000-8000-00000000000a"
NODE = "11111111-1111-4111-8111-111111111111"
ENDPOINT = "33333333-3333-4333-8333-333333333333"

IDENTITY = NodeKey.generate()
ROOT = RelayRoot.generate()
KEY = Ed25519PrivateKey.generate()
SIGNER = TicketSigner(RELAY, KEY, ROOT.certify(KEY.public_key(), "k", time.time() - 10, time.time() + 9999), "k")
CA = trustme.CA()
LEAF = CA.issue_cert("localhost")


async def listing(request: Request) -> Response:
    entries = [{"name": f"file{n}", "size": n} for n in range(int(request.query_params["limit"]))]
    return JSONResponse({"path": request.path_params["path"], "entries": entries})


async def missing(request: Request) -> Response:
    return JSONResponse(ItemFailed("There is no such file.", code="NOT_FOUND").to_document(), status_code=404)


async def hangs(request: Request) -> Response:
    await trio.sleep_forever()
    return Response()


class Endless:
    """A body without end. No generator: Starlette would leave one unfinished when its reader goes."""

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(64 * 1024)


async def endless(request: Request) -> Response:
    return StreamingResponse(Endless())


async def keep(request: Request) -> Response:
    return JSONResponse({"size": len(await request.body())}, status_code=202)


APP = Starlette(
    routes=[
        Route("/link/ls/{path:path}", listing),
        Route("/link/missing", missing),
        Route("/link/hangs", hangs),
        Route("/link/endless", endless),
        Route("/link/tasks/{id}", keep, methods=["PUT"]),
    ]
)


class Directory:
    async def certificate_of(self, node_id: str) -> str | None:
        await trio.lowlevel.checkpoint()
        return IDENTITY.certificate_pem if node_id == NODE else None


async def web(stream: trio.SSLStream[trio.SocketStream]) -> None:
    await stream.receive_some(1000)
    await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")


def server_context(leaf: trustme.LeafCert = LEAF) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    return context


def accept(registry: Registry) -> Callable[[trio.SSLStream[trio.SocketStream]], Awaitable[None]]:
    channel = channel_of(ssl.PEM_cert_to_DER_cert(LEAF.cert_chain_pems[0].bytes().decode()))

    async def handler(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await accept_link(stream, registry=registry, nodes=Directory(), signer=SIGNER, channel=channel, relay_id=RELAY)

    return handler


@asynccontextmanager
async def relay(registry: Registry, port: int = 0) -> AsyncIterator[int]:
    """A relay's port; its number."""
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            dispatcher = Dispatcher(web=web, link=accept(registry), tls_context=server_context())
            await accept_all(listeners, dispatcher.handle, nursery)

        nursery.start_soon(serve)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()


def make_link(port: int, ca: trustme.CA = CA, **changes: Any) -> Link:
    options: dict[str, Any] = {
        "relay_url": f"https://localhost:{port}",
        "ca_pem": ca.cert_pem.bytes().decode(),
        "identity": IDENTITY,
        "node_id": NODE,
        "endpoint_id": ENDPOINT,
        "relay_id": RELAY,
        "relay_root": ROOT.public_pem,
        "app": APP,
        "hello": lambda: HelloFields(version="1", last_event=3),
        "jitter": random.Random(0),
    }
    return Link(**(options | changes))


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Registry, Link]]:
    registry = Registry()
    async with relay(registry) as port, trio.open_nursery() as nursery:
        link = make_link(port)
        nursery.start_soon(link.run)
        with trio.fail_after(10):
            await link.wait_connected()
            async with registry.changes() as changes:
                await changes.receive()
        yield registry, link
        nursery.cancel_scope.cancel()


async def test_calls_answers_errors_and_streams_pass_through_the_link() -> None:
    async with linked() as (registry, link):
        assert registry.connected()[NODE].last_event == 3
        body = await registry.call(NODE, "GET", "/link/ls/a b/ü", query=[("limit", "20000")])
        document = msgspec.json.decode(body)
        assert (document["path"], len(document["entries"])) == ("a b/ü", 20_000)
        order = {"task_id": "t", "items": ["x" * 100] * 20_000}
        answer = await registry.call(NODE, "PUT", "/link/tasks/t", document=order)
        assert msgspec.json.decode(answer)["size"] == len(msgspec.json.encode(order))
        with pytest.raises(ItemFailed) as caught:
            await registry.call(NODE, "GET", "/link/missing")
        assert (caught.value.code, caught.value.status) == ("NOT_FOUND", 404)
        async with registry.stream(NODE, "/link/endless") as chunks:
            read = 0
            while read < 5_000_000:
                read += len(await anext(chunks))
        assert link.statistics().connected


async def test_time_outs_and_abandoned_answers_leave_the_link_as_it_was() -> None:
    async with linked() as (registry, link):
        for _ in range(20):
            with pytest.raises(CallTimeout):
                await registry.call(NODE, "GET", "/link/hangs", timeout=0.02)
            async with registry.stream(NODE, "/link/endless") as chunks:
                await anext(chunks)
        for _ in range(200):
            await registry.call(NODE, "GET", "/link/ls/x", query=[("limit", "1")])
        assert link.statistics().attempts == 1
        assert registry.statistics().connected == 1


async def test_the_agent_comes_back_when_the_relay_does() -> None:
    registry = Registry()
    async with trio.open_nursery() as nursery:
        async with relay(registry) as port:
            link = make_link(port)
            nursery.start_soon(link.run)
            with trio.fail_after(10):
                await link.wait_connected()
        with trio.fail_after(10):
            while link.statistics().connected:
                await trio.sleep(0.01)
        assert not registry.is_connected(NODE)
        with pytest.raises(NodeOffline):
            await registry.call(NODE, "GET", "/link/missing")
        async with relay(registry, port):
            link.kick()
            with trio.fail_after(20):
                await link.wait_connected()
                while not registry.is_connected(NODE):
                    await trio.sleep(0.01)
            assert await registry.call(NODE, "GET", "/link/ls/x", query=[("limit", "1")])
            nursery.cancel_scope.cancel()


async def test_a_proxy_that_the_machine_trusts_but_that_reads_along_is_refused() -> None:
    """TLS is terminated in between with a certificate the agent's machine accepts; only the channel gives it away."""
    registry = Registry()
    office = trustme.CA()

    async with relay(registry) as port, trio.open_nursery() as nursery:

        async def intercept(inside: trio.SSLStream[trio.SocketStream]) -> None:
            context = ssl.create_default_context()
            CA.configure_trust(context)
            context.set_alpn_protocols(["towpath-link/1"])
            outside = await trio.open_ssl_over_tcp_stream("localhost", port, ssl_context=context, https_compatible=True)
            async with outside, trio.open_nursery() as pumps:

                async def pump(source: Any, sink: Any) -> None:
                    try:
                        while data := await source.receive_some(65536):
                            await sink.send_all(data)
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        pass
                    pumps.cancel_scope.cancel()

                pumps.start_soon(pump, inside, outside)
                pumps.start_soon(pump, outside, inside)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy_port = listeners[0].socket.getsockname()[1]
        context = server_context(office.issue_cert("localhost"))

        async def proxy() -> None:
            dispatcher = Dispatcher(web=web, link=intercept, tls_context=context)
            await accept_all(listeners, dispatcher.handle, nursery)

        nursery.start_soon(proxy)
        link = make_link(proxy_port, office)
        nursery.start_soon(link.run)
        with trio.fail_after(10):
            while not link.statistics().last_error:
                await trio.sleep(0.01)
        assert "intercepts" in link.statistics().last_error
        assert not link.statistics().connected
        assert registry.statistics().links == 0
        nursery.cancel_scope.cancel()


async def test_two_machines_with_one_key_the_later_one_wins_and_the_other_waits() -> None:
    registry = Registry()
    async with relay(registry) as port, trio.open_nursery() as nursery:
        first, second = make_link(port), make_link(port)
        nursery.start_soon(first.run)
        with trio.fail_after(10):
            await first.wait_connected()
            while not registry.is_connected(NODE):
                await trio.sleep(0.01)
            nursery.start_soon(second.run)
            await second.wait_connected()
            while first.statistics().connected:
                await trio.sleep(0.01)
        assert "took the place" in first.statistics().last_error
        await trio.sleep(0.2)
        assert second.statistics().connected
        assert registry.statistics().replaced == 1
        nursery.cancel_scope.cancel()
