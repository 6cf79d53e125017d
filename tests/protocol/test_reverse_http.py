"""The reversed HTTP/2 connection: what an application and a caller see of each other."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from protocol.reverse_http import (
    DEFAULT_LIMITS,
    AnswerTooLarge,
    CallerLeft,
    CallReset,
    Client,
    Limits,
    LinkLost,
    connect,
    serve,
)
from protocol.reverse_http.carrier import Carrier
from protocol.reverse_http.headers import request_headers


@asynccontextmanager
async def linked(app: Any, limits: Limits = DEFAULT_LIMITS, **options: Any) -> AsyncIterator[Client]:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(ours, app, limits=limits, **options))
        async with connect(theirs, limits=limits) as client:
            yield client


async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/octet-stream")


async def describe(request: Request) -> Response:
    return JSONResponse(
        {
            "path": request.url.path,
            "raw_path": request.scope["raw_path"].decode(),
            "query": request.scope["query_string"].decode(),
            "method": request.method,
            "word": request.headers.get("x-word"),
            "state": request.state.word,
        }
    )


STARLETTE = Starlette(routes=[Route("/echo", echo, methods=["POST", "PUT"]), Route("/{rest:path}", describe)])


async def test_a_starlette_application_answers() -> None:
    async with linked(STARLETTE, state={"word": "shared"}) as client:
        answer = await client.request("GET", "/a%20b/%C3%A9?x=1&x=2", headers=[(b"X-Word", b"hello")])
    assert answer.status == 200
    assert dict(answer.headers)[b"content-type"] == b"application/json"
    assert msgspec.json.decode(answer.body) == {
        "path": "/a b/é",
        "raw_path": "/a%20b/%C3%A9",
        "query": "x=1&x=2",
        "method": "GET",
        "word": "hello",
        "state": "shared",
    }


async def test_large_bodies_go_both_ways_unchanged() -> None:
    body = bytes(range(256)) * 20_000
    async with linked(STARLETTE) as client:
        answer = await client.request("POST", "/echo", body=body)
    assert answer.body == body


async def test_many_large_bodies_at_once_share_the_connection() -> None:
    bodies = [bytes([n]) * 600_000 for n in range(12)]
    answers: dict[int, bytes] = {}

    async with linked(STARLETTE) as client:

        async def one(n: int) -> None:
            answers[n] = (await client.request("PUT", "/echo", body=bodies[n])).body

        async with trio.open_nursery() as nursery:
            for n in range(len(bodies)):
                nursery.start_soon(one, n)
    assert [answers[n] for n in range(len(bodies))] == bodies


async def test_the_answer_to_head_has_no_body_and_keeps_its_length() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("eight by")(scope, receive, send)

    async with linked(app) as client:
        answer = await client.request("HEAD", "/")
    assert answer.body == b""
    assert dict(answer.headers)[b"content-length"] == b"8"


async def test_an_error_of_the_application_is_a_500_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("private detail")

    async with linked(app) as client:
        answer = await client.request("GET", "/")
    assert answer.status == 500
    assert msgspec.json.decode(answer.body)["class"] == "retry"
    assert b"private detail" not in answer.body
    assert any(record.exc_info and "private detail" in str(record.exc_info[1]) for record in caplog.records)


async def test_an_application_that_makes_no_answer_is_a_500() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    async with linked(app) as client:
        assert (await client.request("GET", "/")).status == 500


async def test_an_application_that_dies_in_the_middle_resets_its_stream_only() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if scope["path"] == "/dies":
            raise LookupError("in the middle")
        await send({"type": "http.response.body", "body": b" whole"})

    async with linked(app) as client:
        with pytest.raises(CallReset):
            await client.request("GET", "/dies")
        assert (await client.request("GET", "/lives")).body == b"half whole"


@pytest.mark.parametrize("declared", [b"3", b"5"])
async def test_a_body_that_is_not_as_long_as_declared_never_looks_complete(declared: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = declared if scope["path"] == "/wrong" else b"4"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": b"four"})

    async with linked(app) as client:
        with pytest.raises(CallReset):
            await client.request("GET", "/wrong")
        assert (await client.request("GET", "/right")).body == b"four"


async def test_malformed_headers_of_the_application_do_not_damage_the_connection() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        evil = [(b"x-one", b"fine"), (b"x-evil", b"a\r\nb: c")] if scope["path"] == "/evil" else []
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-shared", b"word"), *evil]})
        await send({"type": "http.response.body", "body": b"ok"})

    async with linked(app) as client:
        assert (await client.request("GET", "/evil")).status == 500
        answer = await client.request("GET", "/good")
    assert dict(answer.headers)[b"x-shared"] == b"word"


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "no-slash", []),
        ("GET", "/sp ace", []),
        ("GET", "/new\nline", []),
        ("get", "/", []),
        ("GET", "/", [(b"bad name", b"x")]),
        ("GET", "/", [(b"x", b"a\0b")]),
        ("GET", "/", [(b"Content-Length", b"5")]),
        ("GET", "/", [(b":path", b"/other")]),
        ("GET", "/", [(b"x", b"y" * 70_000)]),
        ("GET", "/" + "a" * 70_000, []),
    ],
)
async def test_malformed_requests_are_refused_before_they_are_sent(
    method: str, target: str, headers: list[tuple[bytes, bytes]]
) -> None:
    async with linked(STARLETTE, state={"word": ""}) as client:
        with pytest.raises(ValueError):
            await client.request(method, target, headers=headers)
        assert (await client.request("GET", "/fine")).status == 200


async def test_a_request_longer_than_allowed_is_answered_413() -> None:
    limits = Limits(max_body=100_000)
    async with linked(STARLETTE, limits, state={"word": ""}) as client:
        answer = await client.request("POST", "/echo", body=b"x" * 3_000_000)
        assert (answer.status, msgspec.json.decode(answer.body)["code"]) == (413, "TOO_LARGE")
        assert (await client.request("POST", "/echo", body=b"x" * 100_000)).status == 200


async def test_a_long_body_of_undeclared_length_is_stopped_where_it_gets_too_long() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    limits = Limits(max_body=100_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(ours, STARLETTE, limits=limits))
        carrier = Carrier(theirs, client=True, limits=limits)
        nursery.start_soon(carrier.run)
        channel = carrier.start(request_headers("POST", "/echo", [], None, 65536), end=False)
        with pytest.raises((CallReset, LinkLost)):
            await carrier.send(channel, b"x" * 3_000_000, end=True)
        assert (b":status", b"413") in await channel.wait_headers()
        carrier.close("done")


async def test_an_answer_longer_than_wanted_is_given_up() -> None:
    async with linked(STARLETTE, state={"word": ""}) as client:
        with pytest.raises(AnswerTooLarge):
            await client.request("POST", "/echo", body=b"x" * 1_000_000, max_body=999_999)
        assert (await client.request("POST", "/echo", body=b"x" * 1000, max_body=1000)).status == 200


async def test_an_answer_before_the_request_is_complete_is_whole() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("enough")(scope, receive, send)

    async with linked(app) as client:
        for _ in range(20):
            assert (await client.request("POST", "/", body=b"x" * 2_000_000)).body == b"enough"


async def test_the_application_sees_that_its_caller_left(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.request"
        seen.append((await receive())["type"])
        with pytest.raises(CallerLeft):
            await send({"type": "http.response.body", "body": b"too late"})
        seen.append("send refused")

    async with linked(app) as client:
        async with client.stream("GET", "/"):
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["http.disconnect", "send refused"]


async def test_requests_see_the_connection_end(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        seen.append((await receive())["type"])

    async with linked(app) as client, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(LinkLost, match="enough of this"):
                await client.request("GET", "/")

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        client.close("enough of this")
    assert seen == ["http.disconnect"]


async def test_a_handler_that_ignores_its_callers_leaving_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    async with linked(app, Limits(handler_grace=3)) as client:
        start = trio.current_time()
        with trio.move_on_after(1):
            await client.request("GET", "/")
        await trio.sleep(10)
        assert ended == [pytest.approx(start + 4)]


async def test_starlette_stops_a_stream_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    stopped = trio.Event()

    class Lines:
        def __aiter__(self) -> Lines:
            return self

        async def __anext__(self) -> bytes:
            await trio.lowlevel.checkpoint()
            return b"line\n"

    async def endless(request: Request) -> Response:
        return StreamingResponse(Lines(), media_type="application/x-ndjson")

    starlette = Starlette(routes=[Route("/", endless)])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await starlette(scope, receive, send)
        finally:
            stopped.set()

    caplog.set_level(logging.ERROR)
    async with linked(app) as client:
        async with client.stream("GET", "/") as answer:
            assert (await anext(answer)).startswith(b"line\n")
        with trio.fail_after(5):
            await stopped.wait()
    assert not caplog.records


async def test_an_error_in_the_callers_block_is_raised_as_it_is() -> None:
    with pytest.raises(LookupError, match="mine"):
        async with linked_client_only() as client:
            assert client is not None
            raise LookupError("mine")


@asynccontextmanager
async def linked_client_only() -> AsyncIterator[Client]:
    _, theirs = trio.testing.memory_stream_pair()
    async with connect(theirs, limits=Limits(flush=0.01)) as client:
        yield client


async def test_serve_says_why_the_connection_ended() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    endings: list[Any] = []

    async def agent() -> None:
        endings.append(await serve(ours, STARLETTE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent)
        async with connect(theirs) as client:
            client.close("Come back later.", retry_after=42.0)
    assert (endings[0].sentence, endings[0].retry_after, endings[0].said) == ("Come back later.", 42.0, True)


async def test_calls_on_a_closed_connection_fail_at_once() -> None:
    async with linked(STARLETTE, state={"word": ""}) as client:
        client.close("over")
        with trio.fail_after(1), pytest.raises(LinkLost, match="over"):
            await client.request("GET", "/")
