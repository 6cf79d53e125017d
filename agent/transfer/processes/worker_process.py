"""Starting and ending worker processes. So that a transfer begins at once they come from a fork server (Linux,
`agent.transfer.processes.forker`), or one of them waits ready."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil
import trio

from agent.transfer.processes.channel import Channel, ToDaemon
from agent.transfer.processes.forker import NEEDED_WITHIN, ForkedThere, Forker
from agent.transfer.processes.message_buffer import Message
from agent.transfer.processes.spawn import FORK_SERVER, Forked, Spawned, spawn

# How long a worker may take to settle what arrived when it is told to stop.
GRACE = 4.0
# A spare worker is started this long (seconds) after the last one was taken, so that it does not slow that one down.
REST = 2.0
# Starting takes nearly half a second of a processor, so nothing is started while a worker computes for more than a
# tenth of so many seconds. Most transfers are through before the longest wait; what begins beside a longer one finds a
# spare worker again.
LOOK, LONGEST_WAIT = 0.5, 20.0


@dataclass(frozen=True)
class _Process:
    process: subprocess.Popen[bytes] | Forked | ForkedThere
    channel: Channel


class Workers:
    """All worker processes of an agent. With ``spare`` a fork server waits, where ``forks`` says that there may be one,
    else a worker, for the next piece of work. Each worker may use ``processes`` processes, itself included, for its
    session (see `agent.transfer.lane_processes.lane_forks`)."""

    def __init__(self, *, spare: bool, processes: int = 1, forks: bool = FORK_SERVER) -> None:
        self._processes = processes
        self._at_work: list[_Process] = []
        self._forker = Forker(processes, self._resting) if spare and forks else None
        self._spare = _Spare(processes, self._resting) if spare and not forks else None

    def adopt(self, spawned: Spawned) -> None:
        """Take over what was started before there was this: a fork server, or a worker that is the first to be used."""
        if self._forker is not None:
            self._forker.adopt(spawned)
        elif self._spare is not None:
            self._spare.adopt(spawned)

    async def run(self) -> None:
        """Keep a fork server or a spare worker, if one is wanted, until cancelled."""
        if self._forker is not None:
            await self._forker.run()
        elif self._spare is not None:
            await self._spare.run()

    @property
    def ready(self) -> bool:
        """Whether one waits, so that work begins at once."""
        if self._forker is not None:
            return self._forker.ready
        return self._spare is not None and self._spare.waiting is not None

    async def _resting(self) -> None:
        """Wait until no worker computes, but not for ever: those that serve stay for a while when all is done, in case
        of a next time."""
        with trio.move_on_after(LONGEST_WAIT):
            while True:
                before = self._computed()
                await trio.sleep(LOOK)
                if self._computed() - before < LOOK / 10:
                    return

    def _computed(self) -> float:
        return sum(processor_time(one.process.pid) for one in self._at_work)

    @asynccontextmanager
    async def worker(self, start: Message) -> AsyncIterator[Channel]:
        """A worker process that was told what to be. At the end its channel is closed, by which it ends; one that does
        not is killed, like any crash it costs nothing but time."""
        one = await self._take() or await _start(self._processes)
        self._at_work.append(one)
        one.channel.pid = one.process.pid
        try:
            await one.channel.send(start)
            yield one.channel
        finally:
            self._at_work.remove(one)
            await _end(one)

    async def _take(self) -> _Process | None:
        if self._forker is not None:
            forked = await self._forker.take()
            return None if forked is None else _Process(forked[0], Channel(forked[1], ToDaemon))
        return None if self._spare is None else await self._spare.take()


class _Spare:
    """One worker that waits, started and idle, for the next piece of work."""

    def __init__(self, processes: int, resting: Callable[[], Awaitable[None]]) -> None:
        self._processes = processes
        self._resting = resting
        self.waiting: _Process | None = None
        self._taken = trio.Event()

    def adopt(self, spawned: Spawned) -> None:
        """Use one that was started before there was this."""
        self.waiting = _Process(spawned.process, Channel(spawned.sock, ToDaemon))

    async def run(self) -> None:
        """Keep one until cancelled."""
        try:
            while True:
                await trio.sleep(REST - LOOK)
                await self._resting()
                if self.waiting is None:
                    try:
                        self.waiting = await _start(self._processes)
                    except OSError:
                        # There may be a process to be had later; a task that needs one says what is wrong.
                        continue
                self._taken = trio.Event()
                with trio.move_on_after(NEEDED_WITHIN):
                    await self._taken.wait()
                if not self._taken.is_set():
                    await self._end()
                    await self._taken.wait()
        finally:
            await self._end()

    async def _end(self) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            await _end(waiting)

    async def take(self) -> _Process | None:
        """The one that waits, if there is one and it did not die meanwhile."""
        waiting, self.waiting = self.waiting, None
        self._taken.set()
        if waiting is not None and not isinstance(waiting.process, ForkedThere) and waiting.process.poll() is not None:
            await _end(waiting)
            return None
        return waiting


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
            if isinstance(one.process, ForkedThere):
                await one.process.wait()
                one.process.close()
            else:
                # With a limiter of its own: whoever waits here takes no thread from others.
                await trio.to_thread.run_sync(one.process.wait, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()
    one.channel.ended = one.process.returncode


async def _kill_later(process: subprocess.Popen[bytes] | Forked | ForkedThere) -> None:
    await trio.sleep(GRACE)
    process.kill()
