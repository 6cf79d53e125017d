"""How one limit is divided among those who work at the same time: max-min fairness. Pure.

Whoever needs less than an even share gets what it needs, and the others share the rest evenly (Bertsekas and Gallager,
Data Networks, 6.5.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")

# Whoever moves little is given room to grow until the next division.
ROOM = 1.5
# And this part of an even share at least, so that who begins does not begin with nothing.
LEAST = 0.1


def demand(moved: float, seconds: float, waited: float) -> float:
    """How much somebody would move: bytes a second, infinite for whoever had to wait."""
    return float("inf") if waited > 0.02 * seconds or not seconds else moved / seconds * ROOM


def divide(total: float, demands: Mapping[K, float]) -> dict[K, float]:
    """A share for each, which together are no more than the total."""
    shares: dict[K, float] = {}
    left, waiting = total, sorted(demands, key=lambda key: demands[key])
    floor = LEAST * total / max(1, len(demands))
    for index, key in enumerate(waiting):
        even = left / (len(waiting) - index)
        shares[key] = min(max(demands[key], floor), even)
        left -= shares[key]
    # What nobody needs at the moment may be used by anybody, evenly.
    for key in shares:
        shares[key] += left / len(shares)
    return shares
