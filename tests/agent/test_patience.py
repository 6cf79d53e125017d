"""How often something is tried before it counts as failed, and what is said of each attempt."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from agent.storage.faulty import Call
from agent.transfer.basis import patience
from agent.transfer.basis.patience import ATTEMPTS, DEFAULT_ATTEMPTS, LONGEST_PAUSE, Patience, attempts, counted, pause
from protocol.control import TaskItem, TaskOptions
from protocol.errors import (
    AccessDenied,
    ItemFailed,
    NeedsPerson,
    ProtocolError,
    RetryLater,
    TaskFailed,
    TowpathError,
)
from tests.agent.engine_inside import Engine, contents, quick_path, skipped, tree

__all__ = ["quick_path"]


@pytest.mark.parametrize("code", [*ATTEMPTS, "CONNECT_FAILED"])
def test_passing_faults_have_a_budget(code: str) -> None:
    error = RetryLater("It is busy.", code=code)
    most = ATTEMPTS.get(code, DEFAULT_ATTEMPTS)
    assert attempts(error) == most > 1
    patience = Patience()
    assert [patience.is_passing(b"a", error) for _ in range(most + 1)] == [True] * (most - 1) + [False, False]
    # Each place has its own.
    assert patience.is_passing(b"b", error)


def test_what_a_peer_says_wrongly_is_tried_again_like_a_passing_fault() -> None:
    assert attempts(ProtocolError("Nonsense.")) == DEFAULT_ATTEMPTS


@pytest.mark.parametrize("kind", [ItemFailed, AccessDenied])
def test_lasting_faults_have_one_attempt(kind: type[TowpathError]) -> None:
    assert attempts(kind("No.")) == 1
    assert not Patience().is_passing(b"a", kind("No."))


@pytest.mark.parametrize("kind", [NeedsPerson, TaskFailed])
def test_what_ends_a_run_anyway_is_not_counted(kind: type[TowpathError]) -> None:
    patience = Patience()
    assert all(patience.is_passing(b"a", kind("Full.", code="BUSY")) for _ in range(3 * ATTEMPTS["BUSY"]))


def test_the_sources_storage_has_budgets_of_its_own() -> None:
    patience, busy = Patience(), RetryLater("It is busy.", code="IO_ERROR")
    lasting = [patience.lasts_at_source(b"a", busy) for _ in range(ATTEMPTS["IO_ERROR"] + 1)]
    assert lasting == [False] * (ATTEMPTS["IO_ERROR"] - 1) + [True, True]
    # The destination's place of that name is another one.
    assert patience.is_passing(b"a", busy)
    # What is the connection's costs no file, however often; nor does what is no passing fault.
    for error in (RetryLater("Gone.", code="CONNECTION_LOST"), ItemFailed("No.", code="IO_ERROR")):
        assert not any(patience.lasts_at_source(b"b", error) for _ in range(20))


def test_attempts_are_told_with_how_many_there_are() -> None:
    error = RetryLater("It is busy.", code="IO_ERROR", who="source owner", subject="/a")
    told = [counted(error, attempt).sentence for attempt in (0, 1, 5, 6)]
    last = "It is busy. Attempt 5 of 5."
    assert told == ["It is busy.", "It is busy. Attempt 1 of 5.", last, last]
    assert error.sentence == "It is busy."
    first = counted(error, 1)
    assert (type(first), first.code, first.who, first.subject) == (RetryLater, "IO_ERROR", "source owner", "/a")
    lasting = ItemFailed("No.")
    assert counted(lasting, 1) is lasting


def test_pauses_grow_to_a_bound() -> None:
    assert [pause(attempt) for attempt in range(1, 5)] == pytest.approx([0.2, 0.8, 3.2, 12.8])
    assert [pause(attempt) for attempt in (5, 50, 10**6)] == [LONGEST_PAUSE] * 3


@pytest.mark.parametrize(("code", "name"), [(errno.EBUSY, "BUSY"), (errno.EIO, "IO_ERROR")])
async def test_a_delete_ends_although_something_can_never_be_removed(quick_path: Path, code: int, name: str) -> None:
    """A folder on which something is mounted is busy for ever, and so was the task."""
    met: list[Call] = []

    def busy(call: Call) -> int | None:
        if (call.operation, call.name) != ("rmdir", b"mounted"):
            return None
        met.append(call)
        return code

    items = [TaskItem(source_path="/folder"), TaskItem(source_path="/other")]
    engine = Engine(quick_path, TaskOptions(recursive=True), items, type="DELETE", plan=busy)
    tree(engine.destination, ["folder/mounted/one", "other/two"])
    observed = await engine.run(10)
    assert (observed.state, observed.counters.failed) == ("FAILED", 1), observed
    assert list(contents(engine.destination)) == ["folder", "folder/mounted"]
    assert skipped(engine) == {"folder": name}
    assert len(met) == patience.ATTEMPTS[name]


async def test_a_delete_that_gets_further_each_time_is_not_given_up(quick_path: Path) -> None:
    """A file server that is away now and then does not end it, however often."""

    def away(call: Call) -> int | None:
        return errno.EIO if call.operation == "unlink" and not call.nth % 3 else None

    items = [TaskItem(source_path="/folder")]
    engine = Engine(quick_path, TaskOptions(recursive=True), items, type="DELETE", plan=away)
    tree(engine.destination, [f"folder/{number}" for number in range(20)])
    observed = await engine.run(10)
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 21), observed
    assert list(engine.destination.iterdir()) == []
