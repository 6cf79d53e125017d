"""How a task's content flows: readings of both ends, taken now and then, become rates and a verdict. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.meter.time_shares import Doing
from agent.meter.verdict import Side, limiting_side, share_out
from protocol.control import Flow, LaneFlow
from protocol.session import LaneReading, LaneReadings


@dataclass(frozen=True)
class Reading:
    """The destination's end at one moment; everything is counted since some beginning."""

    now: float
    processor: float
    # Seconds in which nothing more was asked for until storage had settled something.
    unsettled: float
    files: int
    # Of each lane: content bytes, `TimeShares.totals`, and its round-trip time as seen from here.
    lanes: Mapping[int, tuple[int, list[float], float | None]] = field(default_factory=dict)
    source: LaneReadings | None = None
    # Of each lane, content bytes that compression kept off the network.
    saved: Mapping[int, int] = field(default_factory=dict)


def flow_between(before: Reading, after: Reading) -> Flow:
    """What happened between two readings."""
    seconds = max(after.now - before.now, 1e-3)
    at_source = _lanes_of(after.source)
    lanes = []
    for number, (content, _, rtt) in sorted(after.lanes.items()):
        moved = content - before.lanes.get(number, (0, [], None))[0]
        saved = after.saved.get(number, 0) - (before.saved.get(number, 0) if moved >= 0 else 0)
        known = at_source.get(number)
        lanes.append(
            LaneFlow(
                lane=number,
                # A lane that was opened anew counts from its own beginning.
                goodput=(moved if moved >= 0 else content) / seconds,
                saved=saved / seconds,
                rtt=known.rtt if known is not None and known.rtt is not None else rtt,
                retransmissions=0 if known is None else known.retransmissions,
            )
        )
    limited_by = ""
    if lanes:
        limited_by = limiting_side(_source(before.source, after.source), _destination(before, after, seconds))
    return Flow(
        limited_by=limited_by,
        goodput=sum(lane.goodput for lane in lanes),
        files_per_second=max(0, after.files - before.files) / seconds,
        lanes=lanes,
    )


def _lanes_of(readings: LaneReadings | None) -> dict[int, LaneReading]:
    return {} if readings is None else {lane.lane: lane for lane in readings.lanes}


def _destination(before: Reading, after: Reading, seconds: float) -> Side:
    nothing = [0.0] * len(Doing)
    return Side(
        shares=share_out(
            _sum([before.lanes[number][1] for number in after.lanes if number in before.lanes]),
            _sum([times for number, (_, times, _) in after.lanes.items() if number in before.lanes]),
        )
        if after.lanes
        else nothing,
        processor=(after.processor - before.processor) / seconds,
        unsettled=(after.unsettled - before.unsettled) / seconds,
    )


def _source(before: LaneReadings | None, after: LaneReadings | None) -> Side:
    if before is None or after is None or after.now <= before.now:
        return Side()
    seconds = after.now - before.now
    old, new = _lanes_of(before), _lanes_of(after)
    both = [(old[number], new[number]) for number in new if number in old]
    # A lane that was opened anew says nothing about the time before.
    both = [(first, last) for first, last in both if last.content >= first.content]
    busy = [last.busy - first.busy for first, last in both if first.busy is not None and last.busy is not None]
    window = [last.window - first.window for first, last in both]
    return Side(
        shares=share_out(_sum([first.times for first, _ in both]), _sum([last.times for _, last in both])),
        processor=(after.processor - before.processor) / seconds,
        busy=max(busy) / seconds if busy else None,
        window=max(window, default=0.0) / seconds,
    )


def _sum(rows: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * len(Doing)
