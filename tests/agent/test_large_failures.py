"""What is decided about a large file that failed: once, however much of it fails."""

from __future__ import annotations

import errno
import os
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.transfer.asking.budget import UNSETTLED_BYTES, Budget
from agent.transfer.basis import patience
from agent.transfer.basis.jobs import Abandoned, LargeFile
from agent.transfer.receiving.large_files import LargeFiles
from protocol.errors import RetryLater, TowpathError
from tests.agent.engine_inside import Engine, quick_path

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
