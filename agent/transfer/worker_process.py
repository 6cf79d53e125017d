"""Starting and ending worker processes, one of which may wait ready so that a transfer begins at once."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil
import trio

from agent.transfer.channel import Channel, ToDaemon
from agent.transfer.message_buffer import Message
from agent.transfer.spawn import Forked, Spawned, spawn

# How long a worker may take to settle what arrived when it is told to stop.
GRACE = 4.0
# A spare worker is started this long (seconds) after the last one was taken, so that it does not slow that one down.
REST = 2.0
# Starting takes nearly half a second of a processor, so nothing is started while a worker computes for more than a
# tenth of so many seconds. Most transfers are through before the longest wait; what begins beside a longer one finds a
# spare worker again.
LOOK, LONGEST_WAIT = 0.5, 20.0
# A spare worker that nobody needed for so long (seconds) gives its memory back; the next transfer waits the third of a
# second that a worker takes to start, and has a spare behind it again.
NEEDED_WITHIN = 900.0


@dataclass(frozen=True)
class _Process:
    process: subprocess.Popen[bytes] | Forked
    channel: Channel


class Workers:
    """All worker processes of an agent. With ``spare`` one waits, started and idle, for the next piece of work. Each
    may use ``processes`` processes, itself included, for its session (see `agent.transfer.lane_processes`)."""

    def __init__(self, *, spare: bool, processes: int = 1) -> None:
        self._want_spare = spare
        self._processes = processes
        self._spare: _Process | None = None
        self._taken = trio.Event()
        self._at_work: list[_Process] = []

    def adopt(self, spawned: Spawned) -> None:
        """Take over a worker that was started before there was this; it is the first to be used."""
        self._spare = _Process(spawned.process, Channel(spawned.sock, ToDaemon))

    async def run(self) -> None:
        """Keep a spare worker, if one is wanted, until cancelled."""
        try:
            while self._want_spare:
                await trio.sleep(REST - LOOK)
                with trio.move_on_after(LONGEST_WAIT):
                    await self._pause()
                if self._spare is None:
                    try:
                        self._spare = await _start(self._processes)
                    except OSError:
                        # There may be a process to be had later; a task that needs one says what is wrong.
                        continue
                self._taken = trio.Event()
                with trio.move_on_after(NEEDED_WITHIN):
                    await self._taken.wait()
                if not self._taken.is_set():
                    await self._end_spare()
                    await self._taken.wait()
        finally:
            await self._end_spare()

    async def _pause(self) -> None:
        """Wait until no worker computes: those that serve stay for a while when all is done, in case of a next time."""
        while True:
            before = self._computed()
            await trio.sleep(LOOK)
            if self._computed() - before < LOOK / 10:
                return

    def _computed(self) -> float:
        return sum(processor_time(one.process.pid) for one in self._at_work)

    async def _end_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await _end(spare)

    @asynccontextmanager
    async def worker(self, start: Message) -> AsyncIterator[Channel]:
        """A worker process that was told what to be. At the end its channel is closed, by which it ends; one that does
        not is killed, like any crash it costs nothing but time."""
        spare, self._spare = self._spare, None
        self._taken.set()
        if spare is not None and spare.process.poll() is not None:
            # It died while it waited.
            await _end(spare)
            spare = None
        one = spare or await _start(self._processes)
        self._at_work.append(one)
        try:
            await one.channel.send(start)
            yield one.channel
        finally:
            self._at_work.remove(one)
            await _end(one)


def processor_time(pid: int) -> float:
    """Seconds of processor time that a process has used, 0 for one that is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


async def _start(processes: int) -> _Process:
    spawned = await trio.to_thread.run_sync(spawn, processes)
    return _Process(spawned.process, Channel(spawned.sock, ToDaemon))


async def _end(one: _Process) -> None:
    one.channel.close()
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_kill_later, one.process)
            # With a limiter of its own: whoever waits here takes no thread from others.
            await trio.to_thread.run_sync(one.process.wait, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()


async def _kill_later(process: subprocess.Popen[bytes] | Forked) -> None:
    await trio.sleep(GRACE)
    process.kill()
