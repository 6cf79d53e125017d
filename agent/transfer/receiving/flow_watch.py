"""How the content of one run flows: the meters of both ends are read now and then, and two readings make a `Flow`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
import trio

from agent.meter.flow import Reading, flow_between
from agent.transfer.asking.source_session import SessionLost
from agent.transfer.course.run import Run
from agent.transfer.receiving.lanes import Lanes
from agent.transfer.stalls.lane_watch import source_silent
from protocol.control import Flow
from protocol.session import LANE_READINGS, LaneReadings

# How often (seconds) the meters are read, and how long the source may take to answer.
INTERVAL, ANSWER_PATIENCE = 1.0, 5.0


class FlowWatch:
    """``flow`` is that of the last interval, None before the first one has ended. ``files`` tells how many files the
    task has transferred by now."""

    def __init__(self, run: Run, lanes: Lanes, files: Callable[[], int]) -> None:
        self.flow: Flow | None = None
        self._run = run
        self._lanes = lanes
        self._files = files

    async def run(self) -> None:
        """Until cancelled."""
        before = await self._reading()
        while True:
            await trio.sleep(INTERVAL)
            after = await self._reading()
            self.flow = msgspec.structs.replace(flow_between(before, after), renewed=self._lanes.renewed)
            before = after

    async def _reading(self) -> Reading:
        source = await self._reading_of_source()
        lanes = {}
        for number, meter in self._lanes.meters.items():
            facts = meter.facts()
            lanes[number] = (meter.content, meter.times.totals(), None if facts is None else facts.rtt)
        processes = self._run.context.processes
        return Reading(
            now=time.monotonic(),
            processor=time.process_time() + (0.0 if processes is None else processes.processor),
            unsettled=self._run.budget.blocked,
            files=self._files(),
            lanes=lanes,
            source=source,
            saved={number: meter.saved for number, meter in self._lanes.meters.items()},
        )

    async def _reading_of_source(self) -> LaneReadings | None:
        if LANE_READINGS in self._run.session.abilities:
            # What is measured is never worth the session: when it ends, whoever runs it says why.
            with suppress(SessionLost), trio.move_on_after(ANSWER_PATIENCE):
                readings = await self._run.session.read_lanes()
                self._run.context.on_standstill("source", source_silent() if readings.silent else None)
                return readings
        return None
