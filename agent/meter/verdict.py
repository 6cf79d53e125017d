"""Which side holds a transfer up, from where the time of both ends' threads went. Pure.

The kernel says whether a sender waited for the network or the network for the sender (`busy`, RFC 4898's
"SndLim" counters), the threads say what they did meanwhile, and the budget of unsettled bytes says whether the
destination's storage kept up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.meter.time_shares import Doing

# From this share of the time on something counts as what holds the transfer up.
MUCH = 0.35
# A process that computes for this share of the time can do no more: one interpreter runs at a time.
FULL = 0.9


@dataclass(frozen=True)
class Side:
    """One end of a session over a span of time: shares of the time of its lanes' threads, and of one processor."""

    shares: Sequence[float] = field(default_factory=lambda: [0.0] * len(Doing))
    processor: float = 0.0
    # Source: share of the time in which the kernel had something to send; None where it does not tell.
    busy: float | None = None
    # Source: share of the time in which the receiver's window was all that held it back.
    window: float = 0.0
    # Destination: share of the time in which nothing more could be asked for until something had settled.
    unsettled: float = 0.0


def share_out(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Shares of the time that passed between two readings of `TimeShares.totals`."""
    passed = [max(0.0, new - old) for old, new in zip(before, after, strict=True)]
    whole = sum(passed)
    return [0.0] * len(passed) if whole <= 0 else [each / whole for each in passed]


def limiting_side(source: Side, destination: Side) -> str:
    """``a limit``, ``source disk``, ``source CPU``, ``network``, ``destination CPU``, ``destination disk``, or
    ``planning`` where the source has nothing to do because nothing is asked of it."""
    if destination.shares[Doing.LIMITED] > MUCH or source.shares[Doing.LIMITED] > MUCH:
        return "a limit"
    idle = source.shares[Doing.IDLE] > MUCH and not _kernel_is_behind(source)
    if destination.unsettled > MUCH and idle:
        # Enough is asked for in advance: a source with nothing to do means that storage does not keep up.
        return "destination CPU" if destination.processor > FULL else "destination disk"
    if source.shares[Doing.STORAGE] > MUCH and source.shares[Doing.STORAGE] > source.shares[Doing.NETWORK]:
        return "source CPU" if source.processor > FULL else "source disk"
    if (
        destination.shares[Doing.STORAGE] > MUCH
        and destination.shares[Doing.STORAGE] > destination.shares[Doing.NETWORK]
    ):
        return "destination CPU" if destination.processor > FULL else "destination disk"
    if source.processor > FULL or destination.processor > FULL:
        return "source CPU" if source.processor > destination.processor else "destination CPU"
    if idle:
        return "planning"
    if source.window > MUCH:
        return "destination CPU"
    if source.busy is not None and source.busy < MUCH:
        # The network waits for the source.
        return "source CPU"
    return "network"


def _kernel_is_behind(source: Side) -> bool:
    """Whether the kernel always had something that the network did not take yet. A source whose threads have nothing to
    do is none then: on a long path its send buffers hold whole ranges."""
    return source.busy is not None and source.busy > FULL and source.window <= MUCH
