"""QUIC between two daemons' transports, with their real processes, on loopback."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from agent.connect.quic.transport import QuicTransport
from agent.connect.transport import Connection, Wish
from protocol.candidates import MAPPED_UDP, Candidate, PathAnswer, PathGo, PathOffer
from protocol.identity import NodeKey
from tests.agent.quic_pair import CLIENT, SERVER, SESSION

TASK = "33333333-3333-4333-8333-333333333333"
WISH = Wish(session_id=SESSION, task_id=TASK, kind="control")


def transport(identity: NodeKey, peer: NodeKey) -> QuicTransport:
    async def peer_of(_session_id: str) -> str:
        await trio.lowlevel.checkpoint()
        return peer.certificate_pem

    async def observe(sock: trio.socket.SocketType) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return [Candidate(kind=MAPPED_UDP, host="127.0.0.1", port=sock.getsockname()[1])]

    return QuicTransport(identity, peer_of, observe, lambda rows, _go: rows)


@pytest.mark.timeout(60)
async def test_streams_are_greeted_although_the_offer_was_replaced_while_quic_came_up() -> None:
    client, server = transport(CLIENT, SERVER), transport(SERVER, CLIENT)
    greeted: list[Connection] = []

    async def greet(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        greeted.append(connection)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked()
        offer = PathOffer(
            session_id=SESSION,
            task_id=TASK,
            generation=1,
            token="0" * 32,
            count=1,
            candidates=await client.offer(WISH),
            transports=["quic"],
        )
        answer = PathAnswer(session_id=SESSION, generation=1, candidates=await server.answer(offer))
        go = PathGo(session_id=SESSION, generation=1, start_in=0.0, answer=answer)
        replaced = trio.CancelScope()

        async def serve() -> None:
            with replaced:
                await server.serve(offer, go, greet)

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
            client.doubt(WISH.session_id)
            await trio.testing.wait_all_tasks_blocked()
            third = await client.another(WISH)
            assert third is not None
            while len(greeted) < 3:
                await trio.sleep(0.01)
        assert replaced.cancelled_caught
        for connection in (first, second, third, *greeted):
            connection.sock.close()
        nursery.cancel_scope.cancel()
