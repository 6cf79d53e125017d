"""A link and a tunnel through a real nginx that ends TLS in front of the relay, as docs/relay-networks.md has it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent.connect.relay_way import RelayWay
from agent.connect.tunnel import enter_websocket
from protocol.link import channel_of
from protocol.websocket.carrier import Carrier
from relay.dispatch import Dispatcher
from relay.proxies import Proxies
from relay.rendezvous.acceptor import accept_link
from relay.rendezvous.registry import Registry
from relay.upgrade import Upgrade
from tests.relay.tunnel_world import CA as TUNNEL_CA
from tests.relay.tunnel_world import LEAF as TUNNEL_LEAF
from tests.relay.tunnel_world import SESSION, USER, dial, tunnel_world
from tests.system.test_link_end_to_end import CA, LEAF, NODE, RELAY, SIGNER, Directory, make_link, server_context, web

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed (Debian: nginx-light)")

CONFIGURATION = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {directory}/relay.pem;
        ssl_certificate_key {directory}/relay.pem;
        location / {{
            proxy_pass https://127.0.0.1:{relay};
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $http_connection;
            proxy_set_header X-Forwarded-For 198.51.100.7;
            proxy_request_buffering off;
            proxy_buffering off;
        }}
{more}
    }}
}}
"""


TUNNELS = """
        location = /towpath/v1/websocket/tunnel {{
            proxy_pass https://127.0.0.1:{relay};
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $http_connection;
            proxy_ssl_server_name on;
            proxy_ssl_name tunnel.towpath.internal;
            proxy_buffering off;
            proxy_buffer_size 64k;
            proxy_buffers 8 64k;
        }}
"""


@asynccontextmanager
async def nginx(directory: Path, relay: int, certificate: bytes, more: str = "") -> AsyncIterator[int]:
    """A running nginx; its port. ``more`` stands in its server block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (directory / "relay.pem").write_bytes(certificate)
    file = directory / "nginx.conf"
    file.write_text(CONFIGURATION.format(directory=directory, port=port, relay=relay, more=more.format(relay=relay)))
    process = await trio.lowlevel.open_process(
        [NGINX, "-p", str(directory), "-e", "stderr", "-c", str(file)], stdin=subprocess.DEVNULL
    )
    try:
        with trio.fail_after(10):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.02)
        yield port
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_a_link(tmp_path: Path) -> None:
    registry = Registry()
    channel = channel_of(ssl.PEM_cert_to_DER_cert(LEAF.cert_chain_pems[0].bytes().decode()))

    async def handler(stream: trio.abc.Stream) -> None:
        await accept_link(
            stream,
            registry=registry,
            nodes=Directory(),
            signer=SIGNER,
            channel=channel,
            relay_id=RELAY,
            proxies=Proxies(["127.0.0.0/8"]),
        )

    dispatcher = Dispatcher(web=Upgrade(web, handler, None).serve, link=handler, tls_context=server_context())
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, dispatcher.handle, [listener])
        pem = LEAF.private_key_and_cert_chain_pem.bytes()
        async with nginx(tmp_path, listener.socket.getsockname()[1], pem) as port:
            link = make_link(port, CA, way=RelayWay())
            nursery.start_soon(link.run)
            with trio.fail_after(15):
                await link.wait_connected()
                while not registry.connected():
                    await trio.sleep(0.01)
                assert link.statistics().wrapping == "websocket"
                assert registry.address(NODE) == "198.51.100.7"
                await registry.call(NODE, "GET", "/link/ls/x", query=[("limit", "20000")])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("more", ["", TUNNELS])
async def test_a_tunnel(tmp_path: Path, more: str) -> None:
    content = bytes(range(256)) * 20_000
    authority = TUNNEL_CA.cert_pem.bytes().decode()
    shown = TUNNEL_LEAF.private_key_and_cert_chain_pem.bytes()
    async with tunnel_world(websocket=1) as world, nginx(tmp_path, world.port, shown, more) as port:
        tokens = world.service.issue(SESSION, USER)
        carrier: Carrier = world.agents

        async def inside() -> None:
            entry = await enter_websocket(dial, "localhost", port, authority, carrier)
            sock = await entry.join(tokens[0])
            async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
                await stream.send_all(content)
                await stream.send_eof()
                assert await stream.receive_some() == b"thanks"

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(inside)
                async with await world.enter(tokens[1]) as peer:
                    received = bytearray()
                    while chunk := await peer.receive_some():
                        received += chunk
                    assert received == content
                    await peer.send_all(b"thanks")
                    await peer.send_eof()
        # With a location of its own, the carrying process has it from the first byte on; else the relay itself.
        assert world.dispatcher.statistics().websocket == (1 if more else 0)
        assert world.dispatcher.statistics().web == (0 if more else 1)
