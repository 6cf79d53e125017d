"""Fairness and limits of the moving loop, with a clock that the test sets and socket pairs it fills and drains."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.rendezvous.tunnel.limits import MIN_BURST, Account, Allowance, Bucket, TunnelLimits
from relay.rendezvous.tunnel.mover import STALL, Mover, PairEnded

PIECE = bytes(256 * 1024)


class Ends:
    """The agents' ends of the pairs: the source sends for ever, the destination takes everything unless told not to."""

    def __init__(self, limits: TunnelLimits = TunnelLimits()) -> None:  # noqa: B008 - immutable
        self.now = 1000.0
        self.ended: list[PairEnded] = []
        self.mover = Mover(limits, self.ended.append, lambda: self.now)
        self.ends: dict[str, tuple[socket.socket, socket.socket]] = {}
        self.received: dict[str, int] = {}

    def add(self, name: str, session: str, user: str, **more: int) -> None:
        a, ours_a = socket.socketpair()
        b, ours_b = socket.socketpair()
        for end in (a, b):
            end.setblocking(False)
        self.ends[name] = (a, b)
        self.received[name] = 0
        self.mover.add(name, session, user, (ours_a, ours_b), **more)

    def turn(self, *, drain: bool = True) -> None:
        for name, (source, destination) in self.ends.items():
            with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                while True:
                    source.send(PIECE)
            if drain:
                with suppress(BlockingIOError, ConnectionResetError):
                    while chunk := destination.recv(1 << 20):
                        self.received[name] += len(chunk)
        self.mover.turn(0)

    def total(self, prefix: str) -> int:
        return sum(size for name, size in self.received.items() if name.startswith(prefix))

    def close(self) -> None:
        self.mover.close()
        for pair in self.ends.values():
            for end in pair:
                end.close()


@contextmanager
def ends(limits: TunnelLimits = TunnelLimits()) -> Iterator[Ends]:  # noqa: B008 - immutable
    made = Ends(limits)
    try:
        yield made
    finally:
        made.close()


def test_a_session_with_many_lanes_gets_no_more_than_one_with_one() -> None:
    # The rate is what they compete for; without one all of them would simply be as fast as the machine.
    with ends(TunnelLimits(total_rate=1_000_000)) as made:
        for number in range(16):
            made.add(f"many{number}", "many", "alice")
        made.add("one", "one", "alice")
        for number in range(8):
            made.add(f"other{number}", "other", "bob")
        for _ in range(3000):
            made.now += 0.01
            made.turn()
        many, one, other = made.total("many"), made.total("one"), made.total("other")
        assert many + one + other > 20_000_000
        assert 0.8 < many / one < 1.25
        # Users take turns first: Bob's one session gets as much as both of Alice's.
        assert 0.8 < other / (many + one) < 1.25


@pytest.mark.parametrize("which", ["session_rate", "user_rate", "total_rate"])
def test_a_rate_is_kept(which: str) -> None:
    rate = 2_000_000
    with ends(TunnelLimits(**{which: rate})) as made:
        made.add("a", "s", "u")
        made.add("b", "s", "u")
        for _ in range(1000):
            made.now += 0.01
            made.turn()
        moved = made.mover.statistics().moved
        assert 0.9 * rate * 10 < moved < 1.1 * rate * 10 + rate


def test_an_amount_ends_the_pair_exactly_there() -> None:
    with ends() as made:
        made.add("a", "s", "u", session_left=1_000_001)
        for _ in range(100):
            made.turn()
        assert [(ended.outcome, ended.forward) for ended in made.ended] == [("session quota", 1_000_001)]
        assert made.mover.statistics().pairs == 0


def test_usage_is_told_once_and_idle_accounts_are_forgotten() -> None:
    with ends() as made:
        made.add("a", "s", "u", user_left=500_000)
        for _ in range(100):
            made.turn()
        assert made.mover.usage() == {"u": 500_000}
        assert made.mover.usage() == {}
        made.now += 100
        made.turn()
        assert made.mover.statistics().users == 0


def test_idle_pairs_hold_no_pipes_and_held_up_ones_are_given_up_in_the_end() -> None:
    with ends() as made:
        made.add("a", "s", "u")
        made.mover.turn(0)
        assert made.mover.statistics().pipes == 0
        for _ in range(50):
            made.turn(drain=False)
        assert made.mover.statistics().pipes == 1
        made.now += STALL - 10
        made.turn(drain=False)
        assert not made.ended
        made.now += 20
        made.turn(drain=False)
        made.turn(drain=False)
        assert [ended.outcome for ended in made.ended] == ["stalled"]
        assert made.mover.statistics().pipes == 0


@given(
    st.integers(1, 10**9),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=50),
)
def test_a_bucket_never_grants_more_than_its_rate_and_one_burst(rate: int, steps: list[tuple[float, float]]) -> None:
    bucket = Bucket(rate, 0.0)
    now = taken = 0.0
    for pause, share in steps:
        now += pause
        size = int(bucket.available(now) * share)
        bucket.take(size)
        taken += size
    assert taken <= rate * now + max(rate, MIN_BURST) + 1


def test_no_limit_is_no_limit() -> None:
    account = Account(Bucket(0, 0.0), Allowance(0))
    account.take(1 << 50)
    assert account.amount.left > 1 << 50
    assert account.rate.available(0.0) > 1 << 50
    assert account.rate.ready_in(1 << 40) == 0
