"""Waiting after wrong secrets: a sliding window for each subject, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.auth.guesses import GuessLimit


def test_the_oldest_failure_decides_when_to_try_again() -> None:
    limit = GuessLimit(3, 60.0)
    for now in (0.0, 10.0, 20.0):
        assert limit.retry_after(["a"], now) == 0
        limit.failed(["a"], now)
    assert limit.retry_after(["a"], 20.0) == 40.0
    assert limit.retry_after(["b"], 20.0) == 0
    assert limit.retry_after(["a", "b"], 59.0) == 1.0
    assert limit.retry_after(["a"], 60.0) == 0
    limit.failed(["a"], 60.0)
    assert limit.retry_after(["a"], 60.0) == 10.0


def test_memory_is_bounded() -> None:
    limit = GuessLimit(1, 1e9)
    for index in range(30_000):
        limit.failed([str(index)], 0.0)
    assert limit.statistics().subjects == 20_000
    assert limit.statistics().failures == 30_000
    assert limit.retry_after(["29999"], 1.0) > 0


@given(st.lists(st.floats(0, 1000), max_size=60).map(sorted))
def test_no_window_ever_holds_more_failures_than_allowed(times: list[float]) -> None:
    limit, taken = GuessLimit(5, 100.0), []
    for now in times:
        if limit.retry_after(["a"], now) == 0:
            limit.failed(["a"], now)
            taken.append(now)
    for start in taken:
        assert sum(start <= moment < start + 100.0 for moment in taken) <= 5
