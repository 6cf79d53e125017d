"""Hostile HTTP/2 at the relay's web server: the one connection ends or is held up, memory stays, others are served."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import hyperframe.frame as frames
import psutil
import pytest
import trio
import trustme

from relay.web import WebServer

CA = trustme.CA()
LEAF = CA.issue_cert("localhost")
REQUEST = [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "localhost")]
COUNT = 2000
PIECE, MIB = 65536, 2**20


class Application:
    """Answers at once with ``size`` bytes; counts how many requests it has at a time."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.now = self.most = self.calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(max(1, self.size // PIECE)):
                await send({"type": "http.response.body", "body": bytes(min(self.size, PIECE)), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.now -= 1


def _context(*, server: bool) -> ssl.SSLContext:
    if server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        LEAF.configure_cert(context)
    else:
        context = ssl.create_default_context()
        CA.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    return context


@asynccontextmanager
async def serving(app: Application) -> AsyncIterator[int]:
    web = WebServer(app, max_connections=10)
    context = _context(server=True)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await secured.do_handshake()
            await web.serve(secured)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # A hostile caller may leave as it likes.
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def connected(port: int) -> tuple[trio.SSLStream[trio.SocketStream], h2.connection.H2Connection]:
    raw = await trio.open_tcp_stream("127.0.0.1", port)
    stream = trio.SSLStream(raw, _context(server=False), server_hostname="localhost", https_compatible=True)
    machine = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    machine.initiate_connection()
    await stream.send_all(machine.data_to_send())
    return stream, machine


async def ask(port: int) -> bytes:
    """One honest request on a connection of its own."""
    stream, machine = await connected(port)
    content = bytearray()
    async with stream:
        machine.send_headers(1, REQUEST, end_stream=True)
        await stream.send_all(machine.data_to_send())
        while True:
            for event in machine.receive_data(bytes(await stream.receive_some())):
                if isinstance(event, h2.events.DataReceived):
                    content += event.data
                    machine.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, h2.events.StreamEnded):
                    return bytes(content)
            await stream.send_all(machine.data_to_send())


async def test_nobody_goes_over_to_another_protocol_half_way() -> None:
    """A reverse proxy that lets agents' WebSocket pass takes part in what is said no more after an upgrade."""
    context = ssl.create_default_context()
    CA.configure_trust(context)
    asks = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    with trio.fail_after(10):
        async with serving(Application()) as port:
            raw = await trio.open_tcp_stream("127.0.0.1", port)
            async with trio.SSLStream(raw, context, server_hostname="localhost", https_compatible=True) as stream:
                await stream.send_all(asks + b"HTTP2-Settings: AAMAAABk\r\n\r\n")
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")


def literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def request(number: int, method: bytes, path: bytes | None, *, ends: bool = True) -> bytes:
    where = b"" if path is None else literal(b":scheme", b"https") + literal(b":path", path)
    frame = frames.HeadersFrame(number, literal(b":method", method) + where + literal(b":authority", b"localhost"))
    frame.flags.add("END_HEADERS")
    if ends:
        frame.flags.add("END_STREAM")
    return frame.serialize()


# What a reverse proxy may pass on from one caller beside the requests of others.
ODDITIES = {
    "sends more after the answer": request(1, b"POST", b"/", ends=False),
    "opens a tunnel": request(1, b"CONNECT", None, ends=False),
    "opens a tunnel in small letters": request(1, b"connect", b"/", ends=False),
    "has no ASCII in its path": request(1, b"GET", b"/\xff", ends=False),
    "has no ASCII in its method": request(1, b"G\xc3\xa9T", b"/", ends=False),
}


@pytest.mark.parametrize("oddity", ODDITIES.values(), ids=ODDITIES)
async def test_an_odd_request_ends_no_other_of_its_connection(oddity: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with trio.fail_after(10):
        async with serving(Application()) as port:
            stream, machine = await connected(port)
            async with stream:
                # So that it expects the answers; what is sent is made by hand.
                machine.send_headers(1, REQUEST)
                await stream.send_all(oddity + frames.DataFrame(1, b"x").serialize())
                await ended(stream, machine, 1)
                await stream.send_all(frames.DataFrame(1, b"y").serialize() * 3)
                machine.send_headers(3, REQUEST, end_stream=True)
                await stream.send_all(headers(3))
                await ended(stream, machine, 3)
    assert "Traceback" not in caplog.text


async def ended(stream: trio.SSLStream[trio.SocketStream], machine: h2.connection.H2Connection, number: int) -> None:
    while True:
        data = bytes(await stream.receive_some())
        assert data, "the connection was ended"
        happened = machine.receive_data(data)
        if any(isinstance(event, h2.events.StreamEnded) and event.stream_id == number for event in happened):
            return


async def test_a_frame_longer_than_agreed_ends_the_connection_before_it_has_come() -> None:
    """The length has 24 bits: waiting for the whole frame keeps 16 MiB of every connection in memory."""
    with trio.fail_after(10):
        async with serving(Application()) as port:
            stream, _ = await connected(port)
            async with stream:
                # One of a kind that nobody knows, as long as is allowed; and the header of one that is longer, in two.
                await stream.send_all(b"\x00\x40\x00\xfa\x00" + bytes(4 + 16384) + b"\x00\x40\x01")
                await stream.send_all(b"\xfa\x00" + bytes(4))
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass


@pytest.mark.parametrize(
    ("asks", "answers"),
    [
        (b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n", 2),
        # RFC 9112, 6.1: whoever passed it on may have taken the other one for its end.
        (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", 0),
    ],
    ids=["websocket", "two lengths"],
)
async def test_a_second_request_is_what_everybody_on_the_way_takes_for_one(
    asks: bytes, answers: int, caplog: pytest.LogCaptureFixture
) -> None:
    line = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    body = b"0\r\n\r\n" if b"chunked" in asks else b""
    context = ssl.create_default_context()
    CA.configure_trust(context)
    with trio.fail_after(10):
        async with serving(Application()) as port:
            raw = await trio.open_tcp_stream("127.0.0.1", port)
            async with trio.SSLStream(raw, context, server_hostname="localhost", https_compatible=True) as stream:
                await stream.send_all(line + asks + b"\r\n" + body + line + b"Connection: close\r\n\r\n")
                got = b"".join([bytes(data) async for data in stream])
    assert got.count(b"HTTP/1.1 200") == answers
    assert got.count(b"HTTP/1.1 400") == (0 if answers else 1)
    assert "Traceback" not in caplog.text


def headers(number: int, *, ends: bool = True) -> bytes:
    frame = frames.HeadersFrame(number, b"\x82\x84\x87\x01\x09localhost")
    frame.flags.add("END_STREAM")
    if ends:
        frame.flags.add("END_HEADERS")
    return frame.serialize()


def rapid_reset() -> Iterator[bytes]:
    for number in range(1, 2 * COUNT, 2):
        yield headers(number) + frames.RstStreamFrame(number, error_code=8).serialize()


def pings() -> Iterator[bytes]:
    for _ in range(COUNT):
        yield frames.PingFrame(0, opaque_data=b"12345678").serialize()


def settings() -> Iterator[bytes]:
    for number in range(COUNT):
        yield frames.SettingsFrame(0, {4: 65535 + number % 2}).serialize()


def priorities() -> Iterator[bytes]:
    for number in range(COUNT):
        yield frames.PriorityFrame(2 * number + 1, depends_on=0, stream_weight=1).serialize()


def continuation() -> Iterator[bytes]:
    yield headers(1, ends=False)
    for _ in range(COUNT):
        yield frames.ContinuationFrame(1, b"\x00\x01a" + b"\x7f\x81\x78" + b"b" * 247).serialize()


def header_bomb() -> Iterator[bytes]:
    """One long value in the table, named again and again."""
    first = b"\x40\x01x\x7f\x81\x1e" + b"v" * 4000
    for number in range(1, 200, 2):
        frame = frames.HeadersFrame(
            number, b"\x82\x84\x87\x01\x09localhost" + (first if number == 1 else b"") + b"\xbe" * 9000
        )
        frame.flags.add("END_HEADERS")
        frame.flags.add("END_STREAM")
        yield frame.serialize()


def windows() -> Iterator[bytes]:
    """Asks for much and gives credit of one byte at a time."""
    yield frames.SettingsFrame(0, {4: 1}).serialize()
    for number in range(1, 101, 2):
        yield headers(number)
    for index in range(COUNT):
        yield frames.WindowUpdateFrame(2 * (index % 50) + 1, window_increment=1).serialize()


FLOODS: list[tuple[Callable[[], Iterator[bytes]], int]] = [
    (rapid_reset, 2),
    (pings, 2),
    (settings, 2),
    (priorities, 2),
    (continuation, 2),
    (header_bomb, 2),
    (windows, 4 * MIB),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("flood", "size"), FLOODS, ids=[flood.__name__ for flood, _ in FLOODS])
async def test_a_flood_costs_the_others_nothing_and_no_memory_stays(
    flood: Callable[[], Iterator[bytes]], size: int
) -> None:
    app = Application(size)
    async with serving(app) as port:
        await ask(port)
        before = psutil.Process().memory_info().rss
        sent = 0
        async with trio.open_nursery() as nursery:

            async def attack() -> None:
                nonlocal sent
                stream, _ = await connected(port)
                try:
                    for data in flood():
                        await stream.send_all(data)
                        sent += 1
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    # It was ended, as it should be.
                    return
                finally:
                    await trio.aclose_forcefully(stream)

            nursery.start_soon(attack)
            with trio.fail_after(30):
                for _ in range(5):
                    assert len(await ask(port)) == size
            with trio.move_on_after(10):
                while nursery.child_tasks:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        grown = (psutil.Process().memory_info().rss - before) / MIB
        served = f"{app.calls} requests, at most {app.most} at a time"
        print(f"{flood.__name__}: {sent} frames taken, {served}, {grown:.0f} MiB more")
        # What the web server allows one connection, and the honest one.
        assert app.most <= 102
        assert grown < 150
