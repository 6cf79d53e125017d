"""Worker processes: one that waits ready, and what happens when it dies while it waits."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
import subprocess

import psutil
import pytest
import trio

from agent.system.limits import raise_open_files
from agent.transfer.processes import worker_process
from agent.transfer.processes.channel import Channel, ChannelClosed, EventStored, ToWorker
from agent.transfer.processes.forker import ForkedThere
from agent.transfer.processes.message_buffer import framed
from agent.transfer.processes.spawn import Forked, Spawned, spawn
from agent.transfer.processes.worker_process import processor_time
from agent.transfer.tasks.crash_pauses import CrashPauses
from protocol.control import Counters


class Workers(worker_process.Workers):
    """Those of a system that has no fork server."""

    def __init__(self, *, spare: bool, processes: int = 1) -> None:
        super().__init__(spare=spare, processes=processes, forks=False)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "REST", 0.01)
    monkeypatch.setattr(worker_process, "LOOK", 0.01)


async def _spare(workers: Workers) -> subprocess.Popen[bytes] | Forked:
    with trio.fail_after(20):
        while not workers.ready:
            await trio.sleep(0.01)
    assert workers._spare is not None
    assert workers._spare.waiting is not None
    process = workers._spare.waiting.process
    assert not isinstance(process, ForkedThere)
    return process


async def test_the_spare_worker_is_taken_and_replaced() -> None:
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        first = await _spare(workers)
        # A message that is no start makes a worker end: enough to see whom it reached.
        async with workers.worker(EventStored(seq=1)) as channel:
            with pytest.raises(ChannelClosed):
                await channel.receive()
        assert first.returncode is not None
        second = await _spare(workers)
        assert second.pid != first.pid
        nursery.cancel_scope.cancel()
    assert second.returncode is not None


def test_a_worker_of_a_busy_daemon_hears_its_first_message() -> None:
    """Its end of the channel keeps the number that it had in the daemon, which may be large."""
    if raise_open_files(4096) < 4096:
        pytest.skip("this process may not open so many files")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        far = socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 2000))
        channel = Channel(far, ToWorker)
        try:
            assert channel.is_waiting()
            ours.sendall(framed(EventStored(seq=7)))
            assert not channel.is_waiting()
            assert channel.receive_first() == (EventStored(seq=7), [])
            ours.shutdown(socket.SHUT_WR)
            assert not channel.is_waiting()
            with pytest.raises(ChannelClosed):
                channel.receive_first()
            assert not far.getblocking()
        finally:
            channel.close()


async def test_a_spare_worker_that_died_is_not_used() -> None:
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        first = await _spare(workers)
        first.kill()
        first.wait()
        async with workers.worker(EventStored(seq=1)) as channel:
            # Not the dead one: what was sent reached a worker, which then ended by itself.
            with pytest.raises(ChannelClosed):
                await channel.receive()
        nursery.cancel_scope.cancel()


async def test_a_spare_worker_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    def spawn_at_the_third(processes: int) -> Spawned:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return spawn(processes)

    monkeypatch.setattr(worker_process, "spawn", spawn_at_the_third)
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        await _spare(workers)
        assert tries == 3
        nursery.cancel_scope.cancel()


async def test_no_spare_worker_is_started_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, looks, started = 0.0, 0, 0

    def time_of(pid: int) -> float:
        nonlocal computed, looks
        looks += 1
        if looks <= 6:
            computed += 1.0
        return computed

    def counted(processes: int) -> Spawned:
        nonlocal started
        started += 1
        # The first is the one at work, which was looked at three times before it rested.
        assert started == 1 or looks == 8
        return spawn(processes)

    monkeypatch.setattr(worker_process, "processor_time", time_of)
    monkeypatch.setattr(worker_process, "spawn", counted)
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        async with workers.worker(EventStored(seq=1)):
            nursery.start_soon(workers.run)
            await _spare(workers)
        assert started == 2
        nursery.cancel_scope.cancel()


async def test_beside_one_that_computes_for_long_a_spare_worker_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = itertools.count()
    monkeypatch.setattr(worker_process, "processor_time", lambda pid: float(next(computed)))
    monkeypatch.setattr(worker_process, "LONGEST_WAIT", 0.05)
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        async with workers.worker(EventStored(seq=1)):
            spare = await _spare(workers)
            (at_work,) = workers._at_work
            assert spare.pid != at_work.process.pid
        nursery.cancel_scope.cancel()


def test_processor_time_grows_while_a_process_computes() -> None:
    before = processor_time(os.getpid())
    while processor_time(os.getpid()) - before < 0.02:
        continue
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert processor_time(gone.pid) == 0.0


async def test_a_spare_worker_that_nobody_needs_ends_until_work_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "NEEDED_WITHIN", 0.1)
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        first = await _spare(workers)
        with trio.fail_after(20):
            await trio.to_thread.run_sync(first.wait)
        assert not workers.ready
        monkeypatch.setattr(worker_process, "NEEDED_WITHIN", 900.0)
        async with workers.worker(EventStored(seq=1)) as channel:
            with pytest.raises(ChannelClosed):
                await channel.receive()
        second = await _spare(workers)
        assert second.pid != first.pid
        nursery.cancel_scope.cancel()


async def test_a_worker_that_was_started_before_is_used_first_and_ends_with_the_rest() -> None:
    for needed in (True, False):
        workers, first = Workers(spare=True), spawn()
        workers.adopt(first)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.run)
            assert await _spare(workers) is first.process
            if needed:
                async with workers.worker(EventStored(seq=1)) as channel:
                    with pytest.raises(ChannelClosed):
                        await channel.receive()
            nursery.cancel_scope.cancel()
        assert first.process.returncode is not None


async def test_a_spare_worker_keeps_no_lane_processes() -> None:
    """They would wait for nothing at a source, and cost memory while nothing runs at all."""
    workers = Workers(spare=True, processes=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        first = await _spare(workers)
        waiting = psutil.Process(first.pid)
        with trio.fail_after(20):
            # Until it has loaded everything, rehearsed, and computes nothing any more.
            while (before := sum(waiting.cpu_times()[:2])) < 0.1 or not await _rests(waiting, before):
                await trio.sleep(0.02)
        assert not waiting.children()
        nursery.cancel_scope.cancel()


async def _rests(process: psutil.Process, before: float) -> bool:
    await trio.sleep(0.15)
    return sum(process.cpu_times()[:2]) == before


async def test_without_a_spare_nothing_waits() -> None:
    workers = Workers(spare=False)
    await workers.run()
    assert not workers.ready


def test_only_workers_that_get_nowhere_are_followed_ever_later() -> None:
    pauses, nothing = CrashPauses(), Counters()
    futile = [pauses.after(1.0, nothing, nothing) for _ in range(12)]
    assert futile[0] < 0.5
    assert futile == sorted(futile)
    assert futile[-1] == 30.0
    assert pauses.after(1.0, nothing, Counters(bytes_transferred=1)) == futile[0]
    assert pauses.after(1.0, nothing, nothing) == futile[1]
    assert pauses.after(61.0, nothing, nothing) == futile[0]
