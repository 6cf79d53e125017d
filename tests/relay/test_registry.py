"""The registry: who is linked, and how calls reach them, fail, wait and are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from protocol.control import AgentHello
from protocol.errors import ItemFailed, NeedsPerson, RetryLater, TowpathError
from protocol.reverse_http import DEFAULT_LIMITS, Limits, connect, serve
from relay.rendezvous.registry import CallTimeout, LinkDown, LinkUp, NodeBusy, NodeOffline, Registry

NODE = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"


def hello(node_id: str, boot: str = "") -> AgentHello:
    return AgentHello(node_id=node_id, endpoint_id=node_id, signature="", certificate="", boot_id=boot)


async def describe(request: Request) -> Response:
    body = await request.body()
    return JSONResponse(
        {
            "path": request.scope["path"],
            "query": request.query_params.multi_items(),
            "method": request.method,
            "document": msgspec.json.decode(body) if body else None,
        }
    )


async def fails(request: Request) -> Response:
    error = NeedsPerson("The disk is full.", code="NO_SPACE", who="destination owner", subject="/a")
    return JSONResponse(error.to_document(), status_code=507)


async def nonsense(request: Request) -> Response:
    return Response(b"\xff\xfe<html>", status_code=502)


async def never(request: Request) -> Response:
    await trio.sleep_forever()
    return Response()


class ThreeLines:
    """Three lines, then nothing for ever. No generator: Starlette would leave one unfinished when its reader goes."""

    def __init__(self) -> None:
        self.given = 0

    def __aiter__(self) -> ThreeLines:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.given == 3:
            await trio.sleep_forever()
        self.given += 1
        return f"{self.given}\n".encode()


async def lines(request: Request) -> Response:
    return StreamingResponse(ThreeLines())


async def denied(request: Request) -> Response:
    return JSONResponse(ItemFailed("No.", code="PERMISSION_DENIED").to_document(), status_code=403)


APP = Starlette(
    routes=[
        Route("/fails", fails),
        Route("/nonsense", nonsense),
        Route("/never", never),
        Route("/lines", lines),
        Route("/denied", denied),
        Route("/{rest:path}", describe, methods=["GET", "PUT", "DELETE"]),
    ]
)


@asynccontextmanager
async def linked(
    registry: Registry, node_id: str = NODE, app: Any = APP, limits: Limits = DEFAULT_LIMITS, boot: str = ""
) -> AsyncIterator[None]:
    """An agent with a link in the registry, held until the block ends."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(ours, app, limits=limits))
        async with connect(theirs, limits=limits) as client:
            with registry.registered(node_id, hello(node_id, boot), client):
                yield


async def test_a_call_reaches_the_agent_and_its_answer_comes_back() -> None:
    registry = Registry()
    async with linked(registry):
        body = await registry.call(
            NODE, "PUT", "/link/x y/ü?&", query=[("path", "/a b&c=d"), ("path", "é")], document={"n": 1}
        )
    assert msgspec.json.decode(body) == {
        "path": "/link/x y/ü?&",
        "query": [["path", "/a b&c=d"], ["path", "é"]],
        "method": "PUT",
        "document": {"n": 1},
    }


async def test_an_agent_that_is_not_linked_is_offline() -> None:
    registry = Registry()
    with pytest.raises(NodeOffline) as caught:
        await registry.call(NODE, "GET", "/x")
    assert (caught.value.code, caught.value.disposition) == ("GC_NOT_CONNECTED", "retry")
    with pytest.raises(NodeOffline):
        async with registry.stream(NODE, "/lines"):
            pass
    assert not registry.is_connected(NODE)


async def test_the_agents_own_error_is_raised_with_its_status() -> None:
    registry = Registry()
    async with linked(registry):
        with pytest.raises(TowpathError) as caught:
            await registry.call(NODE, "GET", "/fails")
    error = caught.value
    assert isinstance(error, NeedsPerson)
    assert (error.code, error.status, error.who, error.subject) == ("NO_SPACE", 507, "destination owner", "/a")
    assert registry.statistics().failed == 1


async def test_an_error_that_cannot_be_read_is_one_to_try_again() -> None:
    registry = Registry()
    async with linked(registry):
        with pytest.raises(RetryLater, match="status 502") as caught:
            await registry.call(NODE, "GET", "/nonsense")
    assert caught.value.status == 502


async def test_a_call_that_takes_too_long_times_out_alone(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry()
    async with linked(registry):
        start = trio.current_time()
        with pytest.raises(CallTimeout, match="within 5 seconds"):
            await registry.call(NODE, "GET", "/never", timeout=5)
        assert trio.current_time() - start == pytest.approx(5)
        assert await registry.call(NODE, "GET", "/x")
        assert registry.statistics().timeouts == 1


async def test_calls_under_way_are_bounded_and_served_in_order(autojump_clock: trio.testing.MockClock) -> None:
    running, most, order = 0, 0, list[int]()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(1)
        running -= 1
        await Response()(scope, receive, send)

    registry = Registry(max_calls=4)
    async with linked(registry, app=slow), trio.open_nursery() as nursery:

        async def call(number: int) -> None:
            await registry.call(NODE, "GET", "/")
            order.append(number // 4)

        for number in range(20):
            nursery.start_soon(call, number)
            await trio.testing.wait_all_tasks_blocked()
        assert registry.statistics().under_way == 4
        assert registry.statistics().waiting == 16
    assert most == 4
    assert order == sorted(order)


@pytest.mark.parametrize("crowd", [["bob"], ["bob", "eve"], ["bob", "eve", "mallory"]])
async def test_however_much_people_ask_for_the_relay_comes_through(
    autojump_clock: trio.testing.MockClock, crowd: list[str]
) -> None:
    """Among its own calls is the one that closes a source to somebody who lost a permission, within two seconds."""
    registry = Registry(max_calls=8, max_waiting=32)
    busy: Counter[str] = Counter()
    answered: list[str] = []

    async def ask(who: str) -> None:
        try:
            await registry.call(NODE, "GET", "/never", caller=who, timeout=60)
        except NodeBusy:
            busy[who] += 1
        except CallTimeout:
            pass

    async def short(who: str) -> None:
        await registry.call(NODE, "DELETE", "/link/sessions/x", caller=who, timeout=100)
        answered.append(who)

    async with linked(registry), trio.open_nursery() as nursery:
        for _ in range(50):
            for who in crowd:
                nursery.start_soon(ask, who)
        await trio.testing.wait_all_tasks_blocked()
        assert all(busy[who] > 0 for who in crowd)
        with trio.fail_after(1):
            await short("")
        nursery.start_soon(short, "carol")
        await trio.sleep(1)
        # One person holds no more than half; where several hold all that people may have, another waits for them.
        assert answered == (["", "carol"] if len(crowd) == 1 else [""])
    assert answered == ["", "carol"]
    assert all(busy[who] < 50 for who in crowd)


async def test_what_waits_for_its_turn_is_decided_about_again(autojump_clock: trio.testing.MockClock) -> None:
    asked, served = list[str](), list[str]()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["path"])
        await trio.sleep(3)
        await Response()(scope, receive, send)

    async def taken_back() -> None:
        asked.append("again")
        raise NeedsPerson("It is not allowed any more.")

    registry = Registry(max_calls=1)
    async with linked(registry, app=slow), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: registry.call(NODE, "GET", "/first"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NeedsPerson, match="any more"):
            await registry.call(NODE, "GET", "/second", decide_again=taken_back)
        # It has given its turn back.
        await registry.call(NODE, "GET", "/third")
    assert (asked, served) == (["again"], ["/first", "/third"])


async def test_what_the_agent_has_not_answered_is_given_up_once_it_is_allowed_no_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Else what waits there for a disk would be done up to the end of its time."""
    left = list[float]()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(trio.current_time())

    until = 4.5

    async def decide_again() -> None:
        if trio.current_time() > until:
            raise NeedsPerson("It is not allowed any more.")

    registry = Registry()
    async with linked(registry, app=waits):
        with pytest.raises(NeedsPerson, match="any more"):
            await registry.call(NODE, "POST", "/mkdir", document={}, decide_again=decide_again)
        await trio.testing.wait_all_tasks_blocked()
        assert until < left[0] < until + 2
    async with linked(registry):
        # What is answered at once is answered without asking, and errors stay what they are.
        until = -1.0
        assert await registry.call(NODE, "GET", "/x", decide_again=decide_again)
        with pytest.raises(TowpathError, match="The disk is full"):
            await registry.call(NODE, "GET", "/fails", decide_again=decide_again)


async def test_too_many_waiting_calls_are_refused_clearly(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry(max_calls=1, max_waiting=2)
    async with linked(registry), linked(registry, OTHER), trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: registry.call(NODE, "GET", "/never", timeout=1000))
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NodeBusy, match="wait for this endpoint"):
            await registry.call(NODE, "GET", "/x")
        # One busy agent is nobody else's trouble.
        assert await registry.call(OTHER, "GET", "/x")
        assert registry.statistics().refused == 1
        nursery.cancel_scope.cancel()


async def test_cancelled_calls_give_their_turn_back(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry(max_calls=2, max_waiting=2)
    async with linked(registry):
        for _ in range(10):
            with trio.move_on_after(1):
                async with trio.open_nursery() as nursery:
                    for _ in range(4):
                        nursery.start_soon(lambda: registry.call(NODE, "GET", "/never", timeout=1000))
        statistics = registry.statistics()
        assert (statistics.waiting, statistics.under_way) == (0, 0)
        assert await registry.call(NODE, "GET", "/x")


async def test_calls_of_a_link_that_ends_are_offline(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry(max_calls=1)
    async with linked(registry), trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(NodeOffline):
                await registry.call(NODE, "GET", "/never", timeout=1000)

        # One under way, one waiting for its turn.
        nursery.start_soon(call)
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        registry.disconnect(NODE, "gone")


async def test_a_stream_gives_its_chunks_and_can_be_left(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry()
    async with linked(registry):
        async with registry.stream(NODE, "/lines") as chunks:
            received = b""
            while received != b"1\n2\n3\n":
                received += await anext(chunks)
            assert await registry.call(NODE, "GET", "/x")
        with pytest.raises(ItemFailed) as caught:
            async with registry.stream(NODE, "/denied"):
                pass
        assert (caught.value.code, caught.value.status) == ("PERMISSION_DENIED", 403)


async def test_a_stream_ends_with_its_link(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry()
    async with linked(registry):
        with pytest.raises(NodeOffline):
            async with registry.stream(NODE, "/lines") as chunks:
                async for _ in chunks:
                    registry.disconnect(NODE, "over")


async def test_streams_to_one_agent_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry(max_streams=1)
    async with linked(registry):
        async with registry.stream(NODE, "/lines"):
            with pytest.raises(NodeBusy):
                async with registry.stream(NODE, "/lines"):
                    pass
        async with registry.stream(NODE, "/lines"):
            pass


async def test_changes_begin_with_who_is_there_and_miss_nobody() -> None:
    registry = Registry()
    async with linked(registry), registry.changes() as changes:
        assert await changes.receive() == LinkUp(NODE, hello(NODE))
        async with linked(registry, OTHER):
            assert await changes.receive() == LinkUp(OTHER, hello(OTHER))
            assert set(registry.connected()) == {NODE, OTHER}
        assert await changes.receive() == LinkDown(OTHER)
        assert not registry.is_connected(OTHER)
        with pytest.raises(trio.WouldBlock):
            changes.receive_nowait()


async def test_a_subscriber_that_lags_behind_is_told_to_start_again() -> None:
    registry = Registry()
    async with registry.changes(buffer=3) as changes:
        for _ in range(3):
            async with linked(registry):
                pass
        received = [change async for change in changes]
        assert len(received) == 3
    async with linked(registry), registry.changes(buffer=3) as changes:
        assert await changes.receive() == LinkUp(NODE, hello(NODE))


async def test_a_second_link_of_a_node_replaces_the_first(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry()
    endings: list[Any] = []
    ours, theirs = trio.testing.memory_stream_pair()

    async def first_agent() -> None:
        endings.append(await serve(ours, APP))

    async def first_link() -> None:
        async with connect(theirs) as client:
            with registry.registered(NODE, hello(NODE, "first"), client):
                await client.closed.wait()

    async with trio.open_nursery() as nursery, registry.changes() as changes:
        nursery.start_soon(first_agent)
        nursery.start_soon(first_link)
        assert await changes.receive() == LinkUp(NODE, hello(NODE, "first"))
        async with linked(registry, boot="second"):
            await trio.sleep(5)
            assert registry.connected()[NODE].boot_id == "second"
            assert await registry.call(NODE, "GET", "/x")
            assert "took the place" in endings[0].sentence
            assert endings[0].retry_after == 30
            # The end of the first link must not take the second one out.
            assert await changes.receive() == LinkDown(NODE)
            assert await changes.receive() == LinkUp(NODE, hello(NODE, "second"))
            with pytest.raises(trio.WouldBlock):
                changes.receive_nowait()
    assert registry.statistics().replaced == 1
    assert registry.statistics().connected == 0


async def test_all_links_can_be_ended_with_a_time_to_come_back(autojump_clock: trio.testing.MockClock) -> None:
    registry = Registry()
    async with linked(registry), linked(registry, OTHER):
        registry.disconnect_all("The relay restarts.", retry_after=2)
        for node in (NODE, OTHER):
            with pytest.raises(NodeOffline):
                await registry.call(node, "GET", "/x")
