"""How fast lanes are taken to be, and which request of which lane is worth asking for again; plain decisions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agent.transfer.asking.end_game import LEAST_WAIT, NEWEST, WORTH, LaneSpeed, remaining, slowest, twin_of
from agent.transfer.basis.jobs import PackRequest, RangeRequest

FILE: Any = object()


def pack(number: int, *sizes: int) -> PackRequest:
    jobs: Any = [SimpleNamespace(row=SimpleNamespace(size=size)) for size in sizes]
    return PackRequest(number, jobs, sum(sizes))


def range_of(number: int, length: int, arrived: int = 0, offset: int = 0) -> RangeRequest:
    return RangeRequest(number, FILE, offset, length, arrived)


def measured(*looks: tuple[float, int, bool]) -> LaneSpeed:
    """A lane that was looked at at these times, had brought so many bytes in all, and had work or none."""
    meter = SimpleNamespace(content=0)
    speed = LaneSpeed(meter)
    for now, content, works in looks:
        moved = content != meter.content
        meter.content = content
        assert speed.measure(now, works=works) is moved
    return speed


def test_only_lanes_that_had_work_all_the_time_show_what_they_can_do() -> None:
    assert measured((1, 0, True)).rate is None
    assert measured((1, 0, True), (3, 100, True)).rate == 50
    assert measured((1, 0, False), (3, 100, True)).rate is None
    assert measured((1, 0, True), (3, 100, False)).rate is None
    # Two looks at one moment say nothing.
    assert measured((1, 0, True), (1, 100, True)).rate is None
    assert not LaneSpeed().measure(1, works=True)


def test_the_newest_measurement_counts_most_and_the_others_are_not_forgotten() -> None:
    speed = measured((0, 0, True), (1, 100, True), (2, 300, True))
    assert speed.rate == pytest.approx((1 - NEWEST) * 100 + NEWEST * 200)
    # A lane from which nothing comes becomes slow.
    for second in range(3, 40):
        speed.measure(second, works=True)
    assert speed.rate == pytest.approx(0, abs=0.01)


def test_a_lane_was_heard_when_something_came_or_when_it_got_work() -> None:
    assert measured((1, 0, True), (2, 5, True), (3, 5, True), (9, 5, True)).heard == 2
    assert measured((1, 5, True), (5, 5, False), (6, 5, False)).heard == 6
    assert measured((1, 5, False), (7, 5, True), (9, 5, True)).heard == 7


def test_what_remains_of_a_request() -> None:
    assert remaining(range_of(1, 100, 30)) == 70
    assert remaining(range_of(1, 100, 100)) == 0
    request = pack(1, 5, 7, 11)
    # Empty files have to come, too.
    assert remaining(request) == 24
    request.seen |= {0, 2}
    assert remaining(request) == 8


def test_the_request_that_takes_longest_is_asked_for_again() -> None:
    first, second, third = range_of(1, 100), range_of(2, 100), range_of(3, 100)
    lanes = [(10.0, [first, second]), (5.0, [third])]
    # 10 s, 20 s and 20 s: of those that take equally long the first.
    assert slowest(lanes, 1e6) is second
    assert slowest([(10.0, [first, second]), (4.0, [third])], 1e6) is third
    assert slowest([(None, [first])], 1e6) is None
    assert slowest([], 1e6) is None
    # From a lane that stands still it comes never.
    assert slowest([(0.0, [first])], 1e6) is first


@pytest.mark.parametrize(("seconds", "worth"), [(LEAST_WAIT, False), (LEAST_WAIT + 0.01, True)])
def test_what_comes_soon_anyway_is_waited_for(seconds: float, worth: bool) -> None:
    request = range_of(1, 1000)
    assert slowest([(1000 / seconds, [request])], 1e9) is (request if worth else None)
    # Of a lane that was not measured it is hoped that it is fast.
    assert slowest([(1000 / seconds, [request])], None) is (request if worth else None)


@pytest.mark.parametrize(("times", "worth"), [(WORTH, False), (WORTH + 0.01, True)])
def test_it_has_to_be_much_faster_elsewhere(times: float, worth: bool) -> None:
    request = range_of(1, 1000)
    assert slowest([(10.0, [request])], 10.0 * times) is (request if worth else None)


def test_nothing_is_asked_for_a_third_time_or_when_it_is_there() -> None:
    asked, there = range_of(1, 100), range_of(2, 100, 100)
    twin = twin_of(asked, 9)
    assert slowest([(1.0, [asked, there])], 1e6) is None
    assert slowest([(1.0, [twin])], 1e6) is None
    # What is before a request on its lane comes first.
    last = range_of(3, 10)
    assert slowest([(90.0, [asked, last])], 1e6) is last
    assert slowest([(120.0, [asked, last])], 1e6) is None


def test_a_twin_is_the_rest_and_counts_with_its_request() -> None:
    request = range_of(1, 100, 30, offset=1000)
    twin = twin_of(request, 9)
    assert isinstance(twin, RangeRequest)
    assert (twin.r, twin.file, twin.offset, twin.length, twin.arrived) == (9, FILE, 1030, 70, 0)
    assert twin.owners is request.owners
    assert (twin.twin, request.twin) == (request, twin)
    small = pack(2, 5, 7)
    small.seen.add(0)
    again = twin_of(small, 9)
    assert isinstance(again, PackRequest)
    assert (again.r, again.jobs, again.size, again.seen) == (9, small.jobs, 12, set())
    assert again.owners is small.owners
    assert (again.twin, small.twin) == (small, again)
