"""The link's known ways to fail, one test each: long life, time-outs, abandoned answers, slow readers, silence."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol.reverse_http import (
    DEFAULT_LIMITS,
    CallReset,
    CallTimeout,
    Client,
    Ending,
    Limits,
    LinkLost,
    connect,
    serve,
)

MIB = 1024 * 1024


class Counted:
    """A small application: /small, /big (endless), /slow (never answers), /stuck (cannot be cancelled for long)."""

    def __init__(self) -> None:
        self.begun = 0
        self.running = 0
        self.most = 0
        self.release = trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await getattr(self, scope["path"].strip("/"))(receive, send)
        finally:
            self.running -= 1

    async def small(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def big(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(64 * 1024), "more_body": True})

    async def slow(self, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def stuck(self, receive: Any, send: Any) -> None:
        with trio.CancelScope(shield=True):
            await self.release.wait()


@asynccontextmanager
async def linked(
    app: Any, limits: Limits = DEFAULT_LIMITS, endings: list[Ending] | None = None
) -> AsyncIterator[Client]:
    ours, theirs = trio.testing.memory_stream_pair()

    async def agent() -> None:
        ending = await serve(ours, app, limits=limits)
        if endings is not None:
            endings.append(ending)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent)
        async with connect(theirs, limits=limits) as client:
            yield client


async def test_twenty_thousand_requests_on_one_connection() -> None:
    app = Counted()
    began = time.monotonic()
    async with linked(app) as client:

        async def caller() -> None:
            for _ in range(1000):
                assert (await client.request("GET", "/small")).body == b"ok"

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(caller)
        statistics = client.statistics()
    assert (statistics.requests, statistics.answered, statistics.under_way) == (20_000, 20_000, 0)
    assert app.begun == 20_000
    assert time.monotonic() - began < 120


async def test_nothing_of_finished_calls_is_kept() -> None:
    async with linked(Counted()) as client:
        for _ in range(1500):
            await client.request("GET", "/small")
        core = client._carrier.core
        assert not client._carrier.channels
        assert not core._streams
        assert len(core._h2.streams) <= 2
        assert len(core._h2._closed_streams) <= 2 * Limits().max_streams + 56


async def test_the_timeout_of_one_call_leaves_the_others_alone(autojump_clock: trio.testing.MockClock) -> None:
    app = Counted()
    async with linked(app) as client, trio.open_nursery() as nursery:

        async def patient() -> None:
            async with client.stream("GET", "/big") as answer:
                for _ in range(20):
                    assert await anext(answer)
                    await trio.sleep(1)

        nursery.start_soon(patient)
        for _ in range(5):
            start = trio.current_time()
            with pytest.raises(CallTimeout, match="/slow within 2 seconds"):
                await client.request("GET", "/slow", timeout=2)
            assert trio.current_time() - start == pytest.approx(2)
            assert (await client.request("GET", "/small")).status == 200
        assert client.statistics().timeouts == 5
        assert client.ending is None


async def test_a_timeout_ends_the_call_on_the_agent_too(autojump_clock: trio.testing.MockClock) -> None:
    app = Counted()
    async with linked(app) as client:
        with pytest.raises(CallTimeout):
            await client.request("GET", "/slow", timeout=2)
        await trio.sleep(0.1)
        assert (app.begun, app.running) == (1, 0)


async def test_a_cancelled_call_ends_at_both_ends_and_harms_nothing(autojump_clock: trio.testing.MockClock) -> None:
    app = Counted()
    async with linked(app) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.request, "GET", "/slow")
            await trio.testing.wait_all_tasks_blocked()
            assert app.running == 1
            nursery.cancel_scope.cancel()
        await trio.sleep(0.1)
        assert app.running == 0
        assert (await client.request("GET", "/small")).status == 200


async def test_a_thousand_abandoned_large_answers_do_not_starve_the_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    app = Counted()
    async with linked(app) as client:
        for _ in range(1000):
            async with client.stream("GET", "/big") as answer:
                assert await anext(answer)
        # What follows needs the whole window of the connection several times over.
        async with client.stream("GET", "/big") as answer:
            read = 0
            while read < 8 * MIB:
                read += len(await anext(answer))
        await trio.sleep(1)
        assert (await client.request("GET", "/small")).status == 200
        assert client.statistics().held == 0
        assert app.running == 0


async def test_answers_abandoned_before_they_begin_do_not_starve_the_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    app = Counted()
    async with linked(app) as client:

        async def impatient(number: int) -> None:
            # Every possible moment of giving up: before, within and after the first turns of the other side.
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.request, "GET", "/big")
                    for _ in range(number % 13):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

        for number in range(1500):
            await impatient(number)
        await trio.sleep(1)
        assert (await client.request("GET", "/small")).status == 200
        assert client.ending is None
        assert app.running == 0


async def test_one_slow_reader_does_not_block_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with linked(Counted()) as client:
        await read_beside_a_slow_reader(client)


async def read_beside_a_slow_reader(client: Client) -> None:
    async with client.stream("GET", "/big"), client.stream("GET", "/big") as slow:
        for _ in range(5):
            assert await anext(slow)
            async with client.stream("GET", "/big") as quick:
                read = 0
                while read < 4 * MIB:
                    read += len(await anext(quick))
            for _ in range(50):
                assert (await client.request("GET", "/small")).body == b"ok"


async def test_ninety_nine_slow_readers_do_not_block_the_last_place(autojump_clock: trio.testing.MockClock) -> None:
    limits = Limits()
    async with linked(Counted(), limits) as client, trio.open_nursery() as nursery:

        async def never_reads() -> None:
            async with client.stream("GET", "/big"):
                await trio.sleep_forever()

        for _ in range(limits.max_streams - 1):
            nursery.start_soon(never_reads)
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.request("GET", "/small")).body == b"ok"
        buffered = sum(len(chunk) for channel in client._carrier.channels.values() for chunk in channel._chunks)
        assert buffered <= limits.max_streams * limits.stream_window
        nursery.cancel_scope.cancel()


async def test_an_agent_slow_to_take_a_request_does_not_block_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    app = Counted()
    async with linked(app) as client, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(lambda: client.request("POST", "/slow", body=bytes(8 * MIB), timeout=1e6))
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.request("GET", "/small")).body == b"ok"
        nursery.cancel_scope.cancel()


async def test_calls_beyond_the_limit_wait_their_turn_in_order(autojump_clock: trio.testing.MockClock) -> None:
    app, limits = Counted(), Limits(max_streams=5)
    done: list[int] = []
    async with linked(app, limits) as client, trio.open_nursery() as nursery:

        async def call(number: int) -> None:
            await client.request("GET", "/small")
            done.append(number)

        for number in range(50):
            nursery.start_soon(call, number)
            await trio.lowlevel.checkpoint()
    assert sorted(done) == list(range(50))
    assert app.most <= 5


async def test_waiting_for_a_turn_counts_as_time_of_the_call(autojump_clock: trio.testing.MockClock) -> None:
    async with linked(Counted(), Limits(max_streams=1)) as client, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.request("GET", "/slow", timeout=1000))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(CallTimeout):
            await client.request("GET", "/small", timeout=3)
        nursery.cancel_scope.cancel()


async def test_handlers_of_reset_calls_count_until_they_end(autojump_clock: trio.testing.MockClock) -> None:
    app, limits = Counted(), Limits(max_streams=4)
    async with linked(app, limits) as client:
        refused = 0
        for _ in range(20):
            try:
                await client.request("GET", "/stuck", timeout=1)
            except CallTimeout:
                continue
            except CallReset as error:
                refused += error.code == "BUSY"
        assert app.most == 4
        assert refused == 16
        app.release.set()
        await trio.sleep(1)
        assert (await client.request("GET", "/small")).status == 200


@pytest.mark.parametrize("silent", ["agent", "relay"])
async def test_two_silent_intervals_end_the_connection(silent: str, autojump_clock: trio.testing.MockClock) -> None:
    """The other side vanishes without a word: its machine sleeps, or a router forgot the connection."""
    ours, theirs = trio.testing.memory_stream_pair()
    limits = Limits(ping_interval=15)
    if silent == "agent":
        start = trio.current_time()
        async with connect(theirs, limits=limits) as client:
            with pytest.raises(LinkLost, match="silent for 30 seconds"):
                await client.request("GET", "/", timeout=1000)
            await client.closed.wait()
            assert trio.current_time() - start == pytest.approx(30, abs=1.5)
    else:
        start = trio.current_time()
        ending = await serve(ours, Counted(), limits=limits)
        assert "silent for 30 seconds" in ending.sentence
        assert trio.current_time() - start == pytest.approx(30, abs=1.5)


async def test_pings_keep_an_idle_connection_alive(autojump_clock: trio.testing.MockClock) -> None:
    async with linked(Counted(), Limits(ping_interval=15)) as client:
        await trio.sleep(86_400)
        assert client.ending is None
        assert (await client.request("GET", "/small")).status == 200
        # About one ping an interval, and its answer: an idle link costs next to nothing.
        assert client.statistics().bytes_received < 86_400 / 15 * 2 * 17 + 2000


async def test_a_peer_that_only_listens_is_silent(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async with trio.open_nursery() as nursery:

        async def drain() -> None:
            while await ours.receive_some():
                pass

        nursery.start_soon(drain)
        async with connect(theirs, limits=Limits(ping_interval=10)) as client:
            await client.closed.wait()
            assert client.ending is not None
            assert "silent for 20 seconds" in client.ending.sentence


async def test_a_full_socket_does_not_stop_reading_or_time(autojump_clock: trio.testing.MockClock) -> None:
    """The peer reads nothing: writes hang for ever, and only the silence ends the connection."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with connect(theirs, limits=Limits(ping_interval=10)) as client:
        with trio.move_on_after(100) as scope:
            await client.closed.wait()
        assert not scope.cancelled_caught
    await ours.aclose()


async def test_used_up_stream_ids_end_the_connection_gracefully(autojump_clock: trio.testing.MockClock) -> None:
    app, endings = Counted(), list[Ending]()
    async with linked(app, Limits(last_stream_id=9, drain=30), endings) as client, trio.open_nursery() as nursery:
        finished: list[int] = []

        async def long_call() -> None:
            async with client.stream("GET", "/big") as answer:
                for _ in range(10):
                    finished.append(len(await anext(answer)))
                    await trio.sleep(1)

        nursery.start_soon(long_call)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(4):
            assert (await client.request("GET", "/small")).status == 200
        with pytest.raises(LinkLost, match="being renewed"):
            await client.request("GET", "/small")
        await client.closed.wait()
        assert len(finished) == 10
    assert endings[0].retry_after == 0.0
    assert "used up" in endings[0].sentence


async def test_an_endless_answer_holds_up_the_renewal_only_so_long(autojump_clock: trio.testing.MockClock) -> None:
    limits = Limits(last_stream_id=1, drain=30)
    async with linked(Counted(), limits) as client, client.stream("GET", "/big") as answer:
        start = trio.current_time()
        with pytest.raises(LinkLost, match="being renewed"):
            await client.request("GET", "/small")
        with pytest.raises(LinkLost, match="used up"):
            while True:
                await anext(answer)
                await trio.sleep(0.1)
        assert trio.current_time() - start == pytest.approx(30, abs=1)
