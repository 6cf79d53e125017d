"""QUIC between two agents with both libraries: streams, credit, loss, address changes, strangers, garbage."""

from __future__ import annotations

import random
import select
import socket
from contextlib import closing, suppress

import pytest

from agent.connect.quic import carrier as carrier_module
from agent.connect.quic.carrier import ConnectionOver
from agent.connect.quic.credit import (
    MAX_CONTENT,
    WINDOW,
    content_header,
)
from agent.connect.quic.engine import Engine, EngineMissing, available
from protocol.identity import NodeKey
from tests.agent.quic_pair import (
    CLIENT,
    LIBRARIES,
    SERVER,
    all_four,
    both,
    engine,
    move_bytes,
    quic_pair,
    udp,
)


def test_both_libraries_are_installed_here_and_the_fast_one_comes_first() -> None:
    assert available() == LIBRARIES


@all_four
def test_streams_go_both_ways_and_each_way_ends_by_itself(library: str, other: str) -> None:
    content = random.Random(1).randbytes(3_000_000)
    with closing(quic_pair(library, server_library=other)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            assert move_bytes(pair, near, far, content) == content
            # The other way is still open, and has credit for more than a window.
            back = content[::-1] * 2
            assert move_bytes(pair, far, near, back) == back
            pair.run(lambda: not pair.client.open_streams() and not pair.server.open_streams())
        assert not pair.over


@pytest.mark.parametrize("loss", [0.0, 0.03])
@all_four
def test_keys_are_updated_before_they_have_protected_too_much(library: str, other: str, loss: float) -> None:
    seed = 11
    print(f"seed {seed}")
    content = random.Random(seed).randbytes(600_000 if loss else 4_000_000)
    with closing(quic_pair(library, server_library=other, loss=loss, seed=seed, key_packets=200)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            assert move_bytes(pair, near, far, content) == content
            assert move_bytes(pair, far, near, content) == content
        assert not pair.over
        assert pair.client._engine.key_updates > 1
        assert pair.server._engine.key_updates > 1


@both
def test_what_is_said_over_a_connection_that_has_just_ended_is_told_as_its_end(library: str) -> None:
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            near.send(b"said too late")
            pair.server._engine.close("bye")
            pair.server._flush()
            # The goodbye was read, and the local end is looked at before what it means is.
            select.select([pair.client._datagrams.sock], [], [], 5)
            pair.client._read_network()
            for stream in list(pair.client._streams.values()):
                pair.client._read_local(stream)
            with pytest.raises(ConnectionOver):
                for _ in range(100):
                    pair.client.turn(0.01)


@both
def test_several_streams_at_once(library: str) -> None:
    with closing(quic_pair(library)) as pair:
        pair.up()
        ends = [pair.open() for _ in range(8)]
        for number, (near, _) in enumerate(ends):
            near.send(f"stream {number}".encode())
        received: dict[int, bytes] = {}

        def all_there() -> bool:
            for number, (_, far) in enumerate(ends):
                with suppress(BlockingIOError):
                    received[number] = far.recv(100)
            return len(received) == 8

        pair.run(all_there)
        assert received == {number: f"stream {number}".encode() for number in range(8)}
        for pair_of_ends in ends:
            for end in pair_of_ends:
                end.close()


@both
def test_a_receiver_that_takes_nothing_holds_the_sender_back(library: str) -> None:
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            sent = 0

            def push() -> bool:
                nonlocal sent
                with suppress(BlockingIOError):
                    while True:
                        sent += near.send(bytes(256 * 1024))
                return False

            with pytest.raises(AssertionError, match="come to an end"):
                pair.run(push, turns=400)
            # One window under way, and what the two local sockets hold.
            assert WINDOW <= sent <= WINDOW + 3 * 1024 * 1024
            near.shutdown(socket.SHUT_WR)
            received = 0

            def drain() -> bool:
                nonlocal received
                with suppress(BlockingIOError):
                    while piece := far.recv(1 << 20):
                        received += len(piece)
                    return True
                return False

            pair.run(drain)
            assert received == sent


@both
def test_loss_doubles_and_reordering(library: str) -> None:
    seed = 7
    print(f"seed {seed}")
    content = random.Random(seed).randbytes(400_000)
    with closing(quic_pair(library, loss=0.05, seed=seed)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            assert move_bytes(pair, near, far, content) == content


@both
def test_the_clients_address_changes_in_mid_transfer(library: str) -> None:
    content = random.Random(3).randbytes(4_000_000)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        received = bytearray()
        view = memoryview(content)

        def done() -> bool:
            nonlocal view
            with suppress(BlockingIOError):
                while view:
                    view = view[far.send(view[: 64 * 1024]) :]
            with suppress(BlockingIOError):
                while piece := near.recv(1 << 20):
                    received.extend(piece)
            if len(received) > 1_000_000 * (pair.client.moves + 1) and pair.client.moves < 3:
                pair.client.move(udp())
            return len(received) == len(content)

        with near, far:
            pair.run(done)
        assert bytes(received) == content
        assert pair.client.moves == 3


@both
def test_a_stream_that_breaks_is_no_regular_end_and_the_others_go_on(library: str) -> None:
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        other_near, other_far = pair.open()
        with far, other_near, other_far:
            far.send(b"unread")
            near.close()
            pair.run(lambda: pair.client.open_streams() == 1 == pair.server.open_streams())
            assert move_bytes(pair, other_near, other_far, b"still here") == b"still here"


# --- who is who ----------------------------------------------------------------------------------------------

STRANGER = NodeKey.generate()


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"client_identity": STRANGER},
        {"server_identity": STRANGER},
        {"session": "33333333-3333-4333-8333-333333333333"},
        {"client_identity": SERVER, "server_identity": CLIENT},
        {"client_identity": SERVER},
        {"server_identity": CLIENT},
    ],
)
def test_strangers_swapped_roles_and_other_sessions_get_nothing(library: str, changes: dict[str, object]) -> None:
    with closing(quic_pair(library, **changes)) as pair:  # type: ignore[arg-type]
        pair.run(lambda: len(pair.over) > 1)
        assert len(pair.ups) < 2
        assert "server" not in pair.ups
        assert not pair.streams


@both
def test_content_before_the_introduction_ends_the_connection(library: str) -> None:
    with closing(quic_pair(library)) as pair:
        pair.client._introduction.up_untrusted = lambda _certificate: b""  # type: ignore[union-attr, method-assign]
        pair.run(lambda: pair.client._engine._is_up)
        pair.client._engine.send(4, content_header(5) + b"hello")
        pair.run(lambda: len(pair.over) > 1)
        assert any("introduced" in sentence for sentence in pair.over)
        assert not pair.streams


@both
def test_a_sender_that_ignores_credit_is_cut_off(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            number = max(pair.client._streams)
            flood = (content_header(MAX_CONTENT) + bytes(MAX_CONTENT)) * (2 * WINDOW // MAX_CONTENT)
            pair.client._engine.send(number, flood)
            pair.run(lambda: bool(pair.over))
            assert any("credit" in sentence for sentence in pair.over)


@both
def test_garbage_on_the_port_disturbs_nobody(library: str) -> None:
    print("seed 5")
    chance = random.Random(5)
    with closing(quic_pair(library)) as pair, udp() as stranger:
        address = pair.server._datagrams.sock.getsockname()
        pair.up()
        near, far = pair.open()
        for _ in range(500):
            data = bytearray(chance.randbytes(chance.choice([0, 1, 20, 1200, 1400])))
            if data:
                data[0] |= chance.choice([0x00, 0x40, 0x80, 0xC0])
            stranger.sendto(data, address)
        with near, far:
            assert move_bytes(pair, near, far, b"still here") == b"still here"
        assert not pair.over


@both
def test_an_unproven_address_gets_at_most_three_times_what_it_sent(library: str) -> None:
    # RFC 9000, section 8.1: nobody may be flooded by a server that is asked in his name.
    server = engine(SERVER, library, is_client=False)
    client = engine(CLIENT, library, is_client=True)
    client.connect(("127.0.0.1", 9), 0.0)
    first = client.datagrams(0.0)
    sent = sum(len(data) for data, _ in first)
    for data, _ in first:
        server.receive(data, 0, ("127.0.0.1", 10), 0.0)
    answered = 0
    now = 0.0
    for _ in range(200):
        answered += sum(len(data) for data, _ in server.datagrams(now))
        timer = server.timer()
        if timer is None or timer > 60:
            break
        now = max(now, timer)
        server.handle_timer(now)
        if any(type(event).__name__ == "Closed" for event in server.events()):
            break
    assert 0 < answered <= 3 * sent


def test_without_a_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.connect.quic.engine.available", list)
    with pytest.raises(EngineMissing, match="pip install qh3"):
        Engine(is_client=True, certificate_pem="", private_key_pem=b"")


def test_the_limits_of_this_module_fit_together() -> None:
    assert carrier_module.MAX_STREAMS * WINDOW <= 256 * 1024 * 1024
