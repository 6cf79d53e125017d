"""The tunnel inside WebSocket, end to end over real sockets and processes: joined, moved, half-closed, held back."""

from __future__ import annotations

import random
import ssl
import uuid
from typing import Any

import psutil
import pytest
import trio
import trio.testing

from protocol.errors import TowpathError
from protocol.websocket.line import DEAD
from protocol.websocket.orders import ALPN
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.websocket import WebSocketTunnels
from tests.relay.tunnel_ends import (
    count_until_broken,
    no_pairs,
    pass_both_ways,
    send_for_ever,
    send_until_held_back,
    wake_up,
)
from tests.relay.tunnel_world import CA, SESSION, USER, TunnelWorld, tunnel_world

SILENCE = DEAD + 3
# The agents' and the relay's.
CARRIERS = {"protocol.websocket.process", "relay.rendezvous.tunnel.websocket_process"}

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


async def test_those_that_wait_to_be_handed_over_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        waiting = 0

        async def carry(self, *_what: object) -> int:
            self.waiting += 1
            await trio.sleep_forever()
            raise AssertionError

    monkeypatch.setattr("relay.rendezvous.tunnel.websocket.MAX_PENDING", 8)
    busy: Any = Busy()
    async with tunnel_world() as world, trio.open_nursery() as nursery:
        tunnels = WebSocketTunnels(world.service.acceptor, busy)

        async def come(address: str) -> None:
            ours, theirs = trio.socket.socketpair()
            monkeypatch.setattr(ours, "getpeername", lambda: (address, 1))
            with theirs:
                async with trio.SocketStream(ours) as stream:
                    await tunnels.take(stream)

        for _ in range(10):
            nursery.start_soon(come, "192.0.2.1")
        await trio.testing.wait_all_tasks_blocked()
        # Not all places are one caller's, who has shown nothing yet.
        assert busy.waiting == 6
        for n in range(4):
            nursery.start_soon(come, f"192.0.2.{2 + n}")
        await trio.testing.wait_all_tasks_blocked()
        assert busy.waiting == 8
        nursery.cancel_scope.cancel()
    assert tunnels._places.taken == 0


async def test_a_receiver_that_takes_nothing_holds_the_sender_back() -> None:
    async with tunnel_world(websocket=2) as world, world.pair() as (source, destination):
        sent = await send_until_held_back(source)
        # Buffers of five sockets, nothing that grows.
        assert sent < 64 * 1024 * 1024
        for child in psutil.Process().children():
            if child.status() != psutil.STATUS_ZOMBIE and CARRIERS & set(child.cmdline()):
                assert child.memory_info().rss < 100 * 1024 * 1024
        await wake_up(source, destination, sent)


@pytest.mark.parametrize("inside", [1, 2])
async def test_an_amount_is_enforced_in_mid_stream(inside: int) -> None:
    amount = 3_000_000
    async with tunnel_world(TunnelLimits(session_bytes=amount), websocket=inside) as world:
        async with world.pair() as (source, destination), trio.open_nursery() as nursery:
            nursery.start_soon(send_for_ever, source)
            with trio.fail_after(10):
                received = await count_until_broken(destination)
            assert 0 < received <= amount
            await no_pairs(world)
        assert world.service.statistics().outcomes == {"session quota": 1}
        assert world.service.statistics().moved <= amount


async def test_a_rate_is_kept_by_all_lanes_of_a_session_together() -> None:
    rate, seconds, received = 2_000_000, 1.0, 0

    async def receive(stream: trio.SocketStream) -> None:
        nonlocal received
        while data := await stream.receive_some():
            received += len(data)

    async with (
        tunnel_world(TunnelLimits(session_rate=rate), websocket=2) as world,
        world.pair() as (a, b),
        world.pair() as (c, d),
    ):
        began = trio.current_time()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for source, destination in ((a, b), (c, d)):
                    nursery.start_soon(send_for_ever, source)
                    nursery.start_soon(receive, destination)
        # And what a bucket holds at the beginning.
        assert 0 < received <= rate * (trio.current_time() - began + 0.5)


async def test_a_session_is_cut_and_others_go_on() -> None:
    other = str(uuid.uuid4())
    async with tunnel_world(websocket=2) as world, world.pair() as (source, _), world.pair(other) as (a, b):
        await world.service.cut_session(SESSION)
        with trio.fail_after(10):
            assert await count_until_broken(source) == 0
        await a.send_all(b"still here")
        assert await b.receive_some() == b"still here"


@pytest.mark.parametrize("raw_first", [True, False])
async def test_all_that_a_user_moves_is_moved_by_one_process(raw_first: bool) -> None:
    """Or its limits would hold twice."""
    async with tunnel_world(websocket=2) as world:
        world.inside = 0 if raw_first else 2
        async with world.pair() as (source, destination):
            world.inside = 2 - world.inside
            async with world.pair() as (second, there):
                homes = list(world.service._pairs.values())
                assert len(homes) == 2
                assert len(set(map(id, homes))) == 1
                assert (homes[0] is world.service.carrier) is not raw_first
                for one, other in ((source, destination), (second, there), (there, second)):
                    await one.send_all(b"here")
                    assert await other.receive_some() == b"here"
        await no_pairs(world)
        assert not world.service._homes


@pytest.mark.soak
async def test_a_side_that_says_nothing_is_asked_and_stays() -> None:
    async with tunnel_world(websocket=2) as world, world.pair() as (source, destination):
        # Longer than a silence is taken for life; the pings between agent and relay are what is heard.
        await trio.sleep(SILENCE)
        await source.send_all(b"still")
        assert await destination.receive_some() == b"still"


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
    (b"\x00" * 100_000, b"HTTP/1.1 414"),
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
            assert heard.startswith(answer), (said[:100], heard[:100])
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
                if child.status() != psutil.STATUS_ZOMBIE and CARRIERS & set(child.cmdline()):
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
