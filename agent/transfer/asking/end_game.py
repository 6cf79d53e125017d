"""Which request of a slow lane an idle one should ask for again, so that the end of a transfer need not wait. Pure.

As in BitTorrent's end game, but one request at a time and only where the second asking is expected to be much faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from agent.transfer.basis.jobs import PackRequest, RangeRequest, Request

# Asked for again is what is expected to take so many seconds and so many times as long as on the idle lane.
LEAST_WAIT, WORTH = 1.0, 2.0
# How much the newest measurement counts.
NEWEST = 0.4
# A lane that has work, and from which nothing has come for so long (seconds) while others moved, is given up.
STALLED = 20.0


class Meter(Protocol):
    """What is looked at of a lane."""

    content: int


@dataclass(eq=False)
class LaneSpeed:
    """How fast one lane delivers."""

    meter: Meter | None = None
    # Bytes a second; None until it was measured.
    rate: float | None = None
    _content: int = 0
    _measured: float | None = None
    _worked: bool = False
    # When something came last, or when it was given work after it had none.
    heard: float = field(default=0.0)

    def measure(self, now: float, *, works: bool) -> bool:
        """Look at the meter; whether something has come since the last time."""
        if self.meter is None:
            return False
        before, moved = self._measured, self.meter.content - self._content
        self._content, self._measured = self.meter.content, now
        if moved or not works or not self._worked:
            self.heard = now
        # Only a lane that had work all the time shows what it can do.
        if before is not None and works and self._worked and now > before:
            newest = moved / (now - before)
            self.rate = newest if self.rate is None else (1 - NEWEST) * self.rate + NEWEST * newest
        self._worked = works
        return bool(moved)


def remaining(request: Request) -> int:
    """Bytes of a request that have not been delivered."""
    if isinstance(request, RangeRequest):
        return request.length - request.arrived
    # One more, so that empty files count.
    return sum(job.row.size for index, job in enumerate(request.jobs) if index not in request.seen) + 1


def slowest(lanes: Iterable[tuple[float | None, Iterable[Request]]], idle_rate: float | None) -> Request | None:
    """Of lanes' rates and their requests in order, what is worth asking for again on a lane of another rate."""
    best: Request | None = None
    longest = LEAST_WAIT
    for rate, requests in lanes:
        if rate is None:
            # Too new to be judged.
            continue
        ahead = 0
        for request in requests:
            ahead += remaining(request)
            if request.twin is not None or not remaining(request):
                continue
            wait = ahead / rate if rate else float("inf")
            again = remaining(request) / idle_rate if idle_rate else 0.0
            if wait > longest and wait > WORTH * again:
                best, longest = request, wait
    return best


def twin_of(request: Request, number: int) -> Request:
    """The rest of a request, to be asked for once more under this number; what comes twice counts once."""
    twin: Request
    if isinstance(request, RangeRequest):
        # Looked at once: the thread of its lane moves it on meanwhile.
        offset = request.offset + request.arrived
        twin = RangeRequest(
            number, request.file, offset, request.length - (offset - request.offset), owners=request.owners
        )
        twin.twin = request
        request.twin = twin
    else:
        twin = PackRequest(number, request.jobs, request.size, owners=request.owners)
        twin.twin = request
        request.twin = twin
    return twin
