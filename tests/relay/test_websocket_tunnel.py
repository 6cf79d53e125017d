"""The tunnel inside WebSocket, end to end over real sockets and processes: joined, moved, half-closed, held back."""

from __future__ import annotations

import random
import ssl

import psutil
import pytest
import trio

from protocol.errors import TowpathError
from protocol.websocket.orders import ALPN
from tests.relay.test_tunnel import no_pairs, pass_both_ways, read_all
from tests.relay.tunnel_world import CA, SESSION, USER, TunnelWorld, tunnel_world

UPGRADE = (
    b"GET /towpath/v1/websocket/tunnel HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: towpath-stream.1\r\n"
)


@pytest.mark.parametrize(("inside", "handed_over"), [(2, True), (1, True), (2, False)])
async def test_bytes_pass_both_ways_and_each_way_ends_by_itself(inside: int, handed_over: bool) -> None:
    content = random.Random(1).randbytes(3_000_000)
    async with tunnel_world(websocket=inside, handed_over=handed_over) as world:
        with trio.fail_after(30):
            async with world.pair() as (source, destination):
                await pass_both_ways(source, destination, content)
                await no_pairs(world)
        assert world.service.statistics().outcomes == {"closed": 1}
        assert world.relay.statistics().carried == (inside if handed_over else 0)


async def test_a_receiver_that_takes_nothing_holds_the_sender_back() -> None:
    async with tunnel_world(websocket=2) as world, world.pair() as (source, destination):
        sent = 0
        with trio.move_on_after(1.0):
            while True:
                await source.send_all(bytes(64 * 1024))
                sent += 64 * 1024
        # Buffers of five sockets, nothing that grows.
        assert sent < 64 * 1024 * 1024
        for child in psutil.Process().children():
            if child.status() != psutil.STATUS_ZOMBIE and "protocol.websocket.process" in child.cmdline():
                assert child.memory_info().rss < 100 * 1024 * 1024
        # The receiver wakes up and gets everything, in order.
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.send_eof)
                received = await read_all(destination)
        assert len(received) >= sent
        assert not any(received)


async def test_when_one_side_goes_the_other_is_told() -> None:
    async with tunnel_world(websocket=2) as world, world.pair() as (source, destination):
        await source.aclose()
        with trio.fail_after(10):
            assert await destination.receive_some() == b""
            await destination.aclose()
            await no_pairs(world)


async def test_a_token_counts_once_and_only_here() -> None:
    async with tunnel_world(websocket=2) as world:
        tokens = world.service.issue(SESSION, USER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_enter, world, tokens[0])
            nursery.start_soon(_enter, world, tokens[1])
        for token in (tokens[0], "nonsense"):
            with pytest.raises(TowpathError), trio.fail_after(10):
                await world.enter(token, websocket=True)


async def _enter(world: TunnelWorld, token: str) -> None:
    await (await world.enter(token, websocket=True)).aclose()


STRANGERS = [
    (b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", b"HTTP/1.1 404"),
    (b"GET /towpath/v1/websocket/link HTTP/1.1\r\nHost: relay\r\n\r\n", b"HTTP/1.1 404"),
    (b"GET /towpath/v1/websocket/tunnel HTTP/1.1\r\nHost: relay\r\n\r\n", b"HTTP/1.1 426"),
    (UPGRADE + b"Origin: https://page.example\r\n\r\n", b"HTTP/1.1 403"),
    (UPGRADE + b"\r\n" + b"\x82\x05hello", b"HTTP/1.1 101"),
    (b"\x00" * 100_000, b""),
]


async def test_callers_that_are_no_agents_are_turned_away_and_closed() -> None:
    async with tunnel_world(websocket=2) as world:
        context = ssl.create_default_context(cadata=CA.cert_pem.bytes().decode())
        context.set_alpn_protocols(list(ALPN))
        for said, answer in STRANGERS:
            raw = await trio.open_tcp_stream("127.0.0.1", world.port)
            stream = trio.SSLStream(raw, context, server_hostname="localhost", https_compatible=True)
            heard = b""
            with trio.fail_after(10):
                try:
                    await stream.send_all(said)
                    while data := await stream.receive_some():
                        heard += bytes(data)
                except trio.BrokenResourceError:
                    pass
            await trio.aclose_forcefully(stream)
            assert heard.startswith(answer), said
        # Nobody else is concerned.
        async with world.pair() as (a, b):
            await a.send_all(b"mine")
            assert await b.receive_some() == b"mine"
        assert world.relay.statistics().restarts == 0


@pytest.mark.soak
async def test_a_carrying_process_that_is_killed_is_replaced() -> None:
    async with tunnel_world(websocket=2) as world:
        async with world.pair() as (source, destination):
            for child in psutil.Process().children():
                if child.status() != psutil.STATUS_ZOMBIE and "protocol.websocket.process" in child.cmdline():
                    child.kill()
            with trio.fail_after(10):
                assert await destination.receive_some() == b""
            await source.aclose()
        with trio.fail_after(20):
            while True:
                try:
                    async with world.pair() as (a, b):
                        await a.send_all(b"again")
                        if await b.receive_some() == b"again":
                            break
                except* (TowpathError, trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                await trio.sleep(0.05)
