"""A peer that vanishes while somebody waits for it is missed soon; while nobody does, watching it costs little."""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol.link import WATCH, WATCH_MOST, watch_untrusted
from protocol.reverse_http import Client, Limits, LinkLost, connect, serve
from protocol.reverse_http.carrier import Carrier
from protocol.reverse_http.pings import Pings

LIMITS = Limits(ping_interval=25.0)
# Two short intervals, and a moment.
NOTICED = 2 * LIMITS.quick_ping_interval + 0.5


class Line:
    """Both ends of a link whose bytes can be lost from a moment on, without either end being told."""

    def __init__(self) -> None:
        self.cut = False
        self.carriers: list[Carrier] = []
        self._agents_end, self._agents_far_end = trio.testing.memory_stream_pair()
        self._relays_far_end, self.relays_end = trio.testing.memory_stream_pair()
        self.carried = 0
        self.nursery: trio.Nursery

    async def carry(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, self._agents_far_end, self._relays_far_end)
            nursery.start_soon(self._pump, self._relays_far_end, self._agents_far_end)

    async def _pump(self, source: trio.abc.Stream, target: trio.abc.Stream) -> None:
        while data := await source.receive_some():
            if not self.cut:
                self.carried += len(data)
                await target.send_all(data)

    async def agent(self) -> None:
        await serve(self._agents_end, self.application, limits=LIMITS, on_carrier=self.carriers.append)

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await trio.sleep(200)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/events":
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            while True:
                await trio.sleep(60)
                await send({"type": "http.response.body", "body": b"event\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Line, Client]]:
    """A line with an agent behind it, and the relay's client; what else runs for it ends with the block."""
    line = Line()
    async with trio.open_nursery() as line.nursery:
        line.nursery.start_soon(line.carry)
        line.nursery.start_soon(line.agent)
        async with connect(line.relays_end, limits=LIMITS) as client:
            yield line, client
        line.nursery.cancel_scope.cancel()


async def drain(client: Client) -> None:
    try:
        async with client.stream("GET", "/events") as answer:
            async for _ in answer:
                pass
    except LinkLost:
        return


@pytest.mark.parametrize("idle", [0.0, 3.0, 24.0, 26.0, 301.0])
async def test_a_call_to_an_agent_that_has_vanished_fails_soon(
    idle: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with linked() as (line, client):
        assert (await client.request("GET", "/")).body == b"ok"
        await trio.sleep(idle)
        line.cut = True
        begun = trio.current_time()
        with pytest.raises(LinkLost, match="silent for"):
            await client.request("GET", "/", timeout=1000)
        assert trio.current_time() - begun <= NOTICED


async def test_an_agent_that_vanishes_in_the_middle_of_a_long_call_is_missed_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with linked() as (line, client):

        async def vanish() -> None:
            await trio.sleep(100)
            line.cut = True

        line.nursery.start_soon(vanish)
        begun = trio.current_time()
        with pytest.raises(LinkLost, match="silent for"):
            await client.request("GET", "/slow", timeout=1000)
        assert 100 <= trio.current_time() - begun <= 100 + NOTICED


async def test_a_long_call_to_an_agent_that_lives_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as (_line, client):
        assert (await client.request("GET", "/slow", timeout=1000)).body == b"ok"


async def test_an_agent_with_something_to_tell_misses_its_relay_soon(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as (line, client):
        begun = trio.current_time()
        line.nursery.start_soon(drain, client)
        # Just before the second event.
        await trio.sleep(119)
        line.cut = True
        await line.carriers[0].closed.wait()
        assert trio.current_time() - begun <= 120 + NOTICED


async def test_an_idle_link_through_something_that_answers_for_others_is_watched(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with linked() as (line, client):
        await client.request("GET", "/")
        line.carriers[0].watch(WATCH)
        client.watch(WATCH + 0.5)
        # It lives for as long as the other side does.
        await trio.sleep(600)
        assert client.ending is None
        line.cut, begun = True, trio.current_time()
        await client.closed.wait()
        await line.carriers[0].closed.wait()
        assert trio.current_time() - begun < 15


@pytest.mark.parametrize(
    ("said", "taken"),
    [(0, WATCH), (8, 8), (1e-9, WATCH), (-1, WATCH), (1e9, WATCH_MOST), (math.nan, WATCH), (math.inf, WATCH)],
)
def test_no_peer_has_this_side_flood_or_forget(said: float, taken: float) -> None:
    assert watch_untrusted(said) == taken


async def test_an_idle_link_is_pinged_as_seldom_as_before(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as (line, client):
        await client.request("GET", "/")
        await trio.sleep(60)
        before = line.carried
        await trio.sleep(86_400)
        # Both ends send one PING of 17 bytes for each interval, and its answer.
        assert line.carried - before <= 4 * 17 * (86_400 / 25 + 1)


def test_the_short_interval_counts_from_when_somebody_waits() -> None:
    pings = Pings(25.0, 6.0, 0.25, 100.0)
    assert pings.deadline() == 125.0
    pings.expect(120.0)
    # Nothing has come for 20 s, and nobody minded.
    assert not pings.is_dead(120.0)
    assert pings.deadline() == 125.0
    assert pings.due(125.0) is not None
    assert pings.deadline() == 132.0
    assert not pings.is_dead(131.9)
    assert pings.is_dead(132.0)
    pings.heard(131.0)
    pings.calm()
    assert not pings.is_dead(156.0)
    assert pings.is_dead(181.0)


class Broken(trio.abc.Stream):
    """A stream that is quiet for ten seconds and then fails as a socket does."""

    def __init__(self, number: int) -> None:
        self.number = number

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep(10)
        try:
            raise OSError(self.number, "on purpose")
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("number", "silent"), [(errno.ETIMEDOUT, True), (errno.EHOSTUNREACH, True), (errno.ECONNRESET, False)]
)
async def test_a_peer_that_the_kernel_misses_is_told_from_one_that_hangs_up(
    number: int, silent: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with connect(Broken(number), limits=LIMITS) as client:
        await client.closed.wait()
        assert client.ending is not None
        assert client.ending.silent is silent
