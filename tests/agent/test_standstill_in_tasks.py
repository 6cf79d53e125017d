"""Tasks whose processes stand still, or whose storage does not answer: they say so, and lose nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import trio
import trio.testing

from agent.storage.base import Root
from agent.storage.faulty import Call, Plan
from agent.transfer.asking import fetch
from agent.transfer.lane_processes import one_process
from agent.transfer.receiving import flow_watch, lanes
from agent.transfer.source.serve import Control
from agent.transfer.stalls import looks, storage_probe, storage_watch
from protocol import standstill
from protocol.control import TaskItem, TaskObserved, TaskOptions
from protocol.errors import RetryLater
from protocol.session import Failed, ReadPack, ReadRange
from protocol.signs_of_life import Posture, Signs, signs_of
from protocol.standstill import HANGS_FOR, STOPPED_FOR
from tests.agent import engine_world
from tests.agent.engine_inside import Engine, Line, contents, quick_path, tree
from tests.agent.lane_player import LANE_PROCESS, LaneProcessDied
from tests.agent.standing_scene import STILL

__all__ = ["quick_path"]

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
    for where in (standstill, looks):
        monkeypatch.setattr(where, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(standstill, "STOPPED_FOR", 0.05)
    monkeypatch.setattr(one_process, "GONE_WITHIN", 0.05)
    monkeypatch.setattr("agent.transfer.course.progress.EVERY", 0.01)


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


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that says nothing is asked after moments."""
    monkeypatch.setattr(storage_watch, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(storage_watch, "HANGS_FOR", 0.06)
    monkeypatch.setattr(storage_probe, "ANSWERS_WITHIN", 0.05)
    monkeypatch.setattr(flow_watch, "INTERVAL", 0.01)
    monkeypatch.setattr("agent.transfer.course.progress.EVERY", 0.01)


class _Hangs:
    """Storage hangs in one call, and ``silent``, in all that come then, until the task says so, or else for a while."""

    def __init__(self, operation: str, nth: int, *, silent: bool) -> None:
        self.operation, self.left, self.silent = operation, nth, silent
        self.hangs, self.back = threading.Event(), threading.Event()
        self.said: list[str] = []

    def plan(self, call: Call) -> int | None:
        if self.hangs.is_set():
            assert not self.silent or self.back.wait(20)
        elif call.operation == self.operation:
            self.left -= 1
            if not self.left:
                self.hangs.set()
                # What is slow, and does not hang, takes this long.
                assert self.back.wait(20 if self.silent else 0.4) is self.silent
        return None

    def write(self, _folder: int, _name: bytes) -> None:
        """What a file is made in that asks storage whether it answers."""
        assert not (self.hangs.is_set() and self.silent) or self.back.wait(20)

    def look(self, _line: Line, observed: TaskObserved) -> None:
        if observed.status_code == "STORAGE_SILENT":
            assert (observed.state, self.silent) == ("WAITING", True)
            self.said.append(observed.status_sentence)
            self.back.set()

    def check(self, engine: Engine, observed: TaskObserved, side: str) -> None:
        assert observed.state == "SUCCEEDED", observed
        assert self.hangs.is_set()
        assert engine.codes().count("STORAGE_SILENT") == self.silent
        assert all(f"The {side}'s storage does not answer" in sentence for sentence in self.said)
        assert bool(self.said) is self.silent


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "slow"])
@pytest.mark.parametrize(("operation", "nth"), [("scan", 2), ("open_read", 30), ("preadv", 2), ("stat", 1)])
async def test_a_source_whose_storage_hangs_is_told_of(
    quick_path: Path, operation: str, nth: int, silent: bool
) -> None:
    """While folders are listed, or files read; one that is slow, as from a tape, is nobody's affair."""
    hangs = _Hangs(operation, nth, silent=silent)
    engine = Engine(quick_path, source_plan=hangs.plan, on_report=hangs.look)
    if operation == "stat":
        engine.items = [TaskItem(source_path="/large", destination_path="/large")]
    _fill(engine)
    observed = await engine.run()
    hangs.check(engine, observed, "source")
    assert (engine.destination / "large").read_bytes() == (engine.source / "large").read_bytes()


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "slow"])
@pytest.mark.parametrize(("operation", "nth"), [("check_original", 1), ("open_parent", 1), ("unlink", 20)])
async def test_a_delete_task_whose_storage_hangs_says_so(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, nth: int, silent: bool
) -> None:
    hangs = _Hangs(operation, nth, silent=silent)
    monkeypatch.setattr(storage_probe, "_write", hangs.write)
    items = [TaskItem(source_path="/a", destination_path="")]
    engine = Engine(
        quick_path, TaskOptions(recursive=True), items, type="DELETE", plan=hangs.plan, on_report=hangs.look
    )
    tree(engine.destination, [f"{folder}/{name}" for folder in "ab" for name in range(40)])
    observed = await engine.run()
    hangs.check(engine, observed, "destination")
    assert {path.name for path in engine.destination.iterdir()} == {"b"}
    assert observed.counters.deleted == 41


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "slow"])
async def test_a_mirror_whose_storage_hangs_while_it_deletes_says_so(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    hangs = _Hangs("unlink", 20, silent=silent)
    monkeypatch.setattr(storage_probe, "_write", hangs.write)
    options = TaskOptions(delete_destination_extra=True, preserve_timestamp=True)
    engine = Engine(quick_path, options, plan=hangs.plan, on_report=hangs.look)
    tree(engine.source, ["kept"])
    tree(engine.destination, [f"extra/{name}" for name in range(40)])
    observed = await engine.run()
    hangs.check(engine, observed, "destination")
    assert contents(engine.destination) == contents(engine.source)


@pytest.mark.usefixtures("_impatient")
async def test_a_root_that_cannot_be_opened_for_long_is_told_of(quick_path: Path) -> None:
    hangs = _Hangs("", 0, silent=True)
    hangs.hangs.set()

    def opened(root: Root) -> Root:
        assert hangs.back.wait(20)
        return root

    engine = Engine(quick_path, wrap=opened, on_report=hangs.look)
    _fill(engine)
    hangs.check(engine, await engine.run(), "destination")


async def test_a_source_that_says_for_ever_that_it_has_no_lane_is_told_of(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of a lane that is up is answered on the control stream, as if the lane were gone there."""
    queued, said = Control._queue_for_lane, list[str]()
    denied = RetryLater("The lane is gone.", code="CONNECTION_LOST").to_document()

    async def deny(control: Control, request: ReadRange | ReadPack) -> None:
        if said:
            await queued(control, request)
            return
        await control._answer(Failed(request.r, denied))

    def look(_line: Line, observed: TaskObserved) -> None:
        if observed.state == "WAITING":
            said.append(observed.status_code)

    monkeypatch.setattr(Control, "_queue_for_lane", deny)
    monkeypatch.setattr(fetch, "UNSERVED_FOR", 0.1)
    monkeypatch.setattr(lanes, "MEASURE_EVERY", 0.02)
    engine = Engine(quick_path, on_report=look)
    _fill(engine)
    observed = await engine.run(10)
    assert observed.state == "SUCCEEDED", observed
    assert set(said) == {"CONNECTION_LOST"}
    assert any("does not have them" in event.details for event in engine.events if event.code == "CONNECTION_LOST")
    assert contents(engine.destination) == contents(engine.source)


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
    for where in (standstill, looks):
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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """One that can be frozen: whoever writes waits in a call then that no signal breaks off."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("mounting a disk takes root (Linux)")
    place, image = tmp_path / "disk", tmp_path / "image"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=False).returncode:
        pytest.skip("no loop device here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.soak
@pytest.mark.parametrize("killed", [False, True])
async def test_a_real_disk_that_hangs(tmp_path: Path, disk: Path, killed: bool) -> None:
    """Frozen in the middle."""
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


@pytest.mark.soak
async def test_a_real_delete_task_whose_disk_hangs(tmp_path: Path, disk: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        world.beta.root.rmdir()
        world.beta.root.symlink_to(disk)
        tree(disk, [f"gone/{number // 100}/{number}" for number in range(30_000)])
        (disk / "kept").write_bytes(b"kept")
        task, session = str(uuid.uuid4()), str(uuid.uuid4())
        order = msgspec.structs.replace(
            world.order(task, session, [TaskItem(source_path="/gone", destination_path="")]),
            type="DELETE",
            source=None,
            options=TaskOptions(recursive=True),
            ticket=world.ticket(task, session, None, world.beta.grant("rw", ["/"])),
        )
        assert world.beta.service is not None
        await world.beta.service.put_task(order)
        with trio.fail_after(30):
            while not world.beta.service.get_task(task).counters.deleted:
                await trio.sleep(0.002)
        subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
        try:
            observed = await _said(world, task, {"STORAGE_SILENT"}, HANGS_FOR + 60)
            assert observed.state == "WAITING"
            assert "destination" in observed.status_sentence
        finally:
            subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
        assert (await world.wait(task, seconds=60)).state == "SUCCEEDED"
        assert {path.name for path in disk.iterdir()} == {"kept", "lost+found"}
