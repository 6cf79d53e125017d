"""What the relay arranges with the order, over real sockets: who dials whom at once, and ports shown for punching."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from protocol.candidates import MEETING, Arrangement, Candidate, PathGo, PathOffer
from protocol.control import Party, SessionOrder
from protocol.reversal import preamble
from tests.agent.paths_world import SESSION, TASK, World, answer, at, keep_addresses_back, world


@asynccontextmanager
async def arranged(token: str = "ab" * 16) -> AsyncIterator[tuple[World, SessionOrder]]:
    """The source cannot be dialled; the relay has told it with its session to dial the destination."""
    async with world() as made:
        port = made.destination.network.data_port
        assert port is not None
        made.finder.take_answer(answer())
        made.finder.take_arrangement(Arrangement(token=token, count=2))
        party = Party(endpoint_id="", node_id="", collection_id="", certificate="")
        there = Arrangement(token=token, count=2, candidates=[at(port.port)])
        order = SessionOrder(session_id=SESSION, task_id=TASK, ticket="", peer=party, arranged=there)
        yield made, order


async def test_a_source_that_was_told_so_with_its_session_dials_for_both_connections() -> None:
    async with arranged() as (made, order):
        made.finder.begin()
        await trio.testing.wait_all_tasks_blocked()
        made.source.introductions.arrange(order)
        connections = [await made.finder.connect() for _ in range(2)]
        assert [row.path.kind for row in connections] == ["reversed"] * 2
        for row in connections:
            row.sock.close()


async def test_a_token_that_two_wait_for_takes_nobody_down() -> None:
    """As when a relay arranges the same for two tasks."""
    async with world() as made:
        port = made.destination.network.data_port
        assert port is not None
        come: list[str] = []

        def arrived(name: str, sock: socket.socket) -> None:
            sock.close()
            come.append(name)

        token = "ab" * 16
        with port.expecting(token, partial(arrived, "first")):
            with port.expecting(token, partial(arrived, "second")):
                pass
            with port.expecting(token, partial(arrived, "third")):
                stream = await trio.open_tcp_stream("127.0.0.1", port.port)
                async with stream:
                    await stream.send_all(preamble(token))
                    with trio.fail_after(5):
                        while not come:
                            await trio.sleep(0.001)
        assert come == ["third"]
        assert not port._expected


async def test_what_is_arranged_outlives_the_destinations_own_offer_and_ends_with_the_session() -> None:
    async with arranged() as (made, order):
        made.source.introductions.arrange(order)
        await made.source.introductions.offer(
            PathOffer(session_id=SESSION, task_id=TASK, generation=1, token="cd" * 16, count=1), own=False
        )
        assert SESSION in made.source.introductions._arranged
        made.source.introductions.cut(SESSION)
        assert not made.source.introductions._arranged
        assert not made.source.introductions._current


@pytest.mark.parametrize("wrong", [{"token": "short"}, {"count": 0}, {"count": 1000}])
async def test_a_malformed_arrangement_is_left_alone(wrong: dict[str, Any]) -> None:
    async with arranged() as (made, order):
        assert order.arranged is not None
        there = msgspec.structs.replace(order.arranged, **wrong)
        made.source.introductions.arrange(msgspec.structs.replace(order, arranged=there))
        assert not made.source.introductions._arranged
        made.finder.take_arrangement(there)
        made.finder.begin()
        await trio.testing.wait_all_tasks_blocked()


async def test_an_arrangement_makes_nobody_dial_what_may_not_be_dialled() -> None:
    async with arranged() as (made, order):
        made.source.network.allow_loopback = False
        made.source.introductions.arrange(order)
        assert made.source.introductions._arranged[SESSION].usable == []


@asynccontextmanager
async def meeting() -> AsyncIterator[tuple[World, SessionOrder]]:
    """Nobody can be dialled, and the relay has both show it their ports."""
    async with world() as made:
        keep_addresses_back(made.source, made.destination)
        for_destination, for_source = made.signalling.arrange(
            SESSION, TASK, "destination", "source", "owner", ([], []), tunnel=False, meet=True
        )
        made.finder.take_answer(answer())
        made.finder.take_arrangement(for_destination)
        party = Party(endpoint_id="", node_id="", collection_id="", certificate="")
        yield made, SessionOrder(session_id=SESSION, task_id=TASK, ticket="", peer=party, arranged=for_source)


def order_session(made: World, order: SessionOrder) -> None:
    made.source.introductions.arrange(order)
    made.source.introductions.prepare(order)


async def test_both_punch_without_an_offer_when_the_relay_has_seen_their_ports() -> None:
    async with meeting() as (made, order):
        order_session(made, order)
        connections = [await made.finder.connect() for _ in range(2)]
        assert [row.path.kind for row in connections] == ["punched"] * 2
        assert made.offers == []
        assert made.signalling.statistics().met == 1
        for row in connections:
            row.sock.close()


async def test_an_observation_that_is_there_already_serves_a_meeting_too() -> None:
    async with meeting() as (made, order):
        held = await made.source.network.observe_data_port()
        assert held is not None
        order_session(made, order)
        connection = await made.finder.connect()
        assert (connection.path.kind, made.offers) == ("punched", [])
        connection.sock.close()
        made.source.network.release(held)


async def test_a_source_that_shows_no_port_is_made_an_offer() -> None:
    async with meeting() as (made, _):
        connection = await made.finder.connect()
        assert connection.path.kind == "punched"
        assert len(made.offers) == 1
        connection.sock.close()


async def test_a_meeting_makes_nobody_dial_what_may_not_be_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[Any] = []
    monkeypatch.setattr("agent.connect.introductions.connect_from", lambda *place: dialled.append(place))
    async with meeting() as (made, order):
        made.source.network.allow_loopback = made.destination.network.allow_loopback = False
        order_session(made, order)
        with trio.move_on_after(0.4):
            await made.finder.connect()
        # The ports were seen on loopback.
        assert made.signalling.statistics().met == 1
        assert dialled == []


async def test_a_relay_has_both_sides_punch_once_for_a_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it says where the other side is."""
    punched: list[Any] = []

    async def record(_port: int, target: tuple[str, int], **_options: Any) -> socket.socket:
        punched.append(target)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr("agent.connect.introductions.connect_from", record)
    monkeypatch.setattr("agent.connect.punch.connect_from", record)
    async with meeting() as (made, order):
        order_session(made, order)
        made.finder.begin()
        while len(punched) < 4:
            await trio.sleep(0.01)
        # The source's data port to both slots, and both slots to the data port.
        first = list(punched)
        for number in range(20):
            rows = [Candidate(kind="mapped-tcp", host="127.0.0.1", port=1000 + number, slot=slot) for slot in (0, 1, 2)]
            go = PathGo(session_id=SESSION, generation=MEETING, start_in=0.0, candidates=rows)
            made.finder.take_go(go)
            made.source.introductions.go(go)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(punched) == sorted(first)


async def test_a_go_for_ports_that_were_not_shown_is_ignored() -> None:
    async with world() as made:
        keep_addresses_back(made.source, made.destination)
        made.finder.take_answer(answer())
        made.finder.begin()
        await trio.testing.wait_all_tasks_blocked()
        go = PathGo(session_id=SESSION, generation=MEETING, start_in=0.0, candidates=[at(1)])
        made.finder.take_go(go)
        made.source.introductions.go(go)
        connection = await made.finder.connect()
        assert (connection.path.kind, len(made.offers)) == ("punched", 1)
        connection.sock.close()


async def test_a_source_that_is_dialled_dials_in_vain_and_learns_it_at_once() -> None:
    async with arranged() as (made, order):
        port = made.source.network.data_port
        assert port is not None
        made.finder.take_answer(answer(at(port.port)))
        connection = await made.finder.connect()
        assert connection.path.kind == "direct"
        made.source.introductions.arrange(order)
        with trio.fail_after(5):
            # They have dialled, and are not waited on: only what was dialled from here is.
            while made.source.introductions._arranged or port._strangers.taken > 2:
                await trio.sleep(0.01)
        connection.sock.close()
