"""Destination and source find each other over real sockets on loopback, joined by the real signalling."""

from __future__ import annotations

import errno
import socket
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from agent.connect import finder as finder_module
from agent.connect import race as race_module
from agent.connect import running_race
from agent.connect.addresses import Interfaces
from agent.connect.listener import bind
from agent.connect.network import DialAllowance, Network
from agent.connect.transport import Connection, Path, Wish
from protocol.candidates import PORTMAP, Candidate, PathAnswer, PathGo, PathOffer
from protocol.control import RelayHello
from protocol.errors import RetryLater
from tests.agent.paths_world import SESSION, TASK, World, answer, at, keep_addresses_back, world


async def test_an_address_that_answers_is_dialled_and_nobody_is_troubled() -> None:
    async with world() as made:
        assert made.source.network.data_port is not None
        made.finder.take_answer(answer(at(made.source.network.data_port.port)))
        for _ in range(3):
            connection = await made.finder.connect()
            assert connection.path.kind == "direct"
            connection.sock.close()
        assert made.offers == []


async def test_when_the_source_cannot_be_dialled_it_dials_back() -> None:
    async with world() as made:
        made.finder.take_answer(answer())

        keep_addresses_back(made.source)
        connection = await made.finder.connect()
        assert connection.path.kind in ("reversed", "punched")
        connection.sock.close()
        assert len(made.offers) == 1


async def test_without_descriptors_for_punching_ports_the_source_still_dials_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_more(_number: int, _families: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(running_race, "open_slot", no_more)
    async with world() as made:
        made.finder.take_answer(answer())
        keep_addresses_back(made.source)
        connection = await made.finder.connect()
        assert connection.path.kind == "reversed"
        connection.sock.close()


async def test_both_punch_when_neither_can_be_dialled() -> None:
    async with world(lanes=2) as made:
        keep_addresses_back(made.source, made.destination)
        made.finder.take_answer(answer())
        connections = [await made.finder.connect() for _ in range(3)]
        assert [row.path.kind for row in connections] == ["punched"] * 3
        for row in connections:
            row.sock.close()
        assert len(made.offers) == 1
        assert {row.slot for row in made.offers[0].candidates} == {1, 2, 3}


async def test_a_finder_made_before_the_link_has_the_relays_help_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an agent that was started again: its tasks begin before the daemon has a link."""

    # The address swallows everything, so that the race is under way when the link comes.
    async def hang(_candidate: Candidate) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(running_race, "dial", hang)
    async with world(relay_up=False) as made:
        keep_addresses_back(made.source, made.destination)
        made.finder.take_answer(answer(at(9)))
        async with trio.open_nursery() as nursery:

            async def link() -> None:
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert made.offers == []
                network = made.destination.network
                network.relay_up = lambda: True
                network.take_hello(RelayHello(relay_id="", nonce="", proof="", key_certificate=""))

            nursery.start_soon(link)
            with trio.fail_after(5):
                connection = await made.finder.connect()
        assert connection.path.kind == "punched"
        connection.sock.close()
        assert "relay cannot be reached" not in made.finder.why


async def test_a_race_after_the_link_has_the_relays_help() -> None:
    async with world(relay_up=False) as made:
        keep_addresses_back(made.source, made.destination)
        made.finder.take_answer(answer())
        with pytest.raises(RetryLater, match="the relay cannot be reached"):
            await made.finder.connect()
        made.destination.network.relay_up = lambda: True
        connection = await made.finder.connect()
        assert connection.path.kind == "punched"
        connection.sock.close()


async def test_known_addresses_are_dialled_again_while_the_relay_is_away() -> None:
    async with world(relay_up=False) as made:
        assert made.source.network.data_port is not None
        made.finder.take_answer(answer(at(made.source.network.data_port.port)))
        first = await made.finder.connect()
        first.sock.close()
        second = await made.finder.connect()
        second.sock.close()
        assert made.offers == []


async def test_without_any_way_the_reason_is_told() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with world(relay_up=False, relay="never") as made:
            made.finder.take_answer(answer(at(closed.getsockname()[1])))
            with pytest.raises(RetryLater, match="may not go through the relay") as caught:
                await made.finder.connect()
    assert "refused" in caught.value.sentence


async def test_why_the_relay_gives_no_place_at_its_tunnel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as made:

        async def none(**_options: Any) -> list[Candidate]:
            await trio.lowlevel.checkpoint()
            return []

        class Tunnel:
            async def offer(self, _wish: Wish) -> list[Candidate]:
                return await none()

        # Nothing can be dialled either way, and nobody punches.
        monkeypatch.setattr(race_module, "RACE_TIME", 1.0)
        for side in (made.source, made.destination):
            side.network.host_candidates = none  # type: ignore[method-assign]
        made.destination.network.transports.tunnel = Tunnel()  # type: ignore[assignment]
        made.finder.take_answer(answer())

        def refuse(offer: PathOffer) -> None:
            made.offers.append(offer)
            sentence = "You have moved 5 bytes through the relay's tunnel\x1b[31m today."
            go = PathGo(session_id=SESSION, generation=offer.generation, start_in=0.0, tunnel_refused=sentence)
            trio.lowlevel.spawn_system_task(later, go)

        async def later(go: PathGo) -> None:
            await trio.sleep(0.01)
            made.finder.take_go(go)

        made.finder._send_offer = refuse
        with pytest.raises(RetryLater, match=r"moved 5 bytes through the relay's tunnel \[31m today"):
            await made.finder.connect()


async def test_over_quic_one_connection_more_is_a_stream_more() -> None:
    class Quic:
        asked: list[str] = []
        doubted: list[tuple[str, str]] = []

        def doubt(self, session_id: str, instance: str) -> None:
            self.doubted.append((session_id, instance))

        async def another(self, wish: Wish) -> Connection | None:
            await trio.lowlevel.checkpoint()
            self.asked.append(wish.session_id)
            near, far = socket.socketpair()
            far.close()
            return Connection(near, Path(kind="quic", transport="quic"))

    async with world() as made:
        made.destination.network.transports.quic = Quic()  # type: ignore[assignment]
        made.finder.take_answer(answer())
        made.finder.path = Path(kind="quic", transport="quic")
        connection = await made.finder.connect()
        connection.sock.close()
        assert connection.path.kind == "quic"
        assert Quic.asked == [SESSION]
        # The source says where it is once more: it may have been started again.
        made.finder.take_answer(msgspec.structs.replace(answer(), instance="another"))
        assert Quic.doubted == [(SESSION, ""), (SESSION, "another")]
        assert made.offers == []


class Tunnel:
    """Comes up at once. ``legs`` are the source's ends."""

    def __init__(self) -> None:
        self.legs: list[socket.socket] = []

    async def offer(self, _wish: Wish) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return []

    async def answer(self, _offer: PathOffer) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return []

    async def connect(self, _wish: Wish, _go: PathGo) -> Connection:
        await trio.lowlevel.checkpoint()
        near, far = socket.socketpair()
        self.legs.append(far)
        return Connection(near, Path(kind="tunnel"))

    async def serve(self, _offer: PathOffer, _go: PathGo, _greet: object) -> None:
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """The source is gone."""
        while self.legs:
            self.legs.pop().close()


async def only_a_tunnel(made: World) -> Tunnel:
    """Nothing leads to the source but a tunnel, which this plays."""
    await hidden(made)
    tunnel = Tunnel()
    for side in (made.source, made.destination):
        side.network.transports.tunnel = tunnel  # type: ignore[assignment]
    return tunnel


async def look_for_better(made: World) -> None:
    """The first race is over; another looks for something better."""
    made.finder._running.end()  # type: ignore[union-attr]
    await made.finder.others()
    while made.finder._running is None:
        await trio.sleep(0.01)


@pytest.mark.parametrize("improving", [False, True])
async def test_a_session_that_was_lost_in_the_tunnel_has_another_place_there_at_once(
    monkeypatch: pytest.MonkeyPatch, improving: bool
) -> None:
    if improving:
        monkeypatch.setattr(finder_module, "IMPROVE_FIRST", 0.1)
    async with world() as made:
        tunnel = await only_a_tunnel(made)
        lost = await made.finder.connect(begins=True)
        if improving:
            await look_for_better(made)
        assert made.finder._running is not None
        with lost.sock:
            tunnel.close()
        await trio.sleep(0.35)
        # Long before what is under way would be over.
        with trio.fail_after(1.5):
            found = await made.finder.connect(begins=True)
        with found.sock:
            assert found.path.kind == "tunnel"
        tunnel.close()


@pytest.mark.parametrize("improving", [False, True])
async def test_a_lane_more_in_the_tunnel_does_not_wait_for_what_only_looks_for_something_better(
    monkeypatch: pytest.MonkeyPatch, improving: bool
) -> None:
    if improving:
        monkeypatch.setattr(finder_module, "IMPROVE_FIRST", 0.1)
    async with world() as made:
        tunnel = await only_a_tunnel(made)
        # All that the first go has places for.
        given = [await made.finder.connect(begins=True), await made.finder.connect()]
        if improving:
            await look_for_better(made)
        assert made.finder._running is not None
        await trio.sleep(0.35)
        with trio.fail_after(1.5):
            given.append(await made.finder.connect())
        assert [each.path.kind for each in given] == ["tunnel"] * 3
        for each in given:
            each.sock.close()
        tunnel.close()


async def hidden(made: World) -> None:
    """Neither side is found by itself: no addresses, and no relay that says how its ports are seen."""

    async def none(**_options: Any) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return []

    for side in (made.source, made.destination):
        side.network.host_candidates = none  # type: ignore[method-assign]
        side.network.relay = None
    made.finder.take_answer(answer())


async def connect(made: World, found: list[str]) -> None:
    connection = await made.finder.connect()
    connection.sock.close()
    found.append(connection.path.kind)


@pytest.mark.parametrize(("side", "kind"), [("source", "direct"), ("destination", "reversed")])
async def test_a_mapping_that_a_router_grants_late_is_told_and_used(side: str, kind: str) -> None:
    async with world() as made:
        await hidden(made)
        network: Network = getattr(made, side).network
        assert network.data_port is not None
        found: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, made, found)
            with trio.fail_after(5):
                while not (made.offers and made.source.introductions._current):
                    await trio.sleep(0.01)
                await trio.sleep(0.1)
                assert found == []
                network.take_mappings([Candidate(kind=PORTMAP, host="127.0.0.1", port=network.data_port.port)])
        assert found == [kind]
        assert {offer.generation for offer in made.offers} == {1}
        assert made.failures == []


async def test_late_addresses_for_an_older_offer_are_ignored() -> None:
    async with world() as made:
        await hidden(made)
        assert made.source.network.data_port is not None
        place = at(made.source.network.data_port.port)
        found: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, made, found)
            with trio.fail_after(5):
                while not made.offers:
                    await trio.sleep(0.01)
                for session, generation in ((SESSION, 0), (TASK, 1)):
                    made.finder.take_candidates(
                        PathAnswer(session_id=session, generation=generation, candidates=[place])
                    )
                await trio.sleep(0.2)
                assert found == []
                made.finder.take_candidates(PathAnswer(session_id=SESSION, generation=1, candidates=[place]))
        assert found == ["direct"]


async def test_interfaces_that_cannot_be_looked_at_now_are_looked_at_later(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    looks = 0

    def none_at_first() -> Interfaces:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return Interfaces(("192.0.2.1",), ())

    monkeypatch.setattr("agent.connect.network.look", none_at_first)
    monkeypatch.setattr("agent.connect.network.time.time", trio.current_time)
    network = Network(None, interfaces=Interfaces((), ()))
    changed = network.changed
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.watch)
        await changed.wait()
        nursery.cancel_scope.cancel()
    assert network.interfaces.addresses == ("192.0.2.1",)
    assert looks == 3


async def test_a_stranger_with_a_guessed_token_reaches_nobody() -> None:
    async with world() as made:
        assert made.destination.network.data_port is not None
        stream = await trio.open_tcp_stream("127.0.0.1", made.destination.network.data_port.port)
        await stream.send_all(b"TOWPATH-REVERSED/1 " + b"0" * 32 + b"\n")
        try:
            assert await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            # Closed with the line still unread.
            pass
        assert made.destination.delivered == []
        await stream.aclose()


def test_dials_of_peers_addresses_are_rationed() -> None:
    allowance = DialAllowance(0.0, burst=10, rate=2)
    assert sum(allowance.take(0.0) for _ in range(100)) == 10
    assert allowance.refused == 90
    assert sum(allowance.take(5.0) for _ in range(100)) == 10
    assert [allowance.take(6.0) for _ in range(3)] == [True, True, False]


def test_two_agents_of_one_user_never_share_a_data_port() -> None:
    first = bind("127.0.0.1", 0)
    try:
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", first[0].getsockname()[1])
    finally:
        for sock in first:
            sock.close()


def test_unused_connections_of_a_race_expire_before_the_source_gives_them_up() -> None:
    from agent.connect.listener import GREETING_TIMEOUT

    assert finder_module.KEEP_UNUSED < GREETING_TIMEOUT


async def test_addresses_that_the_source_says_later_are_dialled_in_the_race_under_way() -> None:
    async with world() as made:
        made.finder.take_answer(answer())
        # The offer that is hoped for never arrives.
        made.finder._send_offer = lambda _offer: None
        port = made.source.network.data_port
        assert port is not None
        async with trio.open_nursery() as nursery:

            async def connect() -> None:
                connection = await made.finder.connect()
                assert connection.path.kind == "direct"
                connection.sock.close()

            nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked()
            made.finder.take_answer(answer(at(port.port)))


@pytest.mark.parametrize(
    ("task", "agent", "had_direct", "allowed"),
    [
        ("allow", "allow", True, True),
        ("until-direct", "allow", False, True),
        ("until-direct", "allow", True, False),
        ("allow", "until-direct", True, False),
        ("never", "allow", False, False),
        ("allow", "never", False, False),
        ("until-direct", "never", False, False),
    ],
)
async def test_both_task_and_agent_must_let_data_pass_the_relay(
    task: str, agent: str, had_direct: bool, allowed: bool
) -> None:
    async with world(relay=task) as made:
        made.destination.network.relay_policy = agent
        made.finder._had_direct = had_direct
        made.finder._start_race()
        assert made.finder._running is not None
        assert made.finder._relay_allowed() is allowed
        # Without a tunnel transport there is none to race for; what the race would be told is the same word.
        assert ("may not go through the relay" in made.finder._sentence()) is not allowed
