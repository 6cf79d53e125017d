"""The relay's STUN service over real sockets: what it answers, and what it does not let itself be used for."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from agent.connect.listener import reusable
from agent.connect.stun_client import NotObserved, note_again, observe_tcp, observe_udp, udp_behaviour
from protocol import stun
from relay.rendezvous import observe
from relay.rendezvous.observe import Observer


@asynccontextmanager
async def serving(
    noted: Callable[[stun.PortNote, stun.Endpoint], Awaitable[None]] | None = None,
) -> AsyncIterator[tuple[Observer, int]]:
    """An observer on loopback and its TCP port."""
    observer = Observer(noted)
    observer.open("127.0.0.1", (0, 0))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(observer.run)

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await observer.serve_stream(stream)

        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield observer, listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_tcp_port_is_told_how_it_is_seen_and_the_connection_stays() -> None:
    async with serving() as (observer, port):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = probe.getsockname()
        mapped, held = await observe_tcp(local, ("127.0.0.1", port))
        with held:
            assert mapped == local
            await trio.testing.wait_all_tasks_blocked()
            assert observer.statistics().streams == 1
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert observer.statistics().streams == 0
        assert observer.statistics().tcp == 1


async def test_a_port_says_whose_it_is_also_later_on_the_same_connection() -> None:
    seen: list[tuple[stun.PortNote, stun.Endpoint]] = []

    async def noted(note: stun.PortNote, endpoint: stun.Endpoint) -> None:
        await trio.lowlevel.checkpoint()
        seen.append((note, endpoint))

    notes = stun.PortNote(b"a" * 16, 1, 4000), stun.PortNote(b"b" * 16, 0)
    async with serving(noted) as (_, port):
        mapped, held = await observe_tcp(("127.0.0.1", 0), ("127.0.0.1", port), notes[0])
        with held:
            assert note_again(held, notes[1])
            while len(seen) < 2:
                await trio.sleep(0.01)
    assert seen == [(notes[0], mapped), (notes[1], mapped)]
    assert not note_again(held, notes[0])


async def test_one_meeting_that_takes_long_or_fails_holds_up_no_other_of_its_port(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[bytes] = []

    async def noted(note: stun.PortNote, _endpoint: stun.Endpoint) -> None:
        seen.append(note.token)
        if note.token == b"a" * 16:
            # Its agents are away.
            await trio.sleep_forever()
        raise LookupError("a meeting's own fault")

    async with serving(noted) as (observer, port):
        _, held = await observe_tcp(("127.0.0.1", 0), ("127.0.0.1", port), stun.PortNote(b"a" * 16, 0))
        with held:
            for token in (b"b" * 16, b"c" * 16):
                assert note_again(held, stun.PortNote(token, 0))
                with trio.fail_after(5):
                    while token not in seen:
                        await trio.sleep(0.001)
        assert observer.statistics().tcp == 3
    assert sum("a meeting's own fault" in str(record.exc_info) for record in caplog.records) == 2


async def test_a_port_whose_question_was_given_up_can_ask_again_at_once() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with reusable(socket.AF_INET) as holder:
            holder.bind(("127.0.0.1", 0))
            for _ in range(3):
                with trio.move_on_after(0.05) as scope:
                    await observe_tcp(holder.getsockname(), silent.getsockname())
                # Not refused: it waited for an answer.
                assert scope.cancelled_caught


async def test_nobody_there_is_told() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(NotObserved):
            await observe_tcp(("127.0.0.1", 0), probe.getsockname())


async def test_without_descriptors_a_port_is_not_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_family: socket.AddressFamily) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("agent.connect.stun_client.reusable", no_more)
    with pytest.raises(NotObserved):
        await observe_tcp(("127.0.0.1", 0), ("127.0.0.1", 1))


async def test_without_a_nat_udp_is_told_so() -> None:
    async with serving() as (observer, _):
        found = await udp_behaviour("127.0.0.1", observer.ports, frozenset({"127.0.0.1"}))
        assert found.reachable
        assert found.mapping == "none"
        assert found.filtering == "address"
        assert found.mapped is not None
        assert found.mapped[0] == "127.0.0.1"


async def test_an_answer_from_the_other_port_comes_from_the_other_port() -> None:
    async with serving() as (observer, _):
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.bind(("127.0.0.1", 0))
            answer = await observe_udp(sock, ("127.0.0.1", observer.ports[0]), change_port=True)
            assert answer is not None
            assert answer.other is not None
            assert answer.other[1] == observer.ports[1]


async def test_one_address_gets_so_many_answers_and_no_more() -> None:
    async with serving() as (observer, _):
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = stun.encode_request(stun.new_transaction())
            for _ in range(observe.MAX_ANSWERS + 50):
                await sock.sendto(request, ("127.0.0.1", observer.ports[0]))
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.1)
        statistics = observer.statistics()
        assert statistics.udp <= observe.MAX_ANSWERS
        assert statistics.refused >= 1


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 20, b"\x16\x03\x01" + b"\0" * 40, b"\xff" * 2000])
async def test_noise_gets_no_answer_and_harms_nobody(data: bytes) -> None:
    async with serving() as (observer, port):
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.sendto(data, ("127.0.0.1", observer.ports[0]))
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        try:
            await stream.send_all(data)
            await stream.send_eof()
            assert await stream.receive_some(100) == b""
        except trio.BrokenResourceError:
            # Closed on us before all of it was read.
            pass
        await stream.aclose()
        mapped, held = await observe_tcp(("127.0.0.1", 0), ("127.0.0.1", port))
        held.close()
        assert mapped[0] == "127.0.0.1"


async def test_who_has_a_network_of_addresses_holds_no_more_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MAX_STREAMS_OF_ADDRESS", 3)
    observer, ends = Observer(), list[trio.SocketStream]()

    async def come(nursery: trio.Nursery, address: str) -> bool:
        """Whether a connection from there is kept."""
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        monkeypatch.setattr(stream.socket, "getpeername", lambda: (address, 1, 0, 0))
        ends.extend((stream, trio.SocketStream(trio.socket.from_stdlib_socket(ours))))
        before = observer.statistics().refused
        nursery.start_soon(observer.serve_stream, stream)
        await trio.testing.wait_all_tasks_blocked()
        return observer.statistics().refused == before

    async with trio.open_nursery() as nursery:
        assert [await come(nursery, f"2001:db8::{n}") for n in range(1, 6)] == [True] * 3 + [False] * 2
        assert await come(nursery, "2001:db8:1::1")
        nursery.cancel_scope.cancel()
    assert observer.statistics().streams == 0
    for end in ends:
        await end.aclose()


async def test_a_connection_answers_a_bounded_number_of_questions() -> None:
    async with serving() as (_, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        request = stun.encode_request(stun.new_transaction())
        received = b""
        try:
            # One after the other, so that a reset because of unread questions takes no answer away.
            for _ in range(observe.MAX_QUESTIONS + 5):
                await stream.send_all(request)
                received += await stream.receive_some(4096)
        except trio.BrokenResourceError:
            # Closed on us with a question still unread.
            pass
        assert received.count(stun.MAGIC.to_bytes(4, "big")) == observe.MAX_QUESTIONS
        await stream.aclose()
