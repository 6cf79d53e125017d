"""What is decided about a large file that failed: once, however much of it fails."""

from __future__ import annotations

import errno
import os
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.storage.faulty import Call
from agent.transfer.asking.budget import UNSETTLED_BYTES, Budget
from agent.transfer.basis import patience
from agent.transfer.basis.jobs import Abandoned, LargeFile
from agent.transfer.receiving.large_files import LargeFiles
from protocol.errors import RetryLater, TowpathError
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path, when

__all__ = ["quick_path"]

MIB = 1024 * 1024


@pytest.mark.parametrize("lasting", [False, True])
def test_a_file_of_which_several_checks_fail_is_tried_again_or_given_up_once(lasting: bool) -> None:
    """The checks of one file follow one another, and each may meet the same bad disk. Two attempts would write to one
    temporary at once."""
    settle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    given_up: list[LargeFile] = []
    attempts: list[TowpathError] = []

    def decide(_job: object, error: TowpathError) -> bool:
        attempts.append(error)
        return lasting

    run: Any = SimpleNamespace(
        settle=settle,
        retries=SimpleNamespace(lasting=decide),
        give_up=lambda _job, _error, discard: given_up.append(discard),
    )
    job: Any = None
    file = LargeFile(job, b"t", 3, 1024, bytearray(1), 0, failed=True)
    file.open_ranges = 1
    large = LargeFiles(run)
    errors = [RetryLater(f"{number}") for number in range(3)]
    large.failed(file, errors[0])
    assert settle.empty()
    file.open_ranges = 0
    large.idle(file)
    # What was being checked then.
    for error in errors[1:]:
        large.failed(file, error)
    assert attempts == [errors[0]]
    if lasting:
        assert given_up == [file]
    else:
        assert not given_up
        item = settle.get_nowait()
        assert isinstance(item, Abandoned)
        assert (item.file, item.error) == (file, errors[0])
    assert settle.empty()


@pytest.mark.parametrize("processes", [0, 1])
async def test_what_had_come_of_a_file_that_failed_is_not_on_its_way_for_ever(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """A few files of which the source cannot read the end, tried again and again, took all that there was to take, and
    the task stood still without a word."""
    budgets: list[Budget] = []
    made = Budget.__init__

    def noted(budget: Budget, total: int = UNSETTLED_BYTES) -> None:
        made(budget, total)
        budgets.append(budget)

    monkeypatch.setattr(Budget, "__init__", noted)
    engine = Engine(
        quick_path,
        processes=processes,
        source_plan=lambda call: errno.EIO if call.operation == "preadv" and not call.nth % 4 else None,
    )
    for name in ("one", "two"):
        (engine.source / name).write_bytes(os.urandom(4 * MIB))
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 2), observed
    assert observed.counters.faults == 2 * patience.ATTEMPTS["IO_ERROR"]
    assert [budget.used for budget in budgets] == [0]
    assert engine.temporaries() == []


class Unnamed:
    """The large file cannot have its name so often; what is read of it at the source is counted."""

    def __init__(self, base: Path, code: int, times: int, **more: Any) -> None:
        self.left, self.reads = times, 0
        self._code = code
        self.engine = Engine(base, plan=self.refuse, source_plan=self.count, **more)
        self.large = self.engine.source / "large"
        self.large.write_bytes(os.urandom(20 * MIB))
        self.large.chmod(0o444)

    def refuse(self, call: Call) -> int | None:
        if (call.operation, call.name) != ("rename", b"large") or not self.left:
            return None
        self.left -= 1
        return self._code

    def count(self, call: Call) -> None:
        self.reads += call.operation == "preadv"

    def ask_again(self) -> None:
        self.left = 0


@pytest.mark.parametrize("processes", [0, 1])
async def test_a_file_that_cannot_have_its_name_yet_is_not_sent_again(quick_path: Path, processes: int) -> None:
    """Terabytes were thrown away for a busy file server."""
    once = Unnamed(quick_path / "once", errno.EIO, 0, processes=processes)
    await once.engine.run()
    scene = Unnamed(quick_path / "again", errno.EIO, 3, processes=processes)
    observed = await scene.engine.run()
    assert (observed.state, observed.counters.files_transferred) == ("SUCCEEDED", 1), observed
    assert scene.engine.codes().count("IO_ERROR") == 3
    assert scene.reads == once.reads
    assert observed.counters.bytes_transferred == 20 * MIB
    assert contents(scene.engine.destination) == contents(scene.engine.source)
    assert (scene.engine.destination / "large").stat().st_mode & 0o777 == 0o444


async def test_a_file_that_waits_for_room_for_its_name_is_not_sent_again(quick_path: Path) -> None:
    scene = Unnamed(quick_path, errno.ENOSPC, 1 << 30)
    scene.engine.on_report = when("NO_SPACE", scene.ask_again)
    observed = await scene.engine.run()
    assert observed.state == "SUCCEEDED", observed
    once = Unnamed(quick_path / "once", errno.EIO, 0)
    await once.engine.run()
    assert scene.reads == once.reads
    assert contents(scene.engine.destination) == contents(scene.engine.source)


async def test_a_file_that_can_never_have_its_name_leaves_nothing_behind(quick_path: Path) -> None:
    for code in (errno.EACCES, errno.EIO):
        scene = Unnamed(quick_path / str(code), code, 1 << 30)
        observed = await scene.engine.run()
        assert (observed.state, observed.counters.failed) == ("FAILED", 1), observed
        assert scene.engine.temporaries() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another account for a while")
@pytest.mark.parametrize("processes", [0, 1])
async def test_a_file_that_nobody_may_write_goes_on_after_a_kill_before_it_had_its_name(
    quick_path: Path, processes: int
) -> None:
    """Its mode is final by then, and what is missing of it in the journal is written again."""
    scene = Unnamed(quick_path, errno.EIO, 0, processes=processes)

    def die(call: Call) -> int | None:
        if (call.operation, call.name) == ("rename", b"large"):
            raise Crashed
        return None

    scene.engine.plan = die
    for path in (quick_path, *quick_path.rglob("*")):
        os.chown(path, 65534, 65534)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with pytest.raises(Crashed):
            await scene.engine.run()
        (left,) = scene.engine.temporaries()
        assert Path(left).stat().st_mode & 0o777 == 0o444
        after = scene.engine.revived()
        observed = await after.run()
    finally:
        os.seteuid(0)
        os.setegid(0)
    assert (observed.state, observed.counters.faults) == ("SUCCEEDED", 0), (observed, after.codes())
    assert contents(after.destination) == contents(after.source)
    assert (after.destination / "large").stat().st_mode & 0o777 == 0o444
