"""Long runs in pieces: which seeds and states of them, from the environment.

``SEEDS=1500:1800`` takes these seeds instead of all of a test's. ``PART=2/5`` takes the second, seventh, twelfth and so
on of the calls or states that a test goes through; five such runs are the whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def chosen_seeds(usual: range) -> range:
    """The seeds of a run. Raises ValueError for a piece that is empty or is not one of these."""
    asked = os.environ.get("SEEDS")
    if not asked:
        return usual
    first, _, end = asked.partition(":")
    chosen = range(int(first), int(end))
    if not chosen or chosen[0] < usual.start or chosen[-1] >= usual.stop:
        raise ValueError(f"SEEDS={asked}: this test has {usual.start}:{usual.stop}")
    return chosen


def part(whole: Iterable[T]) -> Iterator[T]:
    """What of a long row is this run's. Raises ValueError for an impossible part."""
    number, _, parts = os.environ.get("PART", "1/1").partition("/")
    if not 1 <= int(number) <= int(parts):
        raise ValueError(f"PART={number}/{parts}: there is no such part")
    return islice(whole, int(number) - 1, None, int(parts))
