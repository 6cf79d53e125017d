"""A session in which other processes receive: the same outcomes as in one process, whatever fails and whoever dies."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agent.limits.pace import Pace
from agent.storage.faulty import Call, Plan, fail_nth
from agent.storage.posix import PosixDirectory
from agent.system.file_lock import try_lock
from agent.transfer.asking import end_game
from agent.transfer.basis.jobs import AllArrived
from agent.transfer.lane_processes import lane_messages as say
from agent.transfer.lane_processes import lane_process
from agent.transfer.lane_processes.lane_forks import Child
from agent.transfer.lane_processes.lane_process import LaneProcess
from agent.transfer.lane_processes.one_process import OneProcess, RemoteLane
from agent.transfer.lane_processes.pool import LaneProcesses
from agent.transfer.processes.channel import Channel
from agent.transfer.processes.message_buffer import Garbled, MessageBuffer, attached, framed, rights
from agent.transfer.receiving import lane_count, lanes
from agent.transfer.settling.held import PackHeld
from agent.transfer.settling.settle import Settler
from protocol.control import TaskItem, TaskOptions
from tests.agent import engine_world
from tests.agent.engine_inside import (
    Crashed,
    Engine,
    contents,
    quick_path,
    tree,
)
from tests.agent.lane_player import LANE_PROCESS, FaultyHanded, LaneProcessDied
from tests.agent.test_bit_flips_transfer import Spoiler
from tests.agent.test_end_game import _throttled
from tests.agent.test_engine_faults import ended, fill, nothing_half

__all__ = ["quick_path"]

MIB = 1024 * 1024


def _fill(engine: Engine) -> None:
    tree(engine.source, [f"{folder}/{name}" for folder in "ab" for name in range(40)])
    (engine.source / "large").write_bytes(os.urandom(20 * MIB + 5))


def _same(engine: Engine) -> None:
    assert contents(engine.destination) == contents(engine.source)
    assert not engine.temporaries()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
async def test_what_other_processes_receive_is_what_there_is(quick_path: Path, processes: int, verify: bool) -> None:
    engine = Engine(quick_path, TaskOptions(verify_checksum=verify), processes=processes, lanes_wanted=2)
    _fill(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    _same(engine)
    assert observed.counters.files_transferred == 81
    written = [call.name for call in engine.calls if call.operation == "create_temporary"]
    # All small files were written where they were received.
    assert sum(b"r" in name.rpartition(b".towpath.")[2] for name in written) == 80


async def test_the_settler_hears_that_everything_has_come(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would wait for more before it gives the last files their names."""
    told = []
    take = Settler._take

    def note(settler: Settler, item: Any) -> None:
        told.append(type(item))
        take(settler, item)

    monkeypatch.setattr(Settler, "_take", note)
    engine = Engine(quick_path, processes=1)
    tree(engine.source, [f"{folder}/{name}" for folder in "ab" for name in range(40)])
    assert (await engine.run()).state == "SUCCEEDED"
    assert AllArrived in told[told.index(PackHeld) :]
    assert PackHeld not in told[told.index(AllArrived) :]


@pytest.mark.parametrize(("verify", "local", "held"), [(True, True, True), (False, True, False), (False, False, True)])
async def test_only_what_is_looked_at_again_stays_open(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, local: bool, held: bool
) -> None:
    """Or what a server would have to write before it can be closed."""
    if not local:
        monkeypatch.setattr(PosixDirectory, "disk", lambda _folder: None)
    engine = Engine(quick_path, TaskOptions(verify_checksum=verify), processes=1)
    tree(engine.source, [f"a/{name}" for name in range(40)])
    assert (await engine.run()).state == "SUCCEEDED"
    _same(engine)
    steps = [call.operation for call in engine.calls if call.operation in ("create_temporary", "close_file")]
    assert steps.count("create_temporary") == 40
    one_by_one = ["create_temporary", "close_file"] * 40
    assert steps[:80] == (["create_temporary"] * 40 + ["close_file"] * 40 if held else one_by_one)


async def test_what_cannot_be_closed_after_writing_is_written_again(quick_path: Path) -> None:
    """A disk may say then that it did not take what was written."""
    failed = 0

    def plan(call: Call) -> int | None:
        nonlocal failed
        if threading.current_thread().name == LANE_PROCESS and call.operation == "close_file" and not failed:
            failed += 1
            return errno.EIO
        return None

    engine = Engine(quick_path, TaskOptions(verify_checksum=False), plan=plan, processes=1)
    tree(engine.source, [f"a/{name}" for name in range(40)])
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert failed == 1
    assert observed.counters.faults == 1
    assert sum(call.operation == "create_temporary" for call in engine.calls) == 41
    _same(engine)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
async def test_calls_fail_once_in_either_process(quick_path: Path, code: int) -> None:
    plain = Engine(quick_path / "plain", processes=1)
    fill(plain)
    await plain.run()
    ends: Counter[str] = Counter()
    for number in range(1, len(plain.calls) + 1, 9):
        engine = Engine(quick_path / str(number), plan=fail_nth(number, code), processes=1)
        ends[await ended(engine, code, {"PERMISSION_DENIED"}, f"call {number}")] += 1
    # Which calls are of files that may not be read, or are tried again, depends on who comes first.
    assert ends["SUCCEEDED"], ends
    assert sum(ends.values()) >= 3, ends


async def test_all_processes_die_at_once(quick_path: Path) -> None:
    plain = Engine(quick_path / "plain", processes=1)
    fill(plain)
    await plain.run()
    crashes = 0
    for number in range(1, len(plain.calls), 6):

        def die(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        engine = Engine(quick_path / str(number), plan=die, processes=1)
        wanted = fill(engine)
        try:
            await engine.run()
        except Crashed:
            crashes += 1
            nothing_half(engine, wanted)
            after = engine.revived()
            assert (await after.run()).state == "SUCCEEDED"
            assert contents(after.destination) == wanted
            assert after.temporaries() == []
    assert crashes > 5


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_handle_that_cannot_be_handed_over_ends_nothing_but_a_process(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The worker has no descriptor left at that moment."""
    dup = os.dup
    handed = lost = 0

    def scarce(descriptor: int) -> int:
        nonlocal handed
        if sys._getframe(1).f_code is OneProcess.post.__code__:
            handed += 1
            if handed == lost:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return dup(descriptor)

    monkeypatch.setattr(os, "dup", scarce)
    for lost in (1, 2, 4, 7):
        handed = 0
        engine = Engine(quick_path / str(lost), TaskOptions(), processes=processes)
        tree(engine.source, [f"{folder}/{name}" for folder in "abcdefgh" for name in range(60)])
        (engine.source / "large").write_bytes(os.urandom(MIB))
        assert (await engine.run()).state == "SUCCEEDED", lost
        _same(engine)
        assert handed >= lost


def _dies(operation: str, nth: int) -> Plan:
    """A lane process dies before its n-th call of this kind."""
    seen = 0

    def plan(call: Call) -> int | None:
        nonlocal seen
        if threading.current_thread().name == LANE_PROCESS and call.operation == operation:
            seen += 1
            if seen == nth:
                raise LaneProcessDied
        return None

    return plan


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("operation", "nth"),
    [
        ("create_temporary", 1),
        ("create_temporary", 50),
        ("pwrite", 10),
        ("pwrite", 90),
        ("preadv", 3),
        ("close_file", 60),
    ],
)
async def test_the_death_of_a_process_costs_what_it_had_not_told(
    quick_path: Path, processes: int, operation: str, nth: int
) -> None:
    # What is not read back is closed when it is written.
    options = TaskOptions(verify_checksum=operation != "close_file")
    engine = Engine(quick_path, options, plan=_dies(operation, nth), processes=processes, lanes_wanted=2)
    _fill(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    _same(engine)
    assert engine.sessions == 1
    assert observed.counters.files_transferred == 81
    assert observed.counters.bytes_transferred == sum(path.stat().st_size for path in _files(engine.source))


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("names", ["large", "a"])
async def test_what_is_damaged_on_its_way_is_fetched_again(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    spoiler = Spoiler(monkeypatch, 2)
    engine = Engine(quick_path, processes=1)
    if names == "large":
        (engine.source / "large").write_bytes(os.urandom(5 * MIB))
    else:
        tree(engine.source, [f"a/{name}" for name in range(10)])
    assert (await engine.run()).state == "SUCCEEDED"
    assert spoiler.left == 0
    assert engine.codes().count("VERIFY_CHECKSUM") == 2
    _same(engine)


@pytest.mark.parametrize("descriptors", [1000, 0])
async def test_what_the_storage_keeps_wrongly_is_found_where_it_was_written(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, descriptors: int
) -> None:
    """Also where a process may keep no temporary open."""
    left = 3
    plain = FaultyHanded.write_whole

    def spoilt(handed: FaultyHanded, folder: int, name: bytes, mode: int, content: memoryview, at: int | None) -> int:
        nonlocal left
        descriptor = plain(handed, folder, name, mode, content, at)
        if left:
            left -= 1
            os.pwrite(descriptor, b"?", len(content) - 1)
        return descriptor

    monkeypatch.setattr(FaultyHanded, "write_whole", spoilt)
    monkeypatch.setattr(lane_process, "open_files", lambda: lane_process._OTHER_DESCRIPTORS + descriptors)
    engine = Engine(quick_path, processes=1)
    tree(engine.source, [f"a/{name}" for name in range(50)])
    assert (await engine.run()).state == "SUCCEEDED"
    assert engine.codes().count("VERIFY_CHECKSUM") == 3
    _same(engine)


async def test_no_other_worker_begins_while_a_lane_process_could_write(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ours, theirs = socket.socketpair()
    process = LaneProcess(theirs)
    thread = threading.Thread(target=process.run)
    thread.start()
    channel = Channel(ours, say.FromLanes)
    held = os.open(path, os.O_RDWR | os.O_CREAT)
    assert try_lock(held)
    await channel.send(say.BeginRun(descriptors=1, node_key=b"", session_id=""), (held,))
    await channel.send(say.Withdraw(r=1, lane=1))
    await channel.receive()
    # The worker is dead; its lane process lives.
    os.close(held)
    successor = os.open(path, os.O_RDWR)
    assert not try_lock(successor)
    channel.close()
    await trio.to_thread.run_sync(thread.join)
    assert try_lock(successor)
    os.close(successor)


async def test_what_a_slow_process_has_is_taken_over(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MEASURE_EVERY", 0.02)
    monkeypatch.setattr(lane_count, "SPAN", 0.02)
    monkeypatch.setattr(lane_count, "GAIN", 0.0)
    monkeypatch.setattr(end_game, "LEAST_WAIT", 0.1)
    monkeypatch.setattr("agent.transfer.lane_processes.lane_process.TELL_EVERY", 0.02)
    cut, threads, opened = threading.Event(), [], 0
    plain = LaneProcesses.open

    async def slow_first(processes: LaneProcesses, sock: socket.socket, certificate: str) -> RemoteLane:
        nonlocal opened
        opened += 1
        # At this rate one range takes more than a minute.
        return await plain(processes, _throttled(sock, 60_000, cut, threads) if opened == 1 else sock, certificate)

    monkeypatch.setattr(LaneProcesses, "open", slow_first)
    engine = Engine(quick_path, processes=2, lanes_wanted=2)
    (engine.source / "large").write_bytes(os.urandom(96 * MIB))
    began = time.monotonic()
    try:
        observed = await engine.run(50)
    finally:
        cut.set()
        for thread in threads:
            thread.join(10)
    assert observed.state == "SUCCEEDED", observed
    _same(engine)
    assert observed.counters.bytes_transferred == 96 * MIB
    assert time.monotonic() - began < 40


async def test_a_limit_holds_in_another_process(quick_path: Path) -> None:
    engine = Engine(quick_path, processes=1)
    (engine.source / "large").write_bytes(os.urandom(3 * MIB))
    engine.pace.set_rate(4 * MIB)
    began = time.monotonic()
    assert (await engine.run()).state == "SUCCEEDED"
    # What may pass at once, and time in which the first share was not told yet, are part of it.
    assert time.monotonic() - began > 0.5
    _same(engine)


# --- the pair ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**31)), st.integers(1, 50))
def test_messages_come_whole_however_they_are_cut(numbers: list[int], piece: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = say.PairEnd(ours)
        for number in numbers:
            end.send(say.Withdrawn(r=number, lane=number % 7))
        ours.shutdown(socket.SHUT_WR)
        data = b""
        while more := theirs.recv(1 << 16):
            data += more
    incoming = MessageBuffer(say.FromLanes, say.MAX_MESSAGE)
    found = []
    for begin in range(0, len(data), piece):
        incoming.feed(data[begin : begin + piece], [])
        while (message := incoming.next()) is not None:
            found.append(message[0])
    assert found == [say.Withdrawn(r=number, lane=number % 7) for number in numbers]


def test_of_descriptors_that_were_cut_off_the_whole_ones_are_there() -> None:
    """The system leaves out what the receiver may not open, and may cut in the middle of a number."""
    whole = array.array("i", [3, 4]).tobytes()
    assert attached([(socket.SOL_SOCKET, socket.SCM_RIGHTS, whole + b"\1\0")]) == [3, 4]
    assert attached([(socket.SOL_SOCKET, socket.SCM_RIGHTS + 1, whole), (1234, socket.SCM_RIGHTS, whole)]) == []


def test_no_message_gets_the_descriptor_of_a_later_one(tmp_path: Path) -> None:
    """Where a process may open no more, descriptors are left out of what comes, and a message that comes in two pieces
    found that of the next one: blocks of one file would have been written into another."""
    paths = [tmp_path / str(number) for number in range(3)]
    files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    first, second, third = (framed(say.GivenFile(file=n, size=1, block=1, descriptors=1)) for n in range(3))
    theirs, ours = socket.socketpair()
    end, soft, taken = say.PairEnd(ours), resource.getrlimit(resource.RLIMIT_NOFILE), []
    free = [os.dup(files[0]) for _ in range(2)]
    for descriptor in free:
        os.close(descriptor)
    try:
        theirs.sendmsg([first, second[:9]], rights(files[:2]))
        # One more, and no other.
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[1], soft[1]))
        with contextlib.suppress(say.PairClosed):
            taken += end.receive()
            resource.setrlimit(resource.RLIMIT_NOFILE, soft)
            theirs.sendall(second[9:])
            theirs.sendmsg([third], rights(files[2:]))
            taken += end.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
        end.close()
        theirs.close()
    got = {message.file: os.fstat(descriptors[0]).st_ino for message, descriptors in taken}
    for descriptor in (*files, *(each for _, descriptors in taken for each in descriptors)):
        os.close(descriptor)
    assert got.items() <= {number: path.stat().st_ino for number, path in enumerate(paths)}.items()


class _Nobody(Child):
    """No process at the other end of the pair, but this test."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(0, sock)
        self.returncode = 0


async def test_what_is_said_at_once_is_sent_at_once(tmp_path: Path, nursery: trio.Nursery) -> None:
    """With the descriptors, each for its own message."""
    ours, theirs = socket.socketpair()
    process = OneProcess(_Nobody(ours), Pace(None))
    folders = {}
    for number in range(40):
        (tmp_path / str(number)).mkdir()
        folder = os.open(tmp_path / str(number), os.O_RDONLY)
        folders[number] = os.fstat(folder).st_ino
        process.post(say.GivenFolder(folder=number), folder)
        os.close(folder)
        process.post(say.Forget(folders=[number]))
    nursery.start_soon(process.run)
    end, found, reads = say.PairEnd(theirs), [], 0
    while len(found) < 80:
        await trio.lowlevel.wait_readable(theirs)
        found += list(end.receive())
        reads += 1
    for number, (handed, forgotten) in enumerate(zip(found[::2], found[1::2], strict=True)):
        assert handed[0] == say.GivenFolder(folder=number, descriptors=1)
        assert forgotten == (say.Forget(folders=[number]), [])
        (descriptor,) = handed[1]
        assert os.fstat(descriptor).st_ino == folders[number]
        os.close(descriptor)
    # As many descriptors at once as a message may bring.
    assert reads <= 4
    end.close()


@given(st.binary(max_size=200))
def test_nonsense_in_the_pair_is_refused(data: bytes) -> None:
    incoming = MessageBuffer(say.ToLanes, say.MAX_MESSAGE)
    incoming.feed(data, [])
    try:
        while (found := incoming.next()) is not None:
            message, descriptors = found
            assert isinstance(message, say.ToLanes)
            assert descriptors == []
    except Garbled:
        return


# --- real processes ------------------------------------------------------------------------------------------


def _lane_processes() -> list[psutil.Process]:
    """Those below workers, which carry their command line."""
    return [below for child in psutil.Process().children() for below in child.children()]


async def _until(found: Callable[[], Any]) -> Any:
    with trio.fail_after(30):
        while not (answer := found()):
            await trio.sleep(0.002)
    return answer


@pytest.mark.soak
async def test_kill_9_of_a_lane_process_in_the_middle(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path, workers_per_session=2) as world:
        folder = world.alpha.root / "data"
        folder.mkdir()
        for number in range(600):
            (folder / str(number)).write_bytes(os.urandom(5000))
        (folder / "large").write_bytes(os.urandom(128 * MIB))
        task = await world.submit([TaskItem(source_path="/data", destination_path="/data", recursive=True)])
        assert world.beta.service is not None
        # Once something of a file is there, and not all.
        await _until(lambda: world.beta.service.get_task(task).counters.bytes_transferred)
        killed = 0
        for process in _lane_processes():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        observed = await world.wait(task, seconds=60)
        assert observed.state == "SUCCEEDED", observed
        assert contents(world.beta.root / "data") == contents(folder)
        assert not list(world.beta.root.rglob(".towpath.*"))
        assert killed
    # None outlives its worker.
    await _until(lambda: not _lane_processes())
