"""Processes that stand still as a whole: who is noticed, who is not, and what is done about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from agent.storage.posix import open_root
from agent.transfer.processes.spawn import FORKS
from agent.transfer.stalls import storage_probe
from agent.transfer.stalls.storage_probe import StorageProbe
from protocol.signs_of_life import Posture, Signs, signs_of
from protocol.standstill import HANGS_FOR, LOOK_EVERY, STOPPED_FOR, Standstill
from tests.agent.standing_scene import STILL, Played, until_seen

# --- when it counts -------------------------------------------------------------------------------------------


def _looks(posture: Posture, step: float = LOOK_EVERY) -> Iterator[tuple[float, Posture | None]]:
    """A process that was heard last at 0 and stands still: for how long, and what is said."""
    watch, now = Standstill(0.0), 0.0
    while True:
        now += step
        yield now, watch.look(now, heard=False, signs=Signs(posture, STILL))


@pytest.mark.parametrize(
    ("posture", "bound"),
    [
        (Posture.STOPPED, STOPPED_FOR),
        (Posture.TRACED, STOPPED_FOR),
        (Posture.WAITS, HANGS_FOR),
        (Posture.IN_STORAGE, HANGS_FOR),
    ],
)
def test_standing_still_is_noticed_in_time(posture: Posture, bound: float) -> None:
    found = next(now for now, said in _looks(posture) if said is posture)
    assert bound <= found <= bound + 2 * LOOK_EVERY


@given(st.lists(st.tuples(st.sampled_from(Posture), st.floats(0, 1e6), st.booleans()), max_size=200))
def test_who_does_anything_at_all_stands_not_still(looks: list[tuple[Posture, float, bool]]) -> None:
    """However long it takes, and whatever it is seen in."""
    watch, now = Standstill(0.0), 0.0
    for number, (posture, step, heard) in enumerate(looks):
        now += step
        assert watch.look(now, heard=heard, signs=Signs(posture, (float(number),))) is None


def test_who_waits_for_a_processor_stands_not_still() -> None:
    assert all(said is None for _, (_, said) in zip(range(1000), _looks(Posture.RUNS), strict=False))


def test_nobody_is_late_because_the_machine_slept() -> None:
    """Nor because all of its processes were stopped together."""
    watch = Standstill(0.0)
    signs = Signs(Posture.WAITS, STILL)
    assert watch.look(5.0, heard=True, signs=None) is None
    assert watch.look(10.0, heard=False, signs=signs) is None
    # A night.
    assert watch.look(30_000.0, heard=False, signs=Signs(Posture.STOPPED, STILL)) is None
    assert watch.look(30_005.0, heard=True, signs=None) is None
    assert watch.seconds == 0.0


def test_where_the_system_tells_nothing_nobody_is_accused() -> None:
    watch = Standstill(0.0)
    assert all(watch.look(number * 5.0, heard=False, signs=None) is None for number in range(1000))


# --- what the system tells -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_signs_of_a_real_process() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        waits = until_seen(process.pid, Posture.WAITS)
        assert signs_of(process.pid) == waits
        process.send_signal(signal.SIGSTOP)
        stopped = until_seen(process.pid, Posture.STOPPED)
        assert signs_of(process.pid) == stopped
        process.send_signal(signal.SIGCONT)
        assert until_seen(process.pid, Posture.WAITS).marks != stopped.marks
        process.kill()
        process.wait()
    assert signs_of(process.pid) is None


_WORKER = """
import socket, sys, time
from agent.transfer.lane_processes.lane_forks import fork_lane_processes
ours, theirs = socket.socketpair()
forked = fork_lane_processes(1, close=theirs.fileno())
print(forked[0].pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not FORKS, reason="there are no lane processes here")
def test_a_stopped_lane_process_ends_with_its_worker() -> None:
    """It would hold the task's lock, and what comes after the worker would wait for ever."""
    with subprocess.Popen([sys.executable, "-c", _WORKER], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        lane = int(worker.stdout.readline())
        until_seen(lane, Posture.WAITS)
        os.kill(lane, signal.SIGSTOP)
        until_seen(lane, Posture.STOPPED)
        worker.kill()
        worker.wait()
    gone = False
    for _ in range(1000):
        gone = gone or signs_of(lane) is None
        if gone:
            break
        time.sleep(0.005)
    if not gone:
        os.kill(lane, signal.SIGKILL)
    assert gone


# --- what is done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("posture", "bound", "looks", "code"),
    [
        (Posture.STOPPED, STOPPED_FOR, 2, "PROCESS_STOPPED"),
        # Its storage is asked first.
        (Posture.IN_STORAGE, HANGS_FOR, 3, "PROCESS_HANGS"),
    ],
)
async def test_a_process_that_stands_still_alone_is_ended(
    autojump_clock: trio.testing.MockClock, posture: Posture, bound: float, looks: int, code: str
) -> None:
    process = Played(posture)
    ended = await process.watched(1000)
    assert ended is not None
    assert bound < ended <= bound + looks * LOOK_EVERY
    assert process.told == ["", code]
    assert process.asked == 1


async def test_a_process_that_is_looked_at_by_a_debugger_is_not(autojump_clock: trio.testing.MockClock) -> None:
    process = Played(Posture.TRACED)
    assert await process.watched(100_000) is None
    assert process.told == ["", "PROCESS_STOPPED"]


async def test_a_process_that_hangs_with_its_storage_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    process = Played(Posture.IN_STORAGE, storage=False)
    assert await process.watched(100_000) is None
    assert process.told == ["", "STORAGE_SILENT"]
    # The file server is back, and with it the process.
    process.storage, process.marks = True, (2.0,)
    process.told.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.watched, 2 * LOOK_EVERY)
    process.says = True
    assert await process.watched(1000) is None
    assert process.told == [""]


async def test_a_storage_that_has_come_back_just_now_costs_nothing(autojump_clock: trio.testing.MockClock) -> None:
    process = Played(Posture.IN_STORAGE, storage=False)

    async def back() -> bool:
        # It answers, and what waited for it goes on a moment later.
        process.marks = (process.marks[0] + 1,)
        return True

    process.storage_answers = back  # type: ignore[method-assign]
    assert await process.watched(100_000) is None
    assert process.told == [""]


async def test_a_silent_process_that_works_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    process = Played(Posture.IN_STORAGE)

    async def work() -> None:
        while True:
            await trio.sleep(LOOK_EVERY - 0.1)
            process.marks = (process.marks[0] + 1,)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        assert await process.watched(10_000) is None
        nursery.cancel_scope.cancel()
    assert process.told == [""]


# --- the storage -----------------------------------------------------------------------------------------------


async def test_storage_is_asked_by_a_file_that_goes_again(tmp_path: Path) -> None:
    probe, folder = StorageProbe(b".towpath.x"), os.open(tmp_path, os.O_RDONLY)
    try:
        assert await probe.answers(folder)
        assert not list(tmp_path.iterdir())
        # A refusal is an answer.
        (tmp_path / "taken").write_bytes(b"")
        assert await StorageProbe(b"taken/below").answers(folder)
    finally:
        os.close(folder)


async def test_storage_that_cannot_be_asked_is_not_said_to_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of a descriptor, or of a thread: both are told as what they are, by whoever waits for them."""
    probe, folder = StorageProbe(b"x"), os.open(tmp_path, os.O_RDONLY)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(storage_probe, "ANSWERS_WITHIN", 0.02)
            patch.setattr(trio.to_thread, "run_sync", _no_thread)
            assert await probe.answers(folder) is None
            with open_root(str(tmp_path)) as root:
                assert await probe.looks(root, ()) is None
        assert await probe.answers(folder) is True
    finally:
        os.close(folder)
    assert await probe.answers(folder) is None


async def _no_thread(*_: object, **__: object) -> None:
    """As while none can be started."""
    await trio.sleep_forever()


async def test_a_process_whose_storage_cannot_be_asked_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    process = Played(Posture.IN_STORAGE, storage=None)
    assert await process.watched(100_000) is None
    assert process.told == [""]
    process.storage = True
    assert await process.watched(1000) is not None


async def test_storage_that_hangs_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, release = [], threading.Event()

    def hang(folder: int, _name: bytes) -> None:
        asked.append(folder)
        assert release.wait(10)

    monkeypatch.setattr(storage_probe, "_write", hang)
    probe, folder = StorageProbe(b"x"), os.open(tmp_path, os.O_RDONLY)
    try:
        with trio.move_on_after(10) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(probe.answers, folder)
                while not asked:
                    await trio.sleep(0.01)
                # As when the run ends meanwhile.
                scope.cancel()
        assert not await probe.answers(folder)
        assert len(asked) == 1
        release.set()
        with trio.fail_after(10):
            while not await probe.answers(folder):
                await trio.sleep(0.01)
        # Nothing of it is left open.
        for each in asked:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(each)
    finally:
        release.set()
        os.close(folder)


async def test_a_question_that_never_begins_leaves_nothing_open(tmp_path: Path) -> None:
    probe, folder = StorageProbe(b"x"), os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/dev/fd"))
    try:
        with trio.CancelScope() as scope:
            scope.cancel()
            await probe.answers(folder)
        assert len(os.listdir("/dev/fd")) == before
        assert await probe.answers(folder)
    finally:
        os.close(folder)
