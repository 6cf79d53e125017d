"""Processes that stand still as a whole: who is noticed, who is not, and what is done about it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from agent.storage.faulty import Call, Plan
from agent.system.signs_of_life import Posture, Signs, signs_of
from agent.transfer import lane_processes, lane_watch, standstill, storage_probe, storage_watch, worker_watch
from agent.transfer.channel import AreYouThere
from agent.transfer.lane_watch import until_lost
from agent.transfer.spawn import FORKS
from agent.transfer.standstill import HANGS_FOR, LOOK_EVERY, STOPPED_FOR, Standstill
from agent.transfer.storage_probe import StorageProbe
from protocol.control import TaskItem, TaskObserved
from protocol.errors import TowpathError
from tests.agent import engine_world
from tests.agent.engine_inside import Engine, Line, contents, quick_path, tree
from tests.agent.lane_player import LANE_PROCESS, LaneProcessDied

__all__ = ["quick_path"]

STILL = (1.0, 1.0, 1.0, 1.0)

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


def _until(pid: int, posture: Posture) -> Signs:
    for _ in range(1000):
        signs = signs_of(pid)
        if signs is not None and signs.posture is posture:
            return signs
        time.sleep(0.005)
    raise AssertionError(signs)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_signs_of_a_real_process() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        waits = _until(process.pid, Posture.WAITS)
        assert signs_of(process.pid) == waits
        process.send_signal(signal.SIGSTOP)
        stopped = _until(process.pid, Posture.STOPPED)
        assert signs_of(process.pid) == stopped
        process.send_signal(signal.SIGCONT)
        assert _until(process.pid, Posture.WAITS).marks != stopped.marks
        process.kill()
        process.wait()
    assert signs_of(process.pid) is None


_WORKER = """
import socket, sys, time
from agent.transfer.lane_processes import fork_lane_processes
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
        _until(lane, Posture.WAITS)
        os.kill(lane, signal.SIGSTOP)
        _until(lane, Posture.STOPPED)
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


class _Process:
    """A lane process that is seen as it is told to be."""

    def __init__(self, posture: Posture, *, storage: bool = True) -> None:
        self.posture, self.storage = posture, storage
        self.marks = STILL
        self.says = False
        self.asked = 0
        self.told: list[str] = []

    def ask(self) -> None:
        self.asked += 1

    def was_heard(self) -> bool:
        return self.says

    def signs(self) -> Signs:
        return Signs(self.posture, self.marks)

    async def storage_answers(self) -> bool:
        return self.storage

    def tell(self, error: TowpathError | None) -> None:
        said = "" if error is None else error.code
        if not self.told or self.told[-1] != said:
            self.told.append(said)

    async def watched(self, seconds: float) -> float | None:
        """After how long it is to be ended, if that is within so many seconds."""
        began = trio.current_time()
        with trio.move_on_after(seconds):
            await until_lost(self, self.tell)
            return trio.current_time() - began
        return None


async def test_a_process_that_was_stopped_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    process = _Process(Posture.STOPPED)
    ended = await process.watched(1000)
    assert ended is not None
    assert STOPPED_FOR < ended <= STOPPED_FOR + 2 * LOOK_EVERY
    assert process.told == ["", "PROCESS_STOPPED"]
    assert process.asked


async def test_a_process_that_is_looked_at_by_a_debugger_is_not(autojump_clock: trio.testing.MockClock) -> None:
    process = _Process(Posture.TRACED)
    assert await process.watched(100_000) is None
    assert process.told == ["", "PROCESS_STOPPED"]


async def test_a_process_that_hangs_alone_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    process = _Process(Posture.IN_STORAGE)
    ended = await process.watched(1000)
    assert ended is not None
    assert HANGS_FOR < ended <= HANGS_FOR + 3 * LOOK_EVERY
    assert process.told == ["", "PROCESS_HANGS"]


async def test_a_process_that_hangs_with_its_storage_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    process = _Process(Posture.IN_STORAGE, storage=False)
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
    process = _Process(Posture.IN_STORAGE, storage=False)

    async def back() -> bool:
        # It answers, and what waited for it goes on a moment later.
        process.marks = (process.marks[0] + 1,)
        return True

    process.storage_answers = back  # type: ignore[method-assign]
    assert await process.watched(100_000) is None
    assert process.told == [""]


async def test_a_silent_process_that_works_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    process = _Process(Posture.IN_STORAGE)

    async def work() -> None:
        while True:
            await trio.sleep(LOOK_EVERY - 0.1)
            process.marks = (process.marks[0] + 1,)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        assert await process.watched(10_000) is None
        nursery.cancel_scope.cancel()
    assert process.told == [""]


# --- workers, as their daemon looks after them ------------------------------------------------------------------


class _Worker(_Process):
    """The daemon's end of the channel of a worker."""

    pid = 1

    def __init__(self, posture: Posture, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(posture)
        self._heard = 0
        monkeypatch.setattr(worker_watch, "signs_of", lambda _pid: self.signs())

    @property
    def heard(self) -> int:
        self._heard += self.says
        return self._heard

    async def send(self, message: object) -> None:
        assert isinstance(message, AreYouThere)
        self.asked += 1

    async def tell_daemon(self, error: TowpathError) -> None:
        self.tell(error)

    async def watched(self, seconds: float) -> float | None:
        began = trio.current_time()
        with trio.move_on_after(seconds):
            self.tell(await worker_watch.until_lost(self, self.tell_daemon))  # type: ignore[arg-type]
            return trio.current_time() - began
        return None


@pytest.mark.parametrize(
    ("posture", "least", "told"),
    [
        (Posture.STOPPED, STOPPED_FOR, ["PROCESS_STOPPED"]),
        (Posture.TRACED, None, ["PROCESS_STOPPED"]),
        (Posture.WAITS, 2 * HANGS_FOR, ["PROCESS_HANGS"]),
        (Posture.IN_STORAGE, None, ["PROCESS_HANGS"]),
        (Posture.RUNS, None, []),
    ],
)
async def test_a_worker_that_stands_still(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    posture: Posture,
    least: float | None,
    told: list[str],
) -> None:
    worker = _Worker(posture, monkeypatch)
    ended = await worker.watched(10_000)
    assert worker.told == told
    assert worker.asked == 1
    if least is None:
        assert ended is None
    else:
        assert ended is not None
        assert least < ended <= least + 2 * LOOK_EVERY


async def test_a_worker_that_answers_is_left_alone(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = _Worker(Posture.STOPPED, monkeypatch)
    worker.says = True
    assert await worker.watched(10_000) is None
    assert worker.told == []


# --- the storage -----------------------------------------------------------------------------------------------


async def test_storage_is_asked_by_a_file_that_goes_again(tmp_path: Path) -> None:
    probe, folder = StorageProbe(), os.open(tmp_path, os.O_RDONLY)
    try:
        assert await probe.answers(folder, b".towpath.x")
        assert not list(tmp_path.iterdir())
        # A refusal is an answer.
        (tmp_path / "taken").write_bytes(b"")
        assert await probe.answers(folder, b"taken/below")
    finally:
        os.close(folder)
    assert not await probe.answers(folder, b".towpath.x")


async def test_storage_that_hangs_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, release = [], threading.Event()

    def hang(folder: int, _name: bytes) -> None:
        asked.append(folder)
        assert release.wait(10)

    monkeypatch.setattr(storage_probe, "_write", hang)
    probe, folder = StorageProbe(), os.open(tmp_path, os.O_RDONLY)
    try:
        with trio.move_on_after(10) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(probe.answers, folder, b"x")
                while not asked:
                    await trio.sleep(0.01)
                # As when the run ends meanwhile.
                scope.cancel()
        assert not await probe.answers(folder, b"x")
        assert len(asked) == 1
        release.set()
        with trio.fail_after(10):
            while not await probe.answers(folder, b"x"):
                await trio.sleep(0.01)
        # Nothing of it is left open.
        for each in asked:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(each)
    finally:
        release.set()
        os.close(folder)


async def test_a_question_that_never_begins_leaves_nothing_open(tmp_path: Path) -> None:
    probe, folder = StorageProbe(), os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/dev/fd"))
    try:
        with trio.CancelScope() as scope:
            scope.cancel()
            await probe.answers(folder, b"x")
        assert len(os.listdir("/dev/fd")) == before
        assert await probe.answers(folder, b"x")
    finally:
        os.close(folder)


# --- in the engine ---------------------------------------------------------------------------------------------


class _Stops:
    """A lane process stands still before one of its calls, as long as nobody ends it; ``clings`` says that even then it
    stays until `let_go`."""

    def __init__(self, operation: str, nth: int, *, clings: bool = False) -> None:
        self.operation, self.left, self.clings = operation, nth, clings
        self.standing = threading.Event()
        self.killed = threading.Event()
        self.let_go = threading.Event()

    @property
    def plan(self) -> Plan:
        def plan(call: Call) -> int | None:
            if threading.current_thread().name == LANE_PROCESS and call.operation == self.operation:
                self.left -= 1
                if not self.left:
                    self.standing.set()
                    assert self.killed.wait(20)
                    if self.clings:
                        assert self.let_go.wait(20)
                        # What it was doing is done before it is gone.
                        return None
                    raise LaneProcessDied
            return None

        return plan

    def watch(self, line: Line, _observed: TaskObserved) -> None:
        """What the system tells of it."""
        for player in line.players:
            player.on_kill = self.killed.set
            player.seen = Signs(Posture.STOPPED, STILL) if self.standing.is_set() else None


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (standstill, lane_watch):
        monkeypatch.setattr(where, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(standstill, "STOPPED_FOR", 0.05)
    monkeypatch.setattr(lane_processes, "GONE_WITHIN", 0.05)
    monkeypatch.setattr("agent.transfer.progress.EVERY", 0.01)


def _fill(engine: Engine) -> None:
    tree(engine.source, [f"{folder}/{name}" for folder in "ab" for name in range(40)])
    (engine.source / "large").write_bytes(os.urandom(20 * 1024 * 1024 + 5))


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(("operation", "nth"), [("create_temporary", 50), ("pwrite", 90), ("preadv", 3)])
async def test_what_a_stopped_process_had_is_fetched_by_others(quick_path: Path, operation: str, nth: int) -> None:
    stops = _Stops(operation, nth)
    engine = Engine(quick_path, plan=stops.plan, processes=1, on_report=stops.watch)
    _fill(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert stops.killed.is_set()
    assert contents(engine.destination) == contents(engine.source)
    assert not engine.temporaries()
    assert engine.codes().count("PROCESS_STOPPED") == 1
    assert {report.status_code for report in engine.reports} <= {"OK", "PROCESS_STOPPED"}
    assert engine.sessions == 1


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("cancelled", [False, True])
async def test_nothing_is_taken_over_from_a_process_that_may_still_write(quick_path: Path, cancelled: bool) -> None:
    """It was ended, and hangs in a call that cannot be broken off."""
    stops = _Stops("create_temporary", 50, clings=True)
    told = 0
    settled: set[int] = set()

    def look(line: Line, observed: TaskObserved) -> None:
        nonlocal told
        stops.watch(line, observed)
        if observed.status_code == "PROCESS_HANGS":
            assert observed.state == "WAITING"
            told += 1
            settled.add(engine.opened)
            if cancelled and told == 1:
                line.want("cancel")
            if told == 10:
                stops.let_go.set()

    engine = Engine(quick_path, plan=stops.plan, processes=1, on_report=look)
    _fill(engine)
    observed = await engine.run()
    assert told >= 10
    # No other lane was opened meanwhile, and the run did not end either.
    assert settled == {1}
    assert "PROCESS_HANGS" in engine.codes()
    assert not engine.temporaries()
    if cancelled:
        assert observed.state == "CANCELED"
    else:
        assert observed.state == "SUCCEEDED", observed
        assert contents(engine.destination) == contents(engine.source)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("silent", [True, False])
async def test_storage_that_hangs_in_the_worker_itself_is_told(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    """The settler waits in a sync; others may be answered or not."""
    monkeypatch.setattr(storage_watch, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(storage_watch, "HANGS_FOR", 0.06)
    monkeypatch.setattr(storage_probe, "ANSWERS_WITHIN", 0.02)
    hangs, back = threading.Event(), threading.Event()
    asked = 0

    def plan(call: Call) -> int | None:
        if call.operation == "rename" and call.nth == 3:
            hangs.set()
            assert back.wait(20)
        return None

    def write(folder: int, name: bytes) -> None:
        nonlocal asked
        asked += 1
        assert stat.S_ISDIR(os.fstat(folder).st_mode)
        if not hangs.is_set():
            return
        if silent:
            assert back.wait(20)
        elif asked > 3:
            back.set()

    monkeypatch.setattr(storage_probe, "_write", write)

    def look(_line: Line, observed: TaskObserved) -> None:
        if observed.status_code == "STORAGE_SILENT":
            assert observed.state == "WAITING"
            back.set()

    engine = Engine(quick_path, plan=plan, processes=0, on_report=look)
    _fill(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert ("STORAGE_SILENT" in engine.codes()) is silent
    assert observed.status_code != "STORAGE_SILENT"
    assert contents(engine.destination) == contents(engine.source)
    assert not engine.temporaries()


# --- real processes --------------------------------------------------------------------------------------------


def _lane_process() -> psutil.Process | None:
    """The one below a worker that has some work."""
    below = [lane for child in psutil.Process().children() for lane in child.children()]
    return below[0] if below else None


async def _begun(world: engine_world.World, into: str) -> tuple[str, psutil.Process]:
    """A task of some hundred megabytes in the middle, and its lane process."""
    folder = world.alpha.root / "data"
    folder.mkdir()
    for number in range(600):
        (folder / str(number)).write_bytes(os.urandom(5000))
    (folder / "large").write_bytes(os.urandom(128 * 1024 * 1024))
    task = await world.submit([TaskItem(source_path="/data", destination_path=into, recursive=True)])
    assert world.beta.service is not None
    with trio.fail_after(30):
        while not world.beta.service.get_task(task).counters.bytes_transferred or (found := _lane_process()) is None:
            await trio.sleep(0.002)
    return task, found


async def _said(world: engine_world.World, task: str, codes: set[str], seconds: float) -> TaskObserved:
    assert world.beta.service is not None
    with trio.fail_after(seconds):
        while (observed := world.beta.service.get_task(task)).status_code not in codes:
            await trio.sleep(0.1)
    return observed


def _codes(world: engine_world.World) -> set[str]:
    return {event.code for event in world.events if event.kind == "event"}


def _worker_of(node: engine_world.Node) -> psutil.Process:
    assert node.service is not None
    (one,) = node.service._node.workers._at_work
    return psutil.Process(one.process.pid)


@pytest.mark.soak
@pytest.mark.parametrize("stopped", ["destination", "destination and its lane process", "source"])
async def test_a_real_worker_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    monkeypatch.setattr(standstill, "STOPPED_FOR", 2.0)
    for where in (standstill, worker_watch):
        monkeypatch.setattr(where, "LOOK_EVERY", 0.5)
    async with engine_world.world(tmp_path, workers_per_session=2) as world:
        task, lane = await _begun(world, "/data")
        worker = _worker_of(world.alpha if stopped == "source" else world.beta)
        if "lane" in stopped:
            lane.suspend()
        worker.suspend()
        observed = await world.wait(task, seconds=120)
        assert observed.state == "SUCCEEDED", observed
        assert contents(world.beta.root / "data") == contents(world.alpha.root / "data")
        assert not list(world.beta.root.rglob(".towpath.*"))
        assert signs_of(worker.pid) is None
        if stopped == "source":
            # What the destination sees of it.
            assert "CONNECTION_LOST" in _codes(world)
        else:
            assert "PROCESS_STOPPED" in _codes(world)
            assert "WORKER_DIED" not in _codes(world)
            assert "WAITING" in {event.observed.state for event in world.events if event.observed is not None}


@pytest.mark.soak
async def test_a_real_lane_process_that_is_stopped(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path, workers_per_session=2) as world:
        task, lane = await _begun(world, "/data")
        lane.suspend()
        observed = await world.wait(task, seconds=STOPPED_FOR + 60)
        assert observed.state == "SUCCEEDED", observed
        assert contents(world.beta.root / "data") == contents(world.alpha.root / "data")
        assert not list(world.beta.root.rglob(".towpath.*"))
        assert "PROCESS_STOPPED" in _codes(world)
        assert observed.status_code == "SUCCEEDED" or not observed.status_sentence, observed


@pytest.mark.soak
@pytest.mark.parametrize("killed", [False, True])
async def test_a_real_disk_that_hangs(tmp_path: Path, killed: bool) -> None:
    """Frozen in the middle: whoever writes waits in a call that no signal breaks off."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("mounting a disk takes root (Linux)")
    disk = tmp_path / "disk"
    image = tmp_path / "image"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=False).returncode:
        pytest.skip("no loop device here")
    try:
        async with engine_world.world(tmp_path, workers_per_session=2) as world:
            world.beta.root.rmdir()
            world.beta.root.symlink_to(disk)
            task, lane = await _begun(world, "/data")
            subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
            try:
                if killed:
                    await trio.sleep(1)
                    lane.kill()
                observed = await _said(world, task, {"PROCESS_HANGS", "STORAGE_SILENT"}, HANGS_FOR + 60)
                assert observed.state == "WAITING"
            finally:
                subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
            observed = await world.wait(task, seconds=60)
            assert observed.state == "SUCCEEDED", observed
            assert contents(disk / "data") == contents(world.alpha.root / "data")
            assert not list(disk.rglob(".towpath.*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
