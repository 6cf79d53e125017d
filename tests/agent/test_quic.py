"""QUIC between two agents with both libraries: streams, credit, loss, address changes, strangers, garbage."""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from contextlib import closing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.connect.quic import carrier as carrier_module
from agent.connect.quic.carrier import Carrier, ConnectionOver
from agent.connect.quic.credit import (
    CONTENT,
    CREDIT,
    END_FRAME,
    HEADER,
    MAX_CONTENT,
    WINDOW,
    Receiver,
    Sender,
    content_header,
)
from agent.connect.quic.datagrams import _runs
from agent.connect.quic.engine import Engine, EngineMissing, available
from agent.connect.quic.introduction import ClientIntroduction, ServerIntroduction
from agent.connect.quic.punch import Punch
from agent.connect.udp import open_udp
from protocol.errors import ProtocolError, TowpathError
from protocol.identity import NodeKey
from tests.agent.quic_pair import CLIENT, SERVER, SESSION, QuicPair, engine, quic_pair, soon_in_doubt, udp

LIBRARIES = ["qh3", "aioquic"]
both = pytest.mark.parametrize("library", LIBRARIES)


def move_bytes(pair: QuicPair, source: socket.socket, target: socket.socket, content: bytes) -> bytes:
    """Send all of it and the end, until the other side has both."""
    received = bytearray()
    view = memoryview(content)
    ended = False

    def done() -> bool:
        nonlocal view, ended
        with suppress(BlockingIOError):
            while view:
                view = view[source.send(view[: 256 * 1024]) :]
                if not view:
                    source.shutdown(socket.SHUT_WR)
        with suppress(BlockingIOError):
            while piece := target.recv(1 << 20):
                received.extend(piece)
            ended = True
        return ended

    pair.run(done)
    return bytes(received)


def test_both_libraries_are_installed_here_and_the_fast_one_comes_first() -> None:
    assert available() == LIBRARIES


@pytest.mark.parametrize(("library", "other"), [(a, b) for a in LIBRARIES for b in LIBRARIES])
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
@pytest.mark.parametrize(("library", "other"), [(a, b) for a in LIBRARIES for b in LIBRARIES])
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


def turn_until(carrier: Carrier, deadline: float) -> str:
    """Why it was over, or an empty text when it was not by then (monotonic seconds)."""
    try:
        while time.monotonic() < deadline:
            carrier.turn(0.05)
    except ConnectionOver as error:
        return error.sentence
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a socket that it was refused")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@both
def test_a_server_that_was_killed_is_missed_soon(library: str, family: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUIET", 0.1), ("ASK_AGAIN", 0.02), ("REFUSED_PATIENCE", 0.1)):
        monkeypatch.setattr(carrier_module, name, value)
    with closing(quic_pair(library, make=udp if family == socket.AF_INET else open_udp)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            began = time.monotonic()
            # Nobody has its port any more, and nothing was said.
            pair.server._datagrams.sock.close()
            assert "nobody has the port" in turn_until(pair.client, began + 3)
            assert time.monotonic() - began < 1.5


@both
def test_a_server_that_may_have_been_started_again_must_say_something(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon_in_doubt(monkeypatch)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt()
            pair.run(lambda: pair.client._doubted is None)
            pair.client.doubt()
            # The server gets no turn any more, and its port refuses nothing.
            assert "started again" in turn_until(pair.client, time.monotonic() + 2)


@both
def test_a_server_that_was_started_again_for_certain_is_not_waited_for(library: str) -> None:
    """Whatever it may be heard of: its machine says nothing, and no time shows more than its own word."""
    with closing(quic_pair(library, instance="first")) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt("first")
            assert pair.client._doubted is None
            assert move_bytes(pair, near, far, b"still there") == b"still there"
            began = time.monotonic()
            pair.client.doubt("second")
            assert "started again" in turn_until(pair.client, began + 5)
            assert time.monotonic() - began < carrier_module.DOUBT_PATIENCE


@both
def test_a_server_of_before_that_says_no_instance_is_doubted(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    soon_in_doubt(monkeypatch)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt("second")
            pair.run(lambda: pair.client._doubted is None)
            pair.client.doubt("second")
            assert "started again" in turn_until(pair.client, time.monotonic() + 2)


@both
def test_a_refusal_that_somebody_made_up_ends_no_connection(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUIET", 0.1), ("ASK_AGAIN", 0.02), ("REFUSED_PATIENCE", 0.3)):
        monkeypatch.setattr(carrier_module, name, value)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            deadline = time.monotonic() + 0.8
            while time.monotonic() < deadline:
                # As a stranger's ICMP messages would have it; the server is there and answers.
                pair.client._datagrams.refused = True
                for carrier in (pair.client, pair.server):
                    carrier.turn(0.002)
            assert move_bytes(pair, near, far, b"still there") == b"still there"


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


# --- codecs --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.integers(1, 40))
def test_any_bytes_are_frames_or_the_protocol_error(data: bytes, step: int) -> None:
    receiver = Receiver()
    try:
        for start in range(0, len(data), step):
            for _ in receiver.feed_untrusted(data[start : start + step]):
                pass
    except ProtocolError:
        return
    assert receiver.waiting <= WINDOW


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.integers(1, 64))
def test_content_survives_any_cutting(pieces: list[bytes], step: int) -> None:
    wire = b"".join(content_header(len(piece)) + piece for piece in pieces) + END_FRAME
    receiver = Receiver()
    found = b""
    for start in range(0, len(wire), step):
        for kind, _, content in receiver.feed_untrusted(wire[start : start + step]):
            assert kind == CONTENT
            found += content
    assert found == b"".join(pieces)
    assert receiver.ended


@given(st.lists(st.integers(-5, WINDOW + 5), max_size=30))
def test_credit_never_grows_beyond_the_window(numbers: list[int]) -> None:
    sender = Sender()
    for number in numbers:
        sender.sent(min(sender.left, 100_000))
        try:
            sender.credit_untrusted(number)
        except ProtocolError:
            return
        assert 0 <= sender.left <= WINDOW


def test_credit_is_given_for_what_was_taken() -> None:
    receiver = Receiver()
    given_back = 0
    for _ in range(200):
        list(receiver.feed_untrusted(content_header(MAX_CONTENT) + bytes(MAX_CONTENT)))
        frame = receiver.taken(MAX_CONTENT)
        if frame:
            kind, number = HEADER.unpack(frame)
            assert kind == CREDIT
            given_back += number
    assert 200 * MAX_CONTENT - given_back < WINDOW


@given(st.binary(max_size=5000))
def test_introductions_of_strangers_raise_only_our_errors(data: bytes) -> None:
    for introduction in (
        ClientIntroduction(SESSION, CLIENT, SERVER.certificate_pem),
        ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem),
    ):
        with suppress(TowpathError):
            introduction.feed_untrusted(data)
        assert not introduction.done


def test_a_signature_is_good_for_one_introduction_only() -> None:
    client = ClientIntroduction(SESSION, CLIENT, SERVER.certificate_pem)
    server = ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem)
    hello = client.up_untrusted(_der(SERVER))
    proof = client.feed_untrusted(server.feed_untrusted(hello))
    client.feed_untrusted(server.feed_untrusted(proof))
    assert client.done
    assert server.done
    another = ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem)
    another.feed_untrusted(hello)
    with pytest.raises(TowpathError):
        another.feed_untrusted(proof)
    # Nor is a server's own word any use when it is sent back to it.
    mirrored = ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem)
    with pytest.raises(TowpathError):
        mirrored.feed_untrusted(mirrored.feed_untrusted(hello) * 2)


def _der(identity: NodeKey) -> bytes:
    import ssl

    return ssl.PEM_cert_to_DER_cert(identity.certificate_pem)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.sampled_from([("a", 1), ("b", 2)])), max_size=80))
def test_runs_keep_every_datagram_in_order(datagrams: list[tuple[bytes, tuple[str, int]]]) -> None:
    runs = list(_runs(datagrams))
    assert [(data, address) for run, address in runs for data in run] == datagrams
    for run, _ in runs:
        assert len({len(data) for data in run[:-1]}) <= 1
        assert len(run[-1]) <= len(run[0])


# --- punching ------------------------------------------------------------------------------------------------


def test_two_sides_find_each_other_through_address_translation_and_loss() -> None:
    print("seed 11")
    chance = random.Random(11)
    for _ in range(50):
        # Each side is seen by the other from an address that differs from its candidate now and then.
        sides = [
            Punch(client=True, secret="s", targets=[("b", 1), ("b", 2)], now=0.0),
            Punch(client=False, secret="s", targets=[("a", 9)], now=0.0),
        ]
        seen_as = [("a", 1), ("b", 2)]
        now = 0.0
        while now < 4 and not all(side.found for side in sides):
            now += 0.01
            for number, side in enumerate(sides):
                for send in side.due(now):
                    _pass_on(sides, seen_as, number, send, chance)
        assert sides[0].found == ("b", 2)
        assert sides[1].found == ("a", 1)


def _pass_on(sides, seen_as, number, send, chance) -> None:  # type: ignore[no-untyped-def]
    if send.opening or chance.random() < 0.1 or send.to != seen_as[1 - number]:
        # The server's only candidate for the client is wrong: it must learn the address from the probes.
        return
    for answer in sides[1 - number].receive_untrusted(send.data, seen_as[number]):
        _pass_on(sides, seen_as, 1 - number, answer, chance)


def test_a_client_that_has_gone_on_to_quic_is_found_although_it_never_answered() -> None:
    """The source is late: its first answer is all that the destination waits for, and its own probes meet nobody."""
    client = Punch(client=True, secret="s", targets=[("b", 1)], now=0.0)
    server = Punch(client=False, secret="s", targets=[("a", 1)], now=0.0)
    start = b"\xc0" + bytes(1199)
    list(client.due(0.0))
    (probe,) = client.due(0.2)
    # Nothing counts before a probe was answered, nor from elsewhere.
    assert not server.is_start_untrusted(start, ("a", 1))
    (answer,) = server.receive_untrusted(probe.data, ("a", 1))
    assert not server.is_start_untrusted(start, ("x", 1))
    assert not server.is_start_untrusted(probe.data, ("a", 1))
    assert server.found is None
    list(client.receive_untrusted(answer.data, ("b", 1)))
    assert client.found == ("b", 1)
    assert server.is_start_untrusted(start, ("a", 1))
    assert server.found == ("a", 1)


@given(st.binary(max_size=60))
def test_datagrams_of_strangers_are_not_answered(data: bytes) -> None:
    side = Punch(client=True, secret="s", targets=[("b", 1)], now=0.0)
    assert not list(side.receive_untrusted(data, ("x", 1)))
    stranger = Punch(client=False, secret="other", targets=[("a", 1)], now=0.0)
    own = Punch(client=True, secret="s", targets=[("a", 1)], now=0.0)
    for other in (stranger, own):
        list(other.due(0.0))
        for send in other.due(1.0):
            assert not list(side.receive_untrusted(send.data, ("x", 1)))
    assert side.found is None


def test_the_limits_of_this_module_fit_together() -> None:
    assert carrier_module.MAX_STREAMS * WINDOW <= 256 * 1024 * 1024
