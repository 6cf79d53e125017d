"""Every call of a small transfer fails once, in every way, and dies once: what is under a final name is whole, and the
task comes to its end."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import trio

from agent.storage.faulty import Call, fail_nth
from agent.transfer.asking import arrivals
from agent.transfer.basis import patience
from protocol.control import TaskOptions
from tests.agent.engine_inside import Crashed, Engine, contents, open_files, quick_path
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

MIB = 1024 * 1024
SEEDS = 200
MANY_SEEDS = range(1000, 4000)
NEW = 3 * MIB + 17


def fill(engine: Engine) -> dict[str, bytes | str]:
    """A small tree of everything there is, and an older version of one file at the destination."""
    (engine.source / "folder" / "inner").mkdir(parents=True)
    (engine.source / "folder" / "one").write_bytes(b"1")
    (engine.source / "folder" / "inner" / "two").write_bytes(b"two" * 1000)
    (engine.source / "empty").write_bytes(b"")
    (engine.source / "large").write_bytes(os.urandom(NEW))
    (engine.source / "link").symlink_to("large")
    (engine.destination / "empty").write_bytes(b"an older version")
    return contents(engine.source)


def nothing_half(engine: Engine, wanted: dict[str, bytes | str]) -> None:
    """Whatever has a final name is complete, or what was there before."""
    for name, content in contents(engine.destination).items():
        if ".towpath." not in name:
            assert content == wanted[name] or (name == "empty" and content == b"an older version"), name


async def ended(engine: Engine, code: int, named: set[str], what: str) -> str:
    """Run a task of which one call fails with this number; how it ended. Only an error that trying again does not mend
    may end it otherwise than well, and one of the codes ``named`` says what failed."""
    wanted = fill(engine)
    observed = await engine.run()
    what = f"{what}, {observed}"
    nothing_half(engine, wanted)
    assert engine.temporaries() == [], what
    if observed.state == "SUCCEEDED":
        assert contents(engine.destination) == wanted, what
    else:
        assert (code, observed.error_code) == (errno.EACCES, "ITEMS_FAILED"), what
        assert observed.counters.failed > 0, what
        assert named & set(engine.codes()), what
    return observed.state


async def test_the_small_transfer_itself(quick_path: Path) -> None:
    engine = Engine(quick_path)
    wanted = fill(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == wanted
    assert engine.codes() == ["STARTED", "SUCCEEDED"]
    print(f"calls of a small transfer: {len(engine.calls)} {Counter(call.operation for call in engine.calls)}")


async def recorded(base: Path, **fields: object) -> list[Call]:
    """The calls of an undisturbed run."""
    engine = Engine(base, **fields)  # type: ignore[arg-type]
    fill(engine)
    await engine.run()
    return engine.calls


@pytest.mark.parametrize(
    "code",
    [
        errno.EIO,
        errno.ENOSPC,
        # Goes the way of a full disk.
        pytest.param(errno.EDQUOT, marks=pytest.mark.soak),
        errno.EACCES,
    ],
    ids=errno.errorcode.get,
)
async def test_every_call_fails_once(quick_path: Path, code: int) -> None:
    """Passing faults and full disks are got over; a lasting one costs its file at most. Nothing half has a name."""
    calls = await recorded(quick_path / "plain")
    ends: Counter[str] = Counter()
    for number in range(1, len(calls) + 1):
        engine = Engine(quick_path / str(number), plan=fail_nth(number, code))
        what = f"call {number} ({calls[number - 1].operation})"
        ends[await ended(engine, code, {"PERMISSION_DENIED"}, what)] += 1
        if code in (errno.ENOSPC, errno.EDQUOT) and engine.codes() != ["STARTED", "SUCCEEDED"]:
            assert {"NO_SPACE", "QUOTA_EXCEEDED", "STATE_UNAVAILABLE"} & set(engine.codes()) or engine.reports, what
    assert len(calls) > 40
    print(f"{errno.errorcode[code]}: {len(calls)} calls failed, one a run; {dict(ends)}")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
async def test_every_call_at_the_source_fails_once(quick_path: Path, code: int) -> None:
    """As at the destination: what passes is got over, what lasts costs its file or folder, in words."""

    def counting(calls: list[Call], number: int) -> Callable[[Call], int | None]:
        # A session opens the root anew; the numbers go on.
        def plan(call: Call) -> int | None:
            calls.append(call)
            return code if len(calls) == number else None

        return plan

    calls: list[Call] = []
    plain = Engine(quick_path / "plain", source_plan=counting(calls, 0))
    fill(plain)
    await plain.run()
    ends: Counter[str] = Counter()
    for number in range(1, len(calls) + 1):
        engine = Engine(quick_path / str(number), source_plan=counting([], number))
        what = f"call {number} ({calls[number - 1].operation})"
        # A link that may not be read is said to lead nowhere.
        ends[await ended(engine, code, {"PERMISSION_DENIED", "FILE_NOT_FOUND"}, what)] += 1
    assert len(calls) > 10
    print(f"source, {errno.errorcode[code]}: {len(calls)} calls failed, one a run; {dict(ends)}")


async def test_every_call_moves_only_three_bytes(quick_path: Path) -> None:
    engine = Engine(quick_path, short=4093)
    wanted = fill(engine)
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == wanted


async def test_a_crash_at_every_call(quick_path: Path) -> None:
    """The process dies before the n-th call for every n; the next one brings the task to its end."""
    calls = await recorded(quick_path / "plain")
    again = crashes = 0
    for number in range(1, len(calls) + 1):

        def die(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        engine = Engine(quick_path / str(number), plan=die)
        wanted = fill(engine)
        try:
            await engine.run()
        except Crashed:
            crashes += 1
        else:
            # What is settled together, and so the number of calls, differs a little from run to run.
            assert number > len(calls) // 2
            continue
        nothing_half(engine, wanted)
        after = engine.revived()
        observed = await after.run()
        what = f"crash before call {number} ({calls[number - 1].operation}), {observed}"
        assert observed.state == "SUCCEEDED", what
        assert contents(engine.destination) == wanted, what
        assert after.temporaries() == [], what
        again = max(again, observed.counters.bytes_sent_again)
        seqs = [event.seq for event in after.events]
        assert len(set(seqs)) == len({(event.seq, event.code) for event in after.events}), what
    assert again <= NEW + 4000
    print(f"crashes survived: {crashes}, at most {again} bytes sent again")


LASTING = {"EIO": errno.EIO, "EBUSY": errno.EBUSY, "ESTALE": errno.ESTALE, "EACCES": errno.EACCES}


@pytest.mark.parametrize("operation", ["lstat", "create_temporary", "rename", "fsync", "symlink", "mkdir"])
@pytest.mark.parametrize("name", LASTING)
async def test_a_fault_that_stays_ends_the_task_in_words(quick_path: Path, name: str, operation: str) -> None:
    """No fault is tried for ever: the budget of its class ends it, and the files it does not concern are there."""
    engine = Engine(quick_path, plan=fail_nth(1, LASTING[name], operation, times=0))
    wanted = fill(engine)
    observed = await engine.run()
    assert observed.state == "FAILED", observed
    assert observed.error_code == "ITEMS_FAILED"
    nothing_half(engine, wanted)
    assert engine.temporaries() == []


@pytest.mark.parametrize(
    "operation", ["scan", "scan_entry", "open_directory", "stat", "readlink", "open_read", "preadv"]
)
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EACCES"])
async def test_a_fault_that_stays_at_the_source_ends_the_task_in_words(
    quick_path: Path, name: str, operation: str
) -> None:
    """The same for its folders, links and files: one of them that cannot be read never holds up the task for ever."""
    broken = {"scan_entry": b"two", "readlink": b"far"}.get(operation)

    def plan(call: Call) -> int | None:
        return LASTING[name] if call.operation == operation and broken in (None, call.name) else None

    engine = Engine(quick_path, source_plan=plan)
    wanted = fill(engine)
    (engine.source / "folder" / "inner" / "far").symlink_to("two")
    wanted["folder/inner/far"] = "link to two"
    observed = await engine.run()
    assert (observed.state, observed.error_code) == ("FAILED", "ITEMS_FAILED"), observed
    nothing_half(engine, wanted)
    assert engine.temporaries() == []
    assert observed.counters.failed >= 1
    if broken is not None:
        # What is elsewhere has come.
        assert observed.counters.failed == 1
        missing = wanted.keys() - contents(engine.destination).keys()
        assert missing <= {"folder/inner/two", "folder/inner/far"}, missing


@pytest.mark.parametrize("times", [1, 3, 30])
async def test_a_link_that_cannot_be_followed_for_a_moment_is_not_left_out(quick_path: Path, times: int) -> None:
    """A task that follows links leaves out those that lead nowhere, and no others."""
    left = [times]

    def plan(call: Call) -> int | None:
        if call.operation == "stat" and call.name == b"link" and left[0]:
            left[0] -= 1
            return errno.ESTALE
        return None

    engine = Engine(quick_path, TaskOptions(verify_checksum=True, recursive_symlinks="copy"), source_plan=plan)
    wanted = fill(engine)
    (engine.source / "dangling").symlink_to("nothing")
    wanted["link"] = wanted["large"]
    observed = await engine.run()
    if times < patience.ATTEMPTS["STALE_HANDLE"]:
        assert observed.state == "SUCCEEDED", observed
        assert contents(engine.destination) == wanted
        # The one that leads nowhere is counted.
        assert (observed.counters.files, observed.counters.symlinks) == (5, 1)
        assert observed.counters.bytes_total == observed.counters.bytes_transferred
    else:
        assert (observed.state, observed.counters.failed) == ("FAILED", 1)
        assert "STALE_HANDLE" in engine.codes()
        del wanted["link"]
        nothing_half(engine, wanted)


@pytest.mark.parametrize("last", ["fails", "dies"])
async def test_a_large_file_that_could_not_have_its_name_counts_once(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Its first blocks are in the journal, all are checked, and then its name cannot be given, or the process dies."""
    monkeypatch.setattr(arrivals, "CHECK_AFTER", MIB)
    checked, booked = threading.Event(), threading.Event()
    failed: list[Call] = []

    def hold_back(call: Call) -> int | None:
        if call.operation == "preadv" and call.nth == 3:
            assert booked.wait(20)
        return None

    def plan(call: Call) -> int | None:
        if call.operation == "preadv":
            checked.set()
        elif call.operation == "journal_commit" and checked.is_set():
            booked.set()
        elif call.operation == "rename" and not failed:
            failed.append(call)
            if last == "dies":
                raise Crashed
            return errno.EIO
        return None

    engine = Engine(quick_path, plan=plan, source_plan=hold_back)
    (engine.source / "large").write_bytes(os.urandom(NEW))
    # A mode that its owner may not write is given when everything is checked; others come with the last blocks.
    (engine.source / "large").chmod(0o400)
    try:
        observed = await engine.run()
    except Crashed:
        observed = await engine.revived().run()
    assert failed
    assert contents(engine.destination) == contents(engine.source)
    assert observed.counters.bytes_transferred == observed.counters.bytes_total == NEW
    # What was not settled when it died; what only waits for its name is not sent again.
    assert observed.counters.bytes_sent_again <= (NEW if last == "dies" else 0)


async def test_a_source_that_goes_while_its_lanes_still_bring_something(quick_path: Path) -> None:
    """Its control stream ends first: asking for the next range fails while a lane's thread tells of the last one."""
    gone = 0

    def plan(call: Call) -> int | None:
        nonlocal gone
        # The last blocks of ranges.
        if call.operation == "pwrite" and call.nth in (8, 32):
            gone += 1
            trio.from_thread.run_sync(engine.controls[-1].send_stream.close)
            # Until the loss is noticed.
            time.sleep(0.05)
        return None

    # By a lane of this process: those of others tell nobody by themselves.
    engine = Engine(quick_path, plan=plan, processes=0)
    (engine.source / "large").write_bytes(os.urandom(64 * MIB))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert gone == 2
    assert contents(engine.destination) == contents(engine.source)
    assert engine.sessions == 3
    # A task may be interrupted for as long as it runs: nothing of the runs before stays open.
    assert not open_files(engine.destination)


async def chaos(base: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Many faults of many kinds in one task, and now and then its death; in the end everything is there."""
    random = Random(seed)
    left = random.randint(1, 12)
    seen: Counter[str] = Counter()

    def plan(call: Call) -> int | None:
        nonlocal left
        if not left or random.random() > 0.08:
            return None
        left -= 1
        if random.random() < 0.3:
            seen["crashes"] += 1
            raise Crashed
        code = random.choice((errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EBUSY))
        seen[errno.errorcode[code]] += 1
        return code

    # Every other seed checks each block alone, so that parts of the large file count before it is whole.
    monkeypatch.setattr(arrivals, "CHECK_AFTER", MIB if seed % 2 else 16 * MIB)
    engine = Engine(base, plan=plan)
    wanted = fill(engine)
    observed = None
    while observed is None:
        try:
            observed = await engine.run()
        except Crashed:
            nothing_half(engine, wanted)
            engine = engine.revived(plan)
    if observed.status_code == "ITEMS_FAILED":
        seen["given up"] += observed.counters.failed
        await gave_up(engine, wanted, seed, sum(seen.values()) - seen["crashes"] - seen["given up"], monkeypatch)
        return seen
    assert observed.state == "SUCCEEDED", f"seed {seed}: {observed}"
    assert contents(engine.destination) == wanted, f"seed {seed}"
    counters = observed.counters
    assert counters.bytes_transferred == counters.bytes_total, f"seed {seed}: {counters}"
    return seen


async def gave_up(
    engine: Engine, wanted: dict[str, bytes | str], seed: int, faults: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults fall where they like: a file that met as many as its budget has attempts is given up, rightly. It has to
    be in words, nothing may be half, and the next task brings the rest and removes what is left of this one."""
    failed = engine.reports[-1].counters.failed if engine.reports else 1
    assert faults >= failed * patience.DEFAULT_ATTEMPTS, f"seed {seed}: {faults} faults, {engine.codes()}"
    assert engine.codes()[-1] == "FAILED", f"seed {seed}"
    nothing_half(engine, wanted)
    shutil.rmtree(engine.state)
    # A folder that was given up keeps what a crash left in it, until that is so old that its task must be dead.
    with monkeypatch.context() as later:
        later.setattr("agent.transfer.planning.left_behind.ORPHAN_AGE", -1)
        assert (await Engine(engine.base).run()).state == "SUCCEEDED", f"seed {seed}"
    assert contents(engine.destination) == wanted, f"seed {seed}"


async def test_seeded_faults_and_crashes(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total: Counter[str] = Counter()
    for seed in range(SEEDS):
        total += await chaos(quick_path / str(seed), seed, monkeypatch)
    print(f"seeds: {SEEDS}, faults: {dict(total)}")
    assert total["given up"] <= SEEDS / 20


@pytest.mark.soak
@pytest.mark.timeout(3000)
async def test_thousands_of_seeded_faults_and_crashes(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total: Counter[str] = Counter()
    chosen = chosen_seeds(MANY_SEEDS)
    for seed in chosen:
        total += await chaos(quick_path / str(seed), seed, monkeypatch)
        shutil.rmtree(quick_path / str(seed))
    print(f"seeds: {chosen[0]} to {chosen[-1]}, faults: {dict(total)}")
    assert total["given up"] <= max(1, len(chosen) / 20)
