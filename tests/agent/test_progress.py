"""How far a task is, said to its daemon all the time and to its owner now and then; a virtual clock."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from agent.transfer.course import progress
from agent.transfer.course.progress import EVERY, FIRST_PAUSE, LONGEST_PAUSE, Progress
from protocol.control import Counters, Flow, TaskObserved

ACTIVE = TaskObserved(task_id="t", revision=1, state="ACTIVE", counters=Counters())


class Moving:
    """A task that moves so many bytes a second, and what is said of it; times in seconds since it began."""

    def __init__(self, speed: float = 0.0, observed: TaskObserved = ACTIVE) -> None:
        self.speed = speed
        self.observed = observed
        self.began = trio.current_time()
        self.reports: list[float] = []
        self.events: list[tuple[float, dict[str, Any]]] = []
        self.progress = Progress(self.look, lambda _: self.reports.append(self.now()), self.tell)

    def now(self) -> float:
        return trio.current_time() - self.began

    def look(self) -> TaskObserved:
        counters = Counters(bytes_transferred=round(self.speed * self.now()))
        return msgspec.structs.replace(self.observed, counters=counters, rate=self.progress.rate)

    def tell(self, details: str) -> None:
        self.events.append((self.now(), json.loads(details)))

    async def run(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.progress.run()


async def test_a_daemon_hears_often(autojump_clock: trio.testing.MockClock) -> None:
    task = Moving()
    await task.run(100 * EVERY + 0.1)
    assert len(task.reports) == 100


async def test_an_owner_hears_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(progress, "EVERY", 10.0)
    task = Moving()
    await task.run(6 * 3600)
    times = [when for when, _ in task.events]
    pauses = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert pauses[:4] == pytest.approx([FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE], abs=10)
    assert max(pauses) == pauses[-1] == pytest.approx(LONGEST_PAUSE, abs=10)


async def test_the_rate_is_smoothed_bytes_a_second(autojump_clock: trio.testing.MockClock) -> None:
    task = Moving(speed=1e6)
    await task.run(1.5 * EVERY)
    assert task.progress.rate == pytest.approx(0.2e6, rel=0.01)
    await task.run(30)
    assert task.progress.rate == pytest.approx(1e6, rel=0.01)


async def test_an_event_has_globuss_fields_and_who_holds_the_task_up(autojump_clock: trio.testing.MockClock) -> None:
    task = Moving(speed=1e6)
    await task.run(FIRST_PAUSE + 1)
    ((when, details),) = task.events
    assert details == {
        "bytes_transferred": pytest.approx(1e6 * when),
        "duration": pytest.approx(when, abs=0.1),
        "mbps": pytest.approx(8, rel=0.01),
    }
    flow = Flow(lanes=[], files_per_second=2.345, limited_by="network")
    task = Moving(observed=msgspec.structs.replace(ACTIVE, flow=flow))
    await task.run(FIRST_PAUSE + 1)
    ((_, details),) = task.events
    assert (details["files_per_second"], details["lanes"], details["limited_by"]) == (2.3, 0, "network")


async def test_a_task_that_waits_has_no_event_of_progress(autojump_clock: trio.testing.MockClock) -> None:
    task = Moving(observed=msgspec.structs.replace(ACTIVE, state="WAITING"))
    await task.run(FIRST_PAUSE + 1)
    assert task.events == []
    assert task.reports
