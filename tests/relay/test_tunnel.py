"""The tunnel end to end on the relay's side: joined, moved, half-closed, held back, cut, limited."""

from __future__ import annotations

import datetime
import errno
import random
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import trio
import trio.testing

from protocol.errors import TowpathError
from protocol.websocket.carrier import Carrier, CarrierUnavailable
from protocol.websocket.orders import Serve, decode_order
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.service import TunnelQuota, TunnelService, TunnelUnavailable
from relay.server import _renew_certificate
from tests.relay.tunnel_ends import (
    count_until_broken,
    no_pairs,
    pass_both_ways,
    read_all,
    send_for_ever,
    send_until_held_back,
    wake_up,
)
from tests.relay.tunnel_world import ROOT, SESSION, SIGNER, USER, tunnel_world

OTHER_USER = "55555555-5555-4555-8555-555555555555"


def moving_process() -> psutil.Process:
    """The tunnel's own child; other tests of this process may have left some of theirs."""
    (child,) = [
        one
        for one in psutil.Process().children()
        if one.status() != psutil.STATUS_ZOMBIE and "relay.rendezvous.tunnel.process" in one.cmdline()
    ]
    return child


async def test_bytes_pass_both_ways_and_each_way_ends_by_itself() -> None:
    content = random.Random(1).randbytes(8_000_000)
    async with tunnel_world() as world:
        with trio.fail_after(30):
            async with world.pair() as (source, destination):
                await pass_both_ways(source, destination, content)
                await no_pairs(world)
        statistics = world.service.statistics()
        assert statistics.outcomes == {"closed": 1}
        assert (statistics.joined, statistics.refused) == (1, 0)


async def test_what_an_agent_sends_at_once_behind_the_outer_tls_is_not_lost() -> None:
    async with tunnel_world() as world:
        for size in (1, 1000, 16_384, 200_000):
            content = random.Random(size).randbytes(size)
            async with world.pair() as (source, destination):
                with trio.fail_after(10):
                    await destination.send_all(content)
                    await destination.send_eof()
                    assert await read_all(source) == content


async def test_a_receiver_that_takes_nothing_holds_the_sender_back() -> None:
    async with tunnel_world() as world, world.pair() as (source, destination):
        sent = await send_until_held_back(source)
        # Socket buffers on both sides and one pipe, nothing that grows: far less than an unbounded second would be.
        assert sent < 64 * 1024 * 1024
        child = moving_process()
        assert child.memory_info().rss < 100 * 1024 * 1024
        await wake_up(source, destination, sent)


async def test_when_one_side_breaks_the_other_is_told_by_a_reset() -> None:
    async with tunnel_world() as world, world.pair() as (source, destination):
        source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await source.aclose()
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await destination.receive_some()
        await no_pairs(world)
        assert world.service.statistics().outcomes == {"broken": 1}


async def test_a_session_can_be_cut_and_others_go_on() -> None:
    other = str(uuid.uuid4())
    async with tunnel_world() as world, world.pair() as (source, _), world.pair(other) as (a, b):
        await world.service.cut_session(SESSION)
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await source.receive_some()
        await a.send_all(b"still here")
        assert await b.receive_some() == b"still here"


async def test_tokens_of_a_session_that_was_cut_join_nobody_until_it_gets_new_ones() -> None:
    async with tunnel_world() as world:
        early = world.service.issue(SESSION, USER)
        await world.service.cut_session(SESSION)
        # Both come with tokens that still count by their time: they are let go of instead of being joined.
        async with await world.enter_both(early) as (source, destination):
            for end in (source, destination):
                with trio.fail_after(10):
                    try:
                        assert await end.receive_some() == b""
                    except trio.BrokenResourceError:
                        continue
        assert world.service.statistics().pairs == 0
        async with world.pair() as (source, destination):
            await source.send_all(b"again")
            with trio.fail_after(10):
                assert await destination.receive_some() == b"again"


async def test_a_pair_that_is_handed_over_in_the_moment_of_the_cut_does_not_outlive_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with tunnel_world() as world:
        order = world.service._order

        async def cut_meanwhile(*arguments: Any) -> None:
            await world.service.cut_session(SESSION)
            await order(*arguments)

        monkeypatch.setattr(world.service, "_order", cut_meanwhile)
        async with world.pair() as (source, _):
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await source.receive_some()
        await no_pairs(world)


async def test_a_moving_process_that_is_killed_is_replaced() -> None:
    async with tunnel_world() as world, world.pair() as (source, _):
        child = moving_process()
        child.kill()
        with trio.fail_after(20):
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await source.send_all(b"x")
                    await trio.sleep(0.01)
            while True:
                try:
                    async with world.pair() as (a, b):
                        await a.send_all(b"again")
                        if await b.receive_some() == b"again":
                            break
                except (TowpathError, trio.BrokenResourceError):
                    await trio.sleep(0.05)
        assert world.service.statistics().restarts == 1


@pytest.mark.parametrize("runs", ["tunnel", "websocket"])
async def test_a_process_that_cannot_be_started_again_now_is_tried_until_it_can(
    runs: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    started = 0

    @asynccontextmanager
    async def line_process(_module: str, *, room: int) -> AsyncIterator[trio.socket.SocketType]:
        nonlocal started
        started += 1
        await trio.lowlevel.checkpoint()
        if started % 2 == 0:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs, trio.socket.from_stdlib_socket(ours) as line:
            # It ends at once, and has heard what it was told.
            theirs.shutdown(socket.SHUT_WR)
            yield line

    module = "relay.rendezvous.tunnel.service" if runs == "tunnel" else "protocol.websocket.carrier"
    monkeypatch.setattr(f"{module}.line_process", line_process)
    carrier = Carrier()
    carrier.want()
    service = TunnelService(SIGNER, ROOT.public_pem, TunnelLimits(), processes=1)
    with trio.move_on_after(9.5):
        await (service.run if runs == "tunnel" else carrier.run)()
    assert started == 10


async def test_a_process_too_busy_to_hear_of_a_new_certificate_is_told_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        carrier = Carrier()
        carrier._line = ours
        with trio.move_on_after(1):
            while True:
                await ours.send(bytes(1000))
        uses: list[str] = []
        renewed = [True, False, False]

        class Certificate:
            context, link_context, files = "context", "link context", ("certificate", None)

            def renew(self, _now: object) -> bool:
                return renewed.pop(0)

        relay: Any = SimpleNamespace(
            certificate=Certificate(),
            carrier=carrier,
            tunnel=SimpleNamespace(enabled=True),
            dispatcher=SimpleNamespace(use=lambda *contexts: uses.extend(contexts)),
        )
        now = datetime.datetime.now(datetime.UTC)
        with pytest.raises(CarrierUnavailable):
            await _renew_certificate(relay, now)
        packet = b""
        for _ in range(2):
            with trio.move_on_after(1):
                while True:
                    packet = await theirs.recv(10_000)
            await _renew_certificate(relay, now)
        assert decode_order(packet) == Serve("certificate", None)
        assert uses == ["context", "link context"]
        # Told once.
        with trio.move_on_after(1) as scope:
            await theirs.recv(10_000)
        assert scope.cancelled_caught


@pytest.mark.parametrize("which", ["session_bytes", "user_bytes"])
async def test_an_amount_is_enforced_in_mid_stream_and_afterwards(which: str) -> None:
    amount = 3_000_000
    async with tunnel_world(TunnelLimits(**{which: amount})) as world:
        async with world.pair() as (source, destination), trio.open_nursery() as nursery:
            nursery.start_soon(send_for_ever, source)
            with trio.fail_after(10):
                received = await count_until_broken(destination)
            assert received <= amount
            await no_pairs(world)
        with trio.fail_after(10):
            while True:
                try:
                    world.service.issue(SESSION, USER)
                except TunnelQuota as error:
                    assert error.who == "relay operator"
                    break
                # The process reports what it moved every second.
                await trio.sleep(0.05)
        # Nobody else is concerned.
        async with world.pair(str(uuid.uuid4()), OTHER_USER) as (a, b):
            await a.send_all(b"mine")
            assert await b.receive_some() == b"mine"
        assert which.replace("_bytes", " quota") in world.service.statistics().outcomes


async def test_a_relay_without_a_tunnel_says_so() -> None:
    service = TunnelService(SIGNER, ROOT.public_pem, TunnelLimits(), processes=0)
    with pytest.raises(TunnelUnavailable):
        service.issue(SESSION, USER)


async def test_no_more_pairs_than_configured() -> None:
    async with tunnel_world(max_pairs=2) as world, world.pair(), world.pair():
        with pytest.raises(TunnelUnavailable):
            world.service.issue(SESSION, USER)
