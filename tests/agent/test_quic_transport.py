"""QUIC between two daemons' transports, with their real processes, on loopback."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import AsyncIterator

import psutil
import pytest
import trio
import trio.testing

from agent.connect.network import DialAllowance
from agent.connect.quic.process import Begin
from agent.connect.quic.punch_udp import QuicFailed
from agent.connect.quic.transport import AHEAD_LIFE, MAX_AHEAD, QuicTransport, _Live
from agent.connect.transport import Connection, Wish
from protocol.candidates import MAPPED_UDP, Candidate, PathAnswer, PathGo, PathOffer
from protocol.identity import NodeKey
from protocol.standstill import LOOK_EVERY, STOPPED_FOR
from tests.agent.quic_pair import CLIENT, SERVER, SESSION

TASK = "33333333-3333-4333-8333-333333333333"
WISH = Wish(session_id=SESSION, task_id=TASK, kind="control")


def transport(identity: NodeKey, peer: NodeKey, looks: list[int] | None = None) -> QuicTransport:
    async def peer_of(_session_id: str) -> str:
        await trio.lowlevel.checkpoint()
        return peer.certificate_pem

    async def observe(sock: trio.socket.SocketType) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        if looks is not None:
            looks.append(sock.getsockname()[1])
        return [Candidate(kind=MAPPED_UDP, host="127.0.0.1", port=sock.getsockname()[1])]

    return QuicTransport(identity, peer_of, observe, lambda rows, _go: rows, instance="the server's")


class Greeted:
    """Who was greeted at the server's end."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []

    async def take(self, connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        self.connections.append(connection)


@contextlib.asynccontextmanager
async def both_running() -> AsyncIterator[tuple[QuicTransport, QuicTransport, trio.Nursery, Greeted]]:
    """Client and server with their processes, until the end of the block, and a nursery that ends with them."""
    client, server = transport(CLIENT, SERVER), transport(SERVER, CLIENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        yield client, server, nursery, Greeted()
        nursery.cancel_scope.cancel()


async def arranged(client: QuicTransport, server: QuicTransport, *, probe: bool = False) -> tuple[PathOffer, PathGo]:
    """An offer of the client's, and the go for it."""
    offer = PathOffer(
        session_id=SESSION,
        task_id=TASK,
        generation=1,
        token="0" * 32,
        count=1,
        candidates=await client.offer(WISH),
        transports=["quic"],
        probe=probe,
    )
    answer = PathAnswer(session_id=SESSION, generation=1, candidates=await server.answer(offer))
    return offer, PathGo(session_id=SESSION, generation=1, start_in=0.0, answer=answer)


async def nobody(_connection: Connection) -> None:
    raise AssertionError("a look brings no connection")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("shown", "allowed", "sentence"),
    [
        (SERVER, 1, ""),
        # Another node than the task's source answers.
        (CLIENT, 1, "UDP gets through, but no QUIC came up on it: The peer over QUIC is not the node"),
        (SERVER, 0, "UDP gets through, but no QUIC came up on it: The peer did not answer"),
    ],
)
async def test_a_look_makes_the_handshake_with_the_source_and_no_more(
    monkeypatch: pytest.MonkeyPatch, shown: NodeKey, allowed: int, sentence: str
) -> None:
    if not allowed:
        monkeypatch.setattr("agent.connect.quic.transport.LOOK_TIMEOUT", 0.5)
    client, server = transport(CLIENT, shown), transport(SERVER, CLIENT)
    server._look_allowance = DialAllowance(0.0, allowed, 0.0)
    shake_hands, shaken = server._shake_hands, 0

    async def counted(begin: Begin, sock: trio.socket.SocketType) -> None:
        nonlocal shaken
        shaken += 1
        await shake_hands(begin, sock)

    monkeypatch.setattr(server, "_shake_hands", counted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        offer, go = await arranged(client, server, probe=True)

        async def serve() -> None:
            with contextlib.suppress(QuicFailed):
                await server.serve(offer, go, nobody)

        nursery.start_soon(serve)
        said = ""
        try:
            await client.look(WISH, go)
        except QuicFailed as error:
            said = error.sentence
        assert said.startswith(sentence)
        assert bool(said) == bool(sentence)
        assert shaken == allowed
        assert not client._live
        assert not server._live
        nursery.cancel_scope.cancel()


async def test_an_answer_has_the_socket_that_was_looked_at_when_the_session_was_ordered() -> None:
    looks: list[int] = []
    client, server = transport(CLIENT, SERVER), transport(SERVER, CLIENT, looks)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        server.prepare(SESSION)
        server.prepare(SESSION)
        _, go = await arranged(client, server)
        assert go.answer is not None
        assert [row.port for row in go.answer.candidates] == looks
        assert len(looks) == 1
        assert not server._ahead
        # The next offer gets a port of its own.
        _, go = await arranged(client, server)
        assert go.answer is not None
        assert [row.port for row in go.answer.candidates] == looks[1:]
        nursery.cancel_scope.cancel()


async def test_who_leaves_while_a_socket_is_looked_at_leaves_it_to_the_next_one() -> None:
    """As when the link to the relay breaks between an offer and its answer."""
    looked = trio.Event()

    async def observe(sock: trio.socket.SocketType) -> list[Candidate]:
        # The relay's UDP does not come through.
        with trio.move_on_after(0.1):
            await sock.recvfrom(1)
        looked.set()
        return [Candidate(kind=MAPPED_UDP, host="127.0.0.1", port=sock.getsockname()[1])]

    async with trio.open_nursery() as nursery:
        client, server = transport(CLIENT, SERVER), transport(SERVER, CLIENT)
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        offer, _ = await arranged(client, server)
        server._observe = observe
        server.prepare(SESSION)
        await trio.testing.wait_all_tasks_blocked()
        port = server._ahead[SESSION].sock.getsockname()[1]
        with trio.move_on_after(0.01) as scope:
            await server.answer(offer)
        assert scope.cancelled_caught
        assert not looked.is_set()
        assert [row.port for row in await server.answer(offer)] == [port]
        nursery.cancel_scope.cancel()


async def test_without_descriptors_there_is_no_quic_and_all_else_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    client, server = transport(CLIENT, SERVER), transport(SERVER, CLIENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        offer, _ = await arranged(client, server)
        monkeypatch.setattr("agent.connect.quic.transport.open_udp", no_more)
        server.prepare(SESSION)
        assert not server._ahead
        assert await server.answer(offer) == []
        assert await client.offer(WISH) == []
        # Nor is there one to move to.
        (sock, _), *_ = client._sockets.values()
        client._live[SESSION, "client"] = _Live(sock, ("127.0.0.1", 1))
        await client.moved()
        nursery.cancel_scope.cancel()


async def test_sockets_for_offers_that_do_not_come_are_closed_and_bounded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = transport(SERVER, CLIENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(MAX_AHEAD + 3):
            server.prepare(f"session {number}")
        kept = [ahead.sock for ahead in server._ahead.values()]
        assert len(kept) == MAX_AHEAD
        await trio.sleep(AHEAD_LIFE + 1)
        assert not server._ahead
        assert {sock.fileno() for sock in kept} == {-1}
        nursery.cancel_scope.cancel()


@pytest.mark.timeout(60)
async def test_streams_are_greeted_although_the_offer_was_replaced_while_quic_came_up() -> None:
    async with both_running() as (client, server, nursery, greeted):
        offer, go = await arranged(client, server)
        replaced = trio.CancelScope()

        async def serve() -> None:
            with replaced:
                await server.serve(offer, go, greeted.take)

        async def replace() -> None:
            while not server._live:
                await trio.sleep(0.002)
            replaced.cancel()

        nursery.start_soon(serve)
        nursery.start_soon(replace)
        with trio.fail_after(40):
            first = await client.connect(WISH, go)
            second = await client.another(WISH)
            assert second is not None
            # Who is there has nothing to fear of a doubt.
            for instance in ("", "the server's"):
                client.doubt(WISH.session_id, instance)
            await trio.testing.wait_all_tasks_blocked()
            third = await client.another(WISH)
            assert third is not None
            while len(greeted.connections) < 3:
                await trio.sleep(0.01)
        assert replaced.cancelled_caught
        for connection in (first, second, third, *greeted.connections):
            connection.sock.close()


@pytest.mark.soak
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
async def test_processes_that_were_stopped_are_ended_and_others_take_their_place() -> None:
    """With SIGSTOP, at both ends: until then the connection opens no more streams."""
    async with both_running() as (client, server, nursery, greeted):

        async def connected() -> Connection:
            offer, go = await arranged(client, server)
            nursery.start_soon(server.serve, offer, go, greeted.take)
            with trio.fail_after(40):
                return await client.connect(WISH, go)

        first = await connected()
        stopped = [child for child in psutil.Process().children() if "agent.connect.quic.process" in child.cmdline()]
        assert len(stopped) == 2
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        with trio.fail_after(STOPPED_FOR + 4 * LOOK_EVERY):
            while client._live or server._live:
                await trio.sleep(0.1)
        # Who reads from a stream of it hears of that at once.
        assert first.sock.recv(1) == b""
        again = await connected()
        with trio.fail_after(10):
            while len(greeted.connections) < 2:
                await trio.sleep(0.01)
        for connection in (first, again, *greeted.connections):
            connection.sock.close()
