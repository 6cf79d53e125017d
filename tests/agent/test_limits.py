"""Limits of bandwidth: rates, time-tables, token buckets and shares, without clocks, threads or networks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agent.config.keys import BandwidthConfig, BandwidthEntry, LimitsConfig
from agent.limits.allotment import Allotment, Allowance, in_force
from agent.limits.bucket import BURST_SECONDS, LEAST_BURST, MOST_WAIT, TokenBucket
from agent.limits.pace import Pace
from agent.limits.processor import LEAST_RATE, Governor
from agent.limits.rate import parse_rate, rate_text
from agent.limits.shares import demand, divide
from agent.limits.timetable import parse_weekly

# A Monday.
MONDAY = datetime(2026, 3, 2)


def at(days: int, hours: int, minutes: int = 0) -> datetime:
    return MONDAY + timedelta(days=days, hours=hours, minutes=minutes)


# --- rates and times -----------------------------------------------------------------------------------------


def test_rates_carry_their_unit() -> None:
    assert parse_rate("20 MB/s") == 20_000_000
    assert parse_rate("200 Mbit/s") == 25_000_000
    assert parse_rate("1.5GB/s") == 1_500_000_000
    assert parse_rate("1000 B/s") == 1000
    assert rate_text(20_000_000) == "20 MB/s"
    for wrong in ("20", "20 MB", "20 MiB/s", "20 mb/s", "-1 MB/s", "1 B/s", "9999 TB/s", "", "1e9 B/s", "٣ MB/s"):
        with pytest.raises(ValueError, match=r"rate|outside"):
            parse_rate(wrong)


@given(st.integers(1000, 10**12))
def test_every_rate_can_be_written_exactly(rate: int) -> None:
    assert parse_rate(f"{rate} B/s") == rate


def test_hours_of_days() -> None:
    office = parse_weekly("mon-fri 08:00-18:00")
    assert office.contains(at(0, 8))
    assert office.contains(at(4, 17, 59))
    assert not office.contains(at(4, 18))
    assert not office.contains(at(5, 12))
    assert parse_weekly("sat,sun").contains(at(6, 23, 59))
    assert not parse_weekly("sat,sun").contains(at(7, 0))
    assert parse_weekly("fri-mon").contains(at(0, 0))
    assert parse_weekly("18:00-24:00").contains(at(3, 23, 59))


def test_hours_past_midnight_belong_to_the_day_on_which_they_begin() -> None:
    night = parse_weekly("fri 22:00-06:00")
    assert night.contains(at(4, 23))
    assert night.contains(at(5, 5, 59))
    assert not night.contains(at(4, 5))
    assert not night.contains(at(5, 22))
    # The week is a circle.
    assert parse_weekly("sun 22:00-06:00").contains(at(7, 1))


@pytest.mark.parametrize("wrong", ["", "monday", "08:00", "8:00-9:00", "mon 25:00-26:00", "mon,", "10:00-10:00", "x y"])
def test_times_that_are_none(wrong: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_weekly(wrong)


def test_the_first_entry_that_holds_the_moment_counts_whole() -> None:
    table = BandwidthConfig(
        receive=1000,
        send=2000,
        task=500,
        timetable=(
            BandwidthEntry(name="night", when="22:00-06:00"),
            BandwidthEntry(name="office", when="mon-fri", receive=10),
        ),
    )
    assert in_force(table, at(0, 23)).receive is None
    assert (in_force(table, at(0, 12)).receive, in_force(table, at(0, 12)).send) == (10, None)
    assert in_force(table, at(5, 12)).task == 500


# --- the bucket ----------------------------------------------------------------------------------------------


def drain(bucket: TokenBucket, amounts: list[int], now: float) -> list[tuple[float, int]]:
    """One thread that moves these amounts one after the other: when each may pass."""
    passed = []
    for amount in amounts:
        number = bucket.reserve(amount, now)
        while delay := bucket.delay(number, now):
            now += delay + 1e-9
        passed.append((now, amount))
    return passed


@given(
    st.floats(1000, 1e9),
    st.lists(st.integers(1, 256 * 1024), min_size=1, max_size=60),
    st.floats(0, 1e6),
)
def test_no_more_passes_than_the_rate_and_one_burst(rate: float, amounts: list[int], start: float) -> None:
    passed = drain(TokenBucket(rate, start), amounts, start)
    burst = max(LEAST_BURST, rate * BURST_SECONDS)
    moved = 0
    for now, amount in passed:
        moved += amount
        assert moved <= rate * (now - start) * 1.000001 + burst + 1
    # And no less: whoever always asks gets the rate.
    assert passed[-1][0] - start <= sum(amounts) / rate * 1.000001 + 1e-5


def test_a_pause_earns_one_burst_and_no_more() -> None:
    bucket = TokenBucket(1_000_000, 0.0)
    drain(bucket, [50_000], 0.0)
    number = bucket.reserve(1_100_000, 3600.0)
    assert bucket.delay(number, 3600.0) == pytest.approx(1.0)


def test_a_much_lower_rate_keeps_nobody_waiting_for_minutes() -> None:
    """Sixteen lanes wait a moment for their pieces when the rate is lowered: none of them could be ended for over an
    hour."""
    bucket = TokenBucket(20_000_000, 0.0)
    waiting = [bucket.reserve(256 * 1024, 0.0) for _ in range(16)]
    before = bucket.delay(waiting[-1], 0.0)
    bucket.set_rate(10_000_000, 0.0)
    # What was asked for is paid for all the same.
    assert bucket.delay(waiting[-1], 0.0) == pytest.approx(2 * before)
    bucket.set_rate(1000, 0.0)
    assert bucket.delay(waiting[-1], 0.0) == pytest.approx(MOST_WAIT)
    # From then on the new rate holds.
    assert bucket.delay(bucket.reserve(1000, 0.0), 0.0) == pytest.approx(MOST_WAIT + 1)


def test_those_who_wait_pass_in_order_and_see_a_new_rate() -> None:
    bucket = TokenBucket(1000, 0.0)
    first, second = bucket.reserve(1000, 0.0), bucket.reserve(1000, 0.0)
    assert bucket.delay(first, 0.0) == pytest.approx(1.0)
    assert bucket.delay(second, 0.0) == pytest.approx(2.0)
    assert bucket.delay(first, 1.0) == 0.0
    bucket.set_rate(10_000, 1.0)
    assert bucket.delay(second, 1.0) == pytest.approx(0.1)
    bucket.set_rate(None, 1.0)
    assert bucket.delay(second, 1.0) == 0.0
    bucket.set_rate(1000, 1.0)
    assert bucket.delay(bucket.reserve(500, 1.0), 1.0) == pytest.approx(0.5)


def test_a_thread_that_waits_goes_on_when_its_limit_is_lifted() -> None:
    pace = Pace(1000)
    passed = threading.Event()

    def move() -> None:
        # More than an hour's worth.
        pace.take(4_000_000)
        passed.set()

    thread = threading.Thread(target=move, daemon=True)
    thread.start()
    while not pace.waited:
        assert not passed.is_set()
    pace.set_rate(None)
    assert passed.wait(10)
    thread.join(10)
    assert not pace.limited


# --- processor time ------------------------------------------------------------------------------------------


@given(st.floats(1e-10, 1e-7), st.integers(5, 400), st.floats(1e5, 1e9))
def test_processor_time_is_held_within_its_limit(cost: float, limit: int, network: float) -> None:
    """A process that computes so many seconds a byte, on a network of some rate, keeps its limit after a few looks."""
    now, processor, moved = 0.0, 0.0, 0
    governor = Governor(now, processor, moved)
    rate: int | None = None
    for step in range(40):
        passed = 0.5
        actual = min(network, 1 / cost, network if rate is None else rate)
        now, processor, moved = now + passed, processor + actual * passed * cost, moved + int(actual * passed)
        rate = governor.look(limit, now, processor, moved)
        if step > 5:
            assert actual * cost * 100 <= max(limit * 1.3, LEAST_RATE * cost * 130)
    # And not much less than it may.
    assert actual >= 0.5 * min(network, 1 / cost, limit / 100 / cost)


def test_without_a_limit_of_processor_time_nothing_is_held_back() -> None:
    governor = Governor(0.0, 0.0, 0)
    assert governor.look(50, 1.0, 1.0, 1_000_000) == 500_000
    assert governor.look(None, 2.0, 2.0, 2_000_000) is None
    pace = Pace(1000)
    pace.govern(500)
    assert pace.rate == 500
    pace.govern(None)
    assert pace.rate == 1000


# --- shares --------------------------------------------------------------------------------------------------


@given(st.floats(1, 1e12), st.dictionaries(st.integers(), st.floats(0, float("inf")), max_size=20))
def test_shares_are_no_more_than_the_total_and_leave_nothing_over(total: float, demands: dict[int, float]) -> None:
    shares = divide(total, demands)
    assert set(shares) == set(demands)
    if shares:
        assert sum(shares.values()) == pytest.approx(total)
        assert all(share > 0 for share in shares.values())


@given(st.floats(1000, 1e9), st.lists(st.floats(0, 1e9), min_size=2, max_size=10))
def test_who_wants_more_never_gets_less(total: float, wishes: list[float]) -> None:
    shares = divide(total, dict(enumerate(wishes)))
    ordered = sorted(range(len(wishes)), key=lambda key: wishes[key])
    for less, more in itertools.pairwise(ordered):
        assert shares[less] <= shares[more] * 1.000001


def test_a_slow_one_leaves_its_share_to_the_hungry() -> None:
    shares = divide(100.0, {"slow": demand(10, 1.0, 0.0), "a": demand(40, 1.0, 0.5), "b": demand(40, 1.0, 0.9)})
    assert shares["a"] == pytest.approx(shares["b"])
    assert shares["slow"] == pytest.approx(15)
    assert shares["a"] == pytest.approx(42.5)


class Machine:
    """An agent with a limit and workers that move what they are allowed, in virtual time."""

    def __init__(self, bandwidth: BandwidthConfig) -> None:
        self.limits = LimitsConfig(bandwidth=bandwidth)
        self.moment = at(0, 12)
        self.allotment = Allotment(lambda: self.limits, lambda: self.moment)
        self.told: dict[str, Allowance] = {}

    def worker(self, name: str, direction: Any = "receive", own: Callable[[], int | None] = lambda: None) -> Any:
        async def tell(allowance: Allowance) -> None:
            self.told[name] = allowance

        begun = self.allotment.begin(direction, own)
        self.told[name] = begun
        return self.allotment.worker(direction, own, begun, tell)

    def total(self, *names: str) -> int:
        return sum(self.told[name].rate or 0 for name in names)


async def test_workers_share_one_limit_and_a_new_one_counts_at_once(autojump_clock: Any) -> None:
    machine = Machine(BandwidthConfig(receive=1_000_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.allotment.run)
        with machine.worker("a"), machine.worker("b"), machine.worker("out", "send"):
            await trio.sleep(2)
            assert machine.told["a"].rate == machine.told["b"].rate == 500_000
            assert machine.told["a"].source == "agent"
            assert machine.told["out"].rate is None
            machine.limits = LimitsConfig(bandwidth=BandwidthConfig(receive=100_000), lanes=2)
            await trio.sleep(1)
            assert machine.total("a", "b") == 100_000
            assert machine.told["out"].lanes == 2
            machine.limits = LimitsConfig()
            await trio.sleep(1)
            assert machine.told["a"].rate is None
        nursery.cancel_scope.cancel()


async def test_a_task_keeps_its_own_lower_limit_and_others_get_the_rest(autojump_clock: Any) -> None:
    machine = Machine(BandwidthConfig(receive=1_000_000))
    own: list[int | None] = [100_000]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.allotment.run)
        with machine.worker("a", own=lambda: own[0]) as a, machine.worker("b") as b:
            for step in range(1, 5):
                a.note(step * 50_000, step * 0.4)
                b.note(step * 450_000, step * 0.4)
                await trio.sleep(0.5)
            assert machine.told["a"] == Allowance(100_000, "task", 4)
            assert machine.told["b"].rate is not None
            assert machine.told["b"].rate >= 850_000
            own[0] = None
            a.note(300_000, 2.0)
            b.note(2_000_000, 2.0)
            machine.allotment.changed()
            await trio.sleep(0.2)
            assert machine.told["a"].rate == machine.told["b"].rate == 500_000
        nursery.cancel_scope.cancel()


async def test_the_timetable_counts_when_its_hour_comes(autojump_clock: Any) -> None:
    entry = BandwidthEntry(name="evening", when="18:00-22:00", receive=5_000_000, task=1_000_000)
    machine = Machine(BandwidthConfig(receive=100_000, timetable=(entry,)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.allotment.run)
        with machine.worker("a"):
            await trio.sleep(1)
            assert machine.told["a"].rate == 100_000
            machine.moment = at(0, 18)
            await trio.sleep(1)
            assert machine.told["a"] == Allowance(1_000_000, "agent, each task", 4)
        nursery.cancel_scope.cancel()


async def test_who_moves_little_leaves_room_until_it_has_to_wait(autojump_clock: Any) -> None:
    machine = Machine(BandwidthConfig(receive=1_000_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.allotment.run)
        with machine.worker("idle") as idle, machine.worker("busy") as busy:
            for step in range(1, 9):
                idle.note(step * 1000, 0.0)
                busy.note(step * 400_000, step * 0.2)
                await trio.sleep(0.5)
            assert (machine.told["busy"].rate or 0) > 850_000
            assert machine.total("idle", "busy") <= 1_000_000
            for step in range(9, 13):
                idle.note(step * 50_000, step * 0.2)
                busy.note(step * 400_000, step * 0.2)
                await trio.sleep(0.5)
            assert machine.told["idle"].rate == machine.told["busy"].rate == 500_000
        nursery.cancel_scope.cancel()
