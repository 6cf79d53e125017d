"""Two sides find each other's UDP ports through address translation, and strangers learn nothing there."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from agent.connect.quic.punch import Punch


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


def test_a_server_that_has_heard_the_client_waits_until_its_quic_has_started() -> None:
    """On a busy machine that takes seconds; the server gave up meanwhile and said that UDP does not get through."""
    client = Punch(client=True, secret="s", targets=[("b", 1)], now=0.0)
    server = Punch(client=False, secret="s", targets=[("a", 1)], now=0.0)
    for side in (client, server):
        list(side.due(0.0))
    assert (client.is_heard, server.is_heard) == (False, False)
    early = client.deadline
    assert server.deadline == early
    (probe,) = client.due(0.2)
    (answer,) = server.receive_untrusted(probe.data, ("a", 1))
    assert server.is_heard
    assert server.deadline >= early + 10
    # The client goes on at once, and has nothing to wait for.
    list(client.receive_untrusted(answer.data, ("b", 1)))
    assert (client.is_heard, client.deadline) == (True, early)
    # What keeps the way open meanwhile is little, and the client's QUIC is still known.
    sent = sum(len(list(server.due(early + step / 100))) for step in range(1000))
    assert 10 <= sent <= 25
    assert server.is_start_untrusted(b"\xc0" + bytes(1199), ("a", 1))


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
