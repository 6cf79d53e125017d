"""Keeps all workers of an agent together within its owner's limits: tells each what it may move, again and again.

A worker says now and then how much it has moved and how long its lanes had to wait; what comes back is a share of what
all may move (`shares`), or the limit of its own task if that is less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

import trio

from agent.config.keys import BandwidthConfig, BandwidthEntry, LimitsConfig
from agent.limits.shares import demand, divide
from agent.limits.timetable import entry_at

# Seconds between two divisions.
DIVIDE_EVERY = 0.5
# A worker that has not spoken for so long (seconds) moves nothing: they speak whenever they have moved something.
SILENT = 2.0
# A share that has changed by less than this part is not worth a message.
WORTH_TELLING = 0.02

Direction = Literal["receive", "send"]


@dataclass(frozen=True)
class Allowance:
    """What one worker may do now: bytes a second (None: any), whose limit that is, lanes of its session, percent of a
    processor (None: any) and MiB of content on its way."""

    rate: int | None
    source: str
    lanes: int
    cpu: int | None = None
    memory: int = 48


Tell = Callable[[Allowance], Awaitable[None]]


@dataclass(eq=False)
class Worker:
    """One worker as the division sees it."""

    direction: Direction
    task_rate: Callable[[], int | None]
    tell: Tell
    allowance: Allowance
    # Its clock, what it had moved and how long it had waited when it last spoke; what it wanted since the time before.
    said: tuple[float, int, float]
    wanted: float = float("inf")
    # All that was moved in its direction, by all workers since the start.
    totals: Counter[Direction] = field(default_factory=Counter)

    def note(self, moved: int, waited: float) -> None:
        """What it says of itself, both counted since its start."""
        now = trio.current_time()
        before, self.said = self.said, (now, moved, waited)
        self.totals[self.direction] += moved - before[1]
        self.wanted = demand(moved - before[1], now - before[0], waited - before[2])

    def demand(self, now: float) -> float:
        """How much it would move now; who says nothing moves nothing."""
        return self.wanted if now - self.said[0] < SILENT else 0.0


def in_force(bandwidth: BandwidthConfig, moment: datetime) -> BandwidthConfig | BandwidthEntry:
    """The limits that count at a moment: those of the time-table's first entry that holds it, else the general ones."""
    return entry_at(bandwidth.timetable, moment) or bandwidth


class Allotment:
    """Run `run`; everything else is called in the same trio thread."""

    def __init__(
        self, limits: Callable[[], LimitsConfig], clock: Callable[[], datetime] = lambda: datetime.now().astimezone()
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._workers: list[Worker] = []
        # Content bytes that were moved since the start.
        self.moved: Counter[Direction] = Counter()
        self._wake = trio.Event()

    def begin(self, direction: Direction, task_rate: Callable[[], int | None]) -> Allowance:
        """What a worker that starts now may do until it is told more: an even share."""
        limits, rates = self._limits(), self.in_force()
        total = rates.receive if direction == "receive" else rates.send
        others = sum(worker.direction == direction for worker in self._workers)
        return _least(None if total is None else total / (others + 1), rates.task, task_rate(), limits)

    @contextmanager
    def worker(
        self, direction: Direction, task_rate: Callable[[], int | None], begun: Allowance, tell: Tell
    ) -> Iterator[Worker]:
        """Have a worker take part; ``begun`` is what it was told at its start."""
        worker = Worker(direction, task_rate, tell, begun, (trio.current_time(), 0, 0.0), totals=self.moved)
        self._workers.append(worker)
        self.changed()
        try:
            yield worker
        finally:
            self._workers.remove(worker)
            self.changed()

    def in_force(self) -> BandwidthConfig | BandwidthEntry:
        """The owner's limits that count now."""
        return in_force(self._limits().bandwidth, self._clock())

    def changed(self) -> None:
        """Limits, tasks or workers are others than before: divide at once."""
        self._wake.set()

    async def run(self) -> None:
        """Divide until cancelled."""
        while True:
            for worker, allowance in self.divided(trio.current_time()):
                worker.allowance = allowance
                await worker.tell(allowance)
            self._wake = trio.Event()
            with trio.move_on_after(DIVIDE_EVERY):
                await self._wake.wait()
                # Several things may change in one moment.
                await trio.sleep(DIVIDE_EVERY / 10)

    def divided(self, now: float) -> list[tuple[Worker, Allowance]]:
        """Whom to tell what."""
        limits, rates = self._limits(), self.in_force()
        news = []
        totals: tuple[tuple[Direction, int | None], ...] = (("receive", rates.receive), ("send", rates.send))
        for direction, total in totals:
            group = [worker for worker in self._workers if worker.direction == direction]
            wants = {}
            for worker in group:
                own = [rate for rate in (rates.task, worker.task_rate()) if rate is not None]
                wants[worker] = min([worker.demand(now), *own])
            shares = {} if total is None else divide(total, wants)
            for worker in group:
                allowance = _least(shares.get(worker), rates.task, worker.task_rate(), limits)
                if _differs(worker.allowance, allowance):
                    news.append((worker, allowance))
        return news


def _least(share: float | None, each: int | None, task: int | None, limits: LimitsConfig) -> Allowance:
    """The tightest of the limits, and whose it is."""
    known = ((task, "task"), (each, "agent, each task"), (share, "agent"))
    tightest = min(((rate, source) for rate, source in known if rate is not None), key=lambda row: row[0], default=None)
    if tightest is None:
        return Allowance(None, "", limits.lanes, limits.cpu, limits.memory)
    return Allowance(max(1, int(tightest[0])), tightest[1], limits.lanes, limits.cpu, limits.memory)


def _differs(old: Allowance, new: Allowance) -> bool:
    if (old.rate is None) != (new.rate is None) or replace(old, rate=new.rate) != new:
        return True
    return old.rate is not None and new.rate is not None and abs(new.rate - old.rate) > WORTH_TELLING * old.rate
