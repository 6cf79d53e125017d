"""Two tasks at once into one folder, each killed, paused and disturbed by faults on its own, for tests by seed."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import trio

from agent.storage.faulty import Plan
from protocol.control import TaskItem, TaskObserved, TaskOptions, TaskOrder
from tests.agent.engine_inside import Crashed, Engine, Line, mortal
from tests.agent.misfortune import misfortune


class OneOfTwo(Engine):
    """A task among others in one process: who dies is found by its journal, and nothing else dies with it."""

    task_id = ""

    def order(self) -> TaskOrder:
        return msgspec.structs.replace(super().order(), task_id=self.task_id)

    @contextlib.contextmanager
    def _mortal(self) -> Iterator[None]:
        yield


class Disturbed:
    """One of the two. Who derives from it gives it the rest and calls `start`."""

    options: TaskOptions
    faults: float
    """How probable one is at each call."""
    deaths: list[int]
    """At which calls, the last one first."""
    pauses: int
    place = ""
    """Where in the folder of both its own begins."""

    def __init__(self, number: int, seed: int, base: Path) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.number, self.base, self.destination = number, base / str(number), base / "both"
        self.counts: defaultdict[str, int] = defaultdict(int)

    def start(self) -> None:
        self.engine = self._engine()

    def arrange(self, engine: Engine) -> None:
        """What else a run of it has by chance."""

    def _engine(self) -> OneOfTwo:
        items = [TaskItem(source_path="/", destination_path=f"/{self.place}", recursive=True)]
        engine = OneOfTwo(self.base, self.options, items, plan=self._plan())
        engine.task_id = f"{self.number}1111111-2222-4333-8444-555555555555"
        engine.destination = self.destination
        engine.on_report = self._paused
        self.arrange(engine)
        return engine

    def _plan(self) -> Plan:
        return misfortune(self.random, self.deaths, self.faults, self.counts)

    def _paused(self, line: Line, observed: TaskObserved) -> None:
        if self.pauses and observed.state == "ACTIVE" and self.random.random() < 0.3:
            self.pauses -= 1
            self.counts["pauses"] += 1
            line.want("pause")

    async def run(self) -> TaskObserved:
        """Until it ends; what it said is kept over deaths and pauses."""
        while True:
            events = self.engine.events
            try:
                observed = await self.engine.run(60)
            except Crashed:
                observed = None
            if observed is not None and observed.state != "PAUSED":
                return observed
            self.engine = self._engine()
            self.engine.events = list(events)


async def run_at_once(tasks: Sequence[Disturbed]) -> dict[int, TaskObserved]:
    """How each ended, by its number."""
    results: dict[int, TaskObserved] = {}

    async def run(task: Disturbed) -> None:
        results[task.number] = await task.run()

    def engine_of(file: Path) -> Engine:
        return next(task.engine for task in tasks if file.is_relative_to(task.base))

    with mortal(engine_of):
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(run, task)
    return results
