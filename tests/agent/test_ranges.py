"""How much of a large file is asked for at once: much where few lanes share the budget, and so that all get some."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.transfer.asking.budget import UNSETTLED_BYTES, Budget
from agent.transfer.asking.ranges import LANE_WINDOW, LONG_RANGE, MEMORY_RANGE, MEMORY_WINDOW, RANGE_BYTES
from agent.transfer.receiving.large_files import LargeFiles
from tests.agent.test_end_game import Scene

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("lanes", "budget", "wanted"),
    [
        (0, UNSETTLED_BYTES, RANGE_BYTES),
        (1, UNSETTLED_BYTES, LONG_RANGE),
        (2, UNSETTLED_BYTES, LONG_RANGE),
        (3, UNSETTLED_BYTES, RANGE_BYTES),
        (1, LANE_WINDOW, LONG_RANGE),
        (1, LANE_WINDOW - 1, RANGE_BYTES),
    ],
)
def test_long_ranges_are_for_few_lanes_with_room(lanes: int, budget: int, wanted: int) -> None:
    scene = Scene(honours_abandon=True)
    for number in range(1, lanes + 1):
        scene.open(number)
        scene.fetcher._lanes[number].speed.rate = 1000 * MIB
    assert scene.fetcher.range_bytes(budget) == wanted


def test_long_ranges_are_for_lanes_that_bring_them_soon() -> None:
    scene = Scene(honours_abandon=True)
    for number in (1, 2):
        scene.open(number)
    fast, slow = (scene.fetcher._lanes[number].speed for number in (1, 2))
    for rate, wanted in ((None, LONG_RANGE), (100 * MIB, LONG_RANGE), (31 * MIB, RANGE_BYTES), (32 * MIB, LONG_RANGE)):
        fast.rate, slow.rate = 1000 * MIB, rate
        assert scene.fetcher.range_bytes(UNSETTLED_BYTES) == wanted
    fast.rate = slow.rate = None
    assert scene.fetcher.range_bytes(UNSETTLED_BYTES) == RANGE_BYTES, "neither has brought anything yet"


@pytest.mark.parametrize(
    ("lanes", "budget", "rate", "wanted"),
    [
        (1, UNSETTLED_BYTES, 64, MEMORY_RANGE),
        (1, UNSETTLED_BYTES, 63, LONG_RANGE),
        (1, UNSETTLED_BYTES, 31, RANGE_BYTES),
        (1, MEMORY_WINDOW - 1, 1000, LONG_RANGE),
        (2, UNSETTLED_BYTES, 1000, LONG_RANGE),
        (3, UNSETTLED_BYTES, 1000, RANGE_BYTES),
    ],
)
def test_the_longest_ranges_are_for_storage_in_memory(lanes: int, budget: int, rate: int, wanted: int) -> None:
    scene = Scene(honours_abandon=True, in_memory=True)
    for number in range(1, lanes + 1):
        scene.open(number)
        scene.fetcher._lanes[number].speed.rate = rate * MIB
    assert scene.fetcher.range_bytes(budget) == wanted


@given(
    st.integers(1, 100 * MIB),
    st.sampled_from([MIB, 16 * MIB]),
    st.lists(st.booleans(), min_size=100, max_size=100),
    st.lists(st.integers(0, 4), min_size=1),
)
def test_whatever_lanes_come_and_go_what_is_missing_is_asked_for_once(
    size: int, block: int, have: list[bool], lanes: list[int]
) -> None:
    count = -(-size // block)
    bitmap = bytearray(-(-count // 8))
    for index in range(count):
        bitmap[index >> 3] |= have[index] << (index & 7)
    fetcher, told = _Changing(lanes), list[tuple[int, int]]()
    run: Any = SimpleNamespace(fetcher=fetcher, budget=Budget())
    file: Any = SimpleNamespace(job=SimpleNamespace(row=SimpleNamespace(size=size)), block=block)
    for offset, length in LargeFiles._ranges(SimpleNamespace(_run=run), file, bitmap):  # type: ignore[arg-type]
        # As many lanes as there were when it was asked for.
        assert 0 < length <= max(fetcher.last, block)
        assert offset % block == 0
        told.append((offset, length))
    asked = {index for offset, length in told for index in range(offset // block, -(-(offset + length) // block))}
    assert asked == {index for index in range(count) if not have[index]}
    missing = sum(min(block, size - index * block) for index in range(count) if not have[index])
    assert sum(length for _, length in told) == missing
    assert told == sorted(told)


class _Changing:
    """A fetcher whose lanes come and go."""

    def __init__(self, lanes: list[int]) -> None:
        self._lanes: Iterator[int] = iter(lanes * 100)
        self.last = 0

    def range_bytes(self, budget: int) -> int:
        assert budget == UNSETTLED_BYTES
        self.last = LONG_RANGE if next(self._lanes) <= 2 else RANGE_BYTES
        return self.last
