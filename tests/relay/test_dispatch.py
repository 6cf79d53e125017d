"""The one port: every kind of caller is told apart by its first bytes, within bounds, over real sockets and TLS."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trustme

from protocol.client_hello import MAX_CLIENT_HELLO, ClientHello, NotTLS
from protocol.errors import ProtocolError
from protocol.link import ALPN
from protocol.places import Places
from protocol.stun import encode_request, new_transaction
from protocol.websocket.orders import SERVER_NAME
from relay.dispatch import Dispatcher, GreetingTimeout, _wants_websocket_tunnel, peek_client_hello
from relay.listen import accept_all


@dataclass
class Port:
    """A dispatcher on a real socket, and what its handlers were given."""

    number: int
    dispatcher: Dispatcher
    ca: trustme.CA
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def context(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    async def raw(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.number)

    async def ask(self, *alpn: str) -> bytes:
        """Connect with TLS, say a word, and return what the handler says back."""
        stream = trio.SSLStream(
            await self.raw(), self.context(*alpn), server_hostname="relay.example", https_compatible=True
        )
        async with stream:
            await stream.send_all(b"word")
            return bytes(await stream.receive_some(100))


@asynccontextmanager
async def port(max_pending: int = 100) -> AsyncIterator[Port]:
    ca = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("relay.example").configure_cert(server_context)

    async def web(stream: trio.SSLStream[trio.SocketStream]) -> None:
        made.seen.append(("web", stream.selected_alpn_protocol()))
        if await stream.receive_some(100) == b"word":
            await stream.send_all(b"web")
        raise LookupError("a handler's own fault")

    async def link(stream: trio.SSLStream[trio.SocketStream]) -> None:
        made.seen.append(("link", stream.selected_alpn_protocol()))
        await stream.receive_some(100)
        await stream.send_all(b"link")

    async def stun(stream: trio.SocketStream) -> None:
        made.seen.append(("stun", None))
        await stream.receive_some(100)
        raise LookupError("a handler's own fault")

    dispatcher = Dispatcher(web=web, link=link, stun=stun, tls_context=server_context, places=Places(max_pending))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    made = Port(listener.socket.getsockname()[1], dispatcher, ca)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_all, [listener], dispatcher.handle, nursery)
        yield made
        nursery.cancel_scope.cancel()


async def test_each_kind_of_caller_reaches_its_handler(caplog: pytest.LogCaptureFixture) -> None:
    async with port() as made:
        assert await made.ask(ALPN) == b"link"
        assert await made.ask("h2", "http/1.1") == b"web"
        assert await made.ask("http/1.1") == b"web"
        assert await made.ask() == b"web"
        assert await made.ask("something-else/9") == b"web"
        assert await made.ask("h2", ALPN) == b"link"
        assert made.seen == [
            ("link", ALPN),
            ("web", "h2"),
            ("web", "http/1.1"),
            ("web", None),
            ("web", None),
            ("link", ALPN),
        ]
        statistics = made.dispatcher.statistics()
        assert (statistics.link, statistics.web, statistics.pending) == (2, 4, 0)
    # The web handler above raises each time; the port went on, and said so.
    assert sum("a handler's own fault" in str(record.exc_info) for record in caplog.records) == 4


async def test_a_fault_while_a_port_is_observed_ends_one_connection_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with port() as made:
        for _ in range(2):
            async with await made.raw() as stream:
                await stream.send_all(encode_request(new_transaction()))
                assert await stream.receive_some(100) == b""
        assert made.seen == [("stun", None)] * 2
        assert made.dispatcher.statistics().stun == 2
    assert sum("a handler's own fault" in str(record.exc_info) for record in caplog.records) == 2


async def greeting(made: Port, *alpn: str) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = made.context(*alpn).wrap_bio(incoming, outgoing, server_hostname="relay.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return client, incoming, outgoing


async def finish_handshake(
    raw: trio.SocketStream, client: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> None:
    with trio.fail_after(10):
        while True:
            try:
                client.do_handshake()
            except ssl.SSLWantReadError:
                data = await raw.receive_some()
                assert data, "the relay closed the connection"
                incoming.write(data)
            else:
                await raw.send_all(outgoing.read())
                return


async def test_a_greeting_spread_over_several_segments_is_understood() -> None:
    async with port() as made, await made.raw() as raw:
        client, incoming, outgoing = await greeting(made, ALPN)
        data = outgoing.read()
        for start in range(0, len(data), 100):
            await raw.send_all(data[start : start + 100])
            await trio.sleep(0.01)
        await finish_handshake(raw, client, incoming, outgoing)
        assert client.selected_alpn_protocol() == ALPN


async def test_a_greeting_spread_over_several_records_is_understood() -> None:
    async with port() as made, await made.raw() as raw:
        client, incoming, outgoing = await greeting(made, ALPN)
        message = outgoing.read()[5:]
        for start in range(0, len(message), 64):
            piece = message[start : start + 64]
            await raw.send_all(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece)
            await trio.sleep(0.002)
        await finish_handshake(raw, client, incoming, outgoing)
        assert client.selected_alpn_protocol() == ALPN


async def test_the_handshake_does_not_stall_on_what_the_peek_left_behind() -> None:
    """The low-water mark used while peeking is back to one byte, or small messages would never be seen."""
    async with port() as made, await made.raw() as raw:
        client, incoming, outgoing = await greeting(made, ALPN)
        data = outgoing.read()
        await raw.send_all(data[:200])
        await trio.sleep(0.02)
        await raw.send_all(data[200:])
        await finish_handshake(raw, client, incoming, outgoing)
        # The handler must wait for its bytes, rather than find them there.
        await trio.sleep(0.1)
        client.write(b"w")
        await raw.send_all(outgoing.read())
        with trio.fail_after(5):
            while True:
                incoming.write(await raw.receive_some())
                try:
                    assert client.read(100) == b"link"
                    return
                except ssl.SSLWantReadError:
                    continue


@pytest.mark.parametrize(
    "word", [b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b"\0\1\2\3", b"PRI * HTTP/2.0"]
)
async def test_callers_without_tls_are_told_so(word: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a caller that sends too little to tell what it is, 16 looks are taken, with a pause between them.
    monkeypatch.setattr("relay.dispatch._PAUSE_MOST", 0.01)
    async with port() as made:
        async with await made.raw() as raw:
            await raw.send_all(word)
            answer = b""
            with trio.fail_after(5):
                while data := await raw.receive_some():
                    answer += data
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"HTTPS only" in answer
        assert made.seen == []
        await trio.testing.wait_all_tasks_blocked()
        assert made.dispatcher.statistics().plain == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\xff\xff" + bytes(100),
        b"\x16\x03\x01\x00\x04\x01\x00\xff\xff",
        b"\x16\x03\x01\x00\x01\x00" * 4000,
        b"\x16\x03\x01\x40\x00\x01\x00\x40\x00" + bytes(MAX_CLIENT_HELLO + 100),
    ],
)
async def test_malformed_and_overlong_greetings_are_closed(data: bytes) -> None:
    async with port() as made:
        async with await made.raw() as raw:
            try:
                await raw.send_all(data)
                with trio.fail_after(5):
                    while await raw.receive_some():
                        pass
            except trio.BrokenResourceError:
                pass
        assert await made.ask(ALPN) == b"link"
        assert made.dispatcher.statistics().failed == 1


async def test_a_caller_that_closes_at_once_is_forgotten() -> None:
    async with port() as made:
        for _ in range(20):
            await trio.aclose_forcefully(await made.raw())
        assert await made.ask(ALPN) == b"link"
        with trio.fail_after(5):
            while made.dispatcher.statistics().failed < 20:
                await trio.sleep(0.01)
        assert made.dispatcher.statistics().pending == 0


@asynccontextmanager
async def accepted() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Both ends of a real TCP connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        theirs = await listener.accept()
        async with ours, theirs:
            yield ours, theirs


async def test_waiting_for_the_rest_of_a_greeting_costs_no_work() -> None:
    async with accepted() as (ours, theirs):
        await ours.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(50))
        before = time.process_time()
        with pytest.raises(GreetingTimeout):
            await peek_client_hello(theirs.socket, timeout=1.0)
        assert time.process_time() - before < 0.2


async def test_a_greeting_that_never_ends_is_given_up_in_time_and_cheaply() -> None:
    """Half a greeting, then the end of the stream: the socket stays readable for ever."""
    async with accepted() as (ours, theirs):
        await ours.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(50))
        await ours.send_eof()
        before = time.process_time()
        with pytest.raises(GreetingTimeout):
            await peek_client_hello(theirs.socket, timeout=1.0)
        assert time.process_time() - before < 0.2


async def test_a_greeting_sent_byte_by_byte_is_not_looked_at_for_every_byte() -> None:
    async with accepted() as (ours, theirs), trio.open_nursery() as nursery:

        async def drip() -> None:
            await ours.send_all(b"\x16\x03\x01\x00\x04\x01\x00\x40\x00")
            while True:
                await ours.send_all(b"\x16\x03\x01\x00\x01\x00")
                await trio.sleep(0.0005)

        looks = 0
        sock = theirs.socket
        real = sock.recv

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(sock, name)

            def fileno(self) -> int:
                return sock.fileno()

            async def recv(self, *options: Any) -> bytes:
                nonlocal looks
                looks += 1
                return await real(*options)

        nursery.start_soon(drip)
        with pytest.raises(GreetingTimeout):
            await peek_client_hello(Counting(), timeout=1.0)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()
    assert 16 < looks < 40


async def test_a_silent_caller_is_given_up_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with accepted() as (_, theirs):
        with pytest.raises(GreetingTimeout):
            await peek_client_hello(theirs.socket)
        assert trio.current_time() == pytest.approx(10)


async def test_the_peek_takes_nothing_away() -> None:
    async with accepted() as (ours, theirs):
        await ours.send_all(b"GET /")
        with pytest.raises(NotTLS):
            await peek_client_hello(theirs.socket)
        assert await theirs.receive_some() == b"GET /"


async def test_a_greeting_longer_than_the_bound_is_refused() -> None:
    async with accepted() as (ours, theirs), trio.open_nursery() as nursery:
        endless = b"\x16\x03\x01\x00\x04\x01\x00\x40\x00" + b"\x16\x03\x01\x00\x01\x00" * 5000
        nursery.start_soon(ours.send_all, endless)
        with pytest.raises(ProtocolError, match="too long"):
            await peek_client_hello(theirs.socket)
        nursery.cancel_scope.cancel()


async def test_more_unfinished_handshakes_than_allowed_are_turned_away() -> None:
    async with port(max_pending=3) as made:
        idle = [await made.raw() for _ in range(3)]
        with trio.fail_after(5):
            while made.dispatcher.statistics().pending < 3:
                await trio.sleep(0.01)
        async with await made.raw() as extra:
            with trio.fail_after(5):
                assert await extra.receive_some() == b""
        assert made.dispatcher.statistics().refused == 1
        for stream in idle:
            await stream.aclose()
        with trio.fail_after(5):
            while made.dispatcher.statistics().pending:
                await trio.sleep(0.01)
        assert await made.ask(ALPN) == b"link"


async def test_one_caller_with_idle_connections_keeps_nobody_else_out() -> None:
    async with port(max_pending=8) as made:
        idle = [await made.raw() for _ in range(30)]
        with trio.fail_after(5):
            while made.dispatcher.statistics().refused < 24:
                await trio.sleep(0.01)
        # Linux has all of 127.0.0.0/8.
        raw = await trio.open_tcp_stream("127.0.0.1", made.number, local_address="127.0.0.2")
        stream = trio.SSLStream(raw, made.context(ALPN), server_hostname="relay.example", https_compatible=True)
        async with stream:
            await stream.send_all(b"word")
            with trio.fail_after(5):
                assert await stream.receive_some(100) == b"link"
        for each in idle:
            await each.aclose()


@pytest.mark.parametrize(
    ("name", "alpn", "taken"),
    [
        (None, ("http/1.1", "http/1.0"), True),
        ("relay.example", ("http/1.1", "http/1.0"), True),
        (SERVER_NAME, (), True),
        (SERVER_NAME, ("http/1.1",), True),
        (SERVER_NAME, ("h2", "http/1.1"), False),
        (SERVER_NAME, (ALPN,), False),
        ("relay.example", (), False),
        ("relay.example", ("http/1.1",), False),
        (f"a.{SERVER_NAME}", ("http/1.1",), False),
        (None, (), False),
    ],
)
def test_tunnels_inside_websocket_are_known_by_their_greeting(
    name: str | None, alpn: tuple[str, ...], taken: bool
) -> None:
    assert _wants_websocket_tunnel(ClientHello(server_name=name, alpn=alpn)) is taken
