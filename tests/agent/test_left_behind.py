"""Temporaries that cannot be removed at their time: remembered within a bound, and gone when the task has ended."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.storage.faulty import Call, Plan, fail_nth
from agent.storage.posix import open_root
from agent.transfer.books import journal_file as journals
from agent.transfer.books.journal import Journal
from agent.transfer.planning.left_behind import sweep_temporaries
from protocol.control import TaskItem
from tests.agent.engine_inside import WHOLE, Crashed, Engine, Line, contents, quick_path, received

__all__ = ["quick_path"]


def test_the_list_is_bounded_and_says_that_there_are_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    for number in range(journals.MOST_LEFT_BEHIND):
        journal.add_left_behind(b"folder", b"%d" % number)
    assert not journal.left_behind_anywhere()
    for number in range(50):
        journal.add_left_behind(b"folder", b"more %d" % number)
    assert len(journal.left_behind()) == journals.MOST_LEFT_BEHIND
    assert journal.left_behind_anywhere()
    journal.forget_left_behind()
    assert (journal.left_behind(), journal.left_behind_anywhere()) == ([], False)
    journal.close()


def test_only_temporaries_of_this_task_are_swept(tmp_path: Path) -> None:
    """Another task may be at work in the same folder."""
    names = ["named", ".towpath.mine.1.old", ".towpath.mine.2.own", ".towpath.mine.1.kept", ".towpath.theirs.1.x"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with open_root(str(tmp_path)) as root, root.open_directory(()) as handle:
        kept = {b".towpath.mine.1.kept"}
        assert sweep_temporaries(handle, b".towpath.mine.", kept, own=b".towpath.mine.2.") == 1
        assert {path.name for path in tmp_path.iterdir()} == {*names} - {".towpath.mine.1.old"}
        assert sweep_temporaries(handle, b".towpath.mine.") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"named", ".towpath.theirs.1.x"}


@pytest.mark.parametrize("most", [0, 3, 1000])
async def test_what_could_not_be_removed_is_gone_in_the_end(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Whatever the bound: each file reads back wrongly once, and its temporary cannot be removed then."""
    monkeypatch.setattr(journals, "MOST_LEFT_BEHIND", most)
    failed = {"rename": 0, "unlink": 0}

    def plan(call: Call) -> int | None:
        if call.operation in failed and failed[call.operation] < 12:
            failed[call.operation] += 1
            return errno.EIO
        return None

    engine = Engine(quick_path, plan=plan)
    for folder in ("a", "b"):
        (engine.source / folder).mkdir()
        for number in range(6):
            (engine.source / folder / f"file-{number}").write_bytes(b"content of %d" % number)
        os.utime(engine.source / folder, ns=(1, 10**18))
    (engine.source / "single").write_bytes(b"single")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert failed == {"rename": 12, "unlink": 12}
    assert contents(engine.destination) == contents(engine.source)
    assert engine.temporaries() == []
    # Removing the last of them has changed the folders once more.
    assert {(engine.destination / folder).stat().st_mtime_ns for folder in ("a", "b")} == {10**18}


SIZE = 40 * 1024 * 1024


def _gone(path: Path) -> None:
    path.unlink()


def _shrunk(path: Path) -> None:
    os.truncate(path, 1000)


def _now_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _now_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("other")


SINGLE = [TaskItem(source_path="/large", destination_path="/below/large")]
IN_FOLDER = [TaskItem(source_path="/", destination_path="/below", recursive=True)]


@pytest.mark.parametrize("items", [IN_FOLDER, SINGLE], ids=["folder", "item"])
@pytest.mark.parametrize("change", [_gone, _shrunk, _now_a_folder, _now_a_link])
@pytest.mark.parametrize("killed", [True, False])
async def test_a_part_of_a_file_that_is_large_no_more_goes_with_it(
    quick_path: Path, change: Callable[[Path], None], items: list[TaskItem], *, killed: bool
) -> None:
    """What had arrived of it takes as much room as the file did, and nobody sees it."""
    if killed:
        engine = await _half_arrived(quick_path, items)
        change(engine.source / "large")
        after = engine.revived()
    else:
        changed = threading.Event()

        def change_it(call: Call) -> int | None:
            if call.operation == "preadv" and call.nth == 30:
                change(after.source / "large")
                changed.set()
            return None

        def wait_for_it(call: Call) -> int | None:
            # The last MiB: read before, the old file would have arrived as a whole.
            if call.operation == "preadv" and call.nth == SIZE // 2**20:
                assert changed.wait(20)
            return None

        after = Engine(quick_path, items=items, plan=change_it, source_plan=wait_for_it)
        (after.source / "large").write_bytes(os.urandom(SIZE))
    observed = await after.run()
    assert observed.state in ("SUCCEEDED", "FAILED"), observed
    assert after.temporaries() == []
    if observed.state == "SUCCEEDED" and items is IN_FOLDER:
        assert contents(after.destination / "below") == contents(after.source)


def _dies_once() -> Plan:
    """Death while a large file is under way, with some of its blocks settled: while later ones are read back."""
    died = False

    def die(call: Call) -> int | None:
        nonlocal died
        if call.operation == "preadv" and call.nth == 30 and not died:
            died = True
            raise Crashed
        return None

    return die


async def _half_arrived(base: Path, items: list[TaskItem] = WHOLE) -> Engine:
    """An engine that died while a large file was under way, with some of its blocks settled."""
    engine = Engine(base, items=items, plan=_dies_once())
    (engine.source / "large").write_bytes(os.urandom(SIZE))
    with pytest.raises(Crashed):
        await engine.run()
    return engine


@pytest.mark.parametrize("items", [IN_FOLDER, SINGLE], ids=["folder", "item"])
async def test_a_task_that_is_cancelled_between_its_runs_leaves_nothing(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[TaskItem]
) -> None:
    engine = await _half_arrived(quick_path, items)
    assert engine.temporaries()
    begin = Line.__init__

    def cancelled(line: Line, *arguments: Any) -> None:
        begin(line, *arguments)
        line.desired = "cancel"

    monkeypatch.setattr(Line, "__init__", cancelled)
    after = engine.revived()
    assert (await after.run()).state == "CANCELED"
    assert after.temporaries() == []


@pytest.mark.parametrize(("code", "times"), [(errno.EIO, 4), (errno.ETIMEDOUT, 11), (errno.ESTALE, 11)])
async def test_a_passing_fault_does_not_cost_what_has_arrived(quick_path: Path, code: int, times: int) -> None:
    """The part of a large file that is there is opened again after a fault, not sent again."""
    engine = await _half_arrived(quick_path)
    after = engine.revived(fail_nth(1, code, "open_temporary", times=times))
    observed = await after.run()
    assert (observed.state, observed.counters.faults) == ("SUCCEEDED", times), observed
    assert contents(after.destination) == contents(after.source)
    assert "PART_LOST" not in after.codes()
    # All of it came twice if the part was given up for lost.
    assert received(after) < 2 * SIZE - 8 * 1024 * 1024


async def test_a_part_that_cannot_be_opened_any_more_is_given_up_for_lost_in_the_end(quick_path: Path) -> None:
    """A bad sector may be in nothing but this part."""
    engine = await _half_arrived(quick_path)
    (temporary,) = engine.temporaries()
    opening = ("open_temporary", os.fsencode(Path(temporary).name))

    def bad(call: Call) -> int | None:
        return errno.EIO if (call.operation, call.name) == opening else None

    after = engine.revived(bad)
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)
    assert after.codes().count("IO_ERROR") == 4
    assert after.codes().count("PART_LOST") == 1
    assert after.temporaries() == []


async def test_a_part_that_is_gone_is_told_and_transferred_again(quick_path: Path) -> None:
    """Somebody removed the temporary while nobody was at work: said once, and the file begun again."""
    engine = await _half_arrived(quick_path)
    (temporary,) = engine.temporaries()
    Path(temporary).unlink()
    after = engine.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)
    assert after.codes().count("PART_LOST") == 1
    assert observed.counters.bytes_transferred == SIZE
    assert after.temporaries() == []


def _into_one_folder(kind: str, count: int) -> list[TaskItem]:
    """Items that all lead into one folder: a file each, or a folder with one file each."""
    if kind == "files":
        return [TaskItem(source_path=f"/{n}/file-{n}", destination_path=f"/to/file-{n}") for n in range(count)]
    return [TaskItem(source_path=f"/{n}", destination_path="/to", recursive=True) for n in range(count)]


@pytest.mark.parametrize("kind", ["files", "folders"])
async def test_what_an_earlier_run_left_is_swept_and_nothing_of_this_one(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Several parts of a task come to one folder, one after the other; each sweeps it when the task goes on."""
    monkeypatch.setattr("agent.transfer.planning.items.ITEMS_AT_ONCE", 1)
    count = 60
    engine = Engine(quick_path, items=_into_one_folder(kind, count), plan=_dies_once())
    for number in range(count):
        (engine.source / f"{number}").mkdir()
        (engine.source / f"{number}" / f"file-{number}").write_bytes(b"content of %d" % number)
    # Not the first, nor the last one to be opened again.
    (engine.source / "30" / "file-30").write_bytes(os.urandom(SIZE))
    with pytest.raises(Crashed):
        await engine.run()
    (engine.destination / "to" / ".towpath.11111111.of-a-dead-run").touch()
    after = engine.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", (observed, set(after.codes()))
    assert contents(after.destination / "to") == {path.name: path.read_bytes() for path in after.source.rglob("file-*")}
    assert "PART_LOST" not in after.codes()


@pytest.mark.parametrize("becomes_folder", [False, True], ids=["gone", "a folder now"])
async def test_nothing_is_left_of_an_item_that_is_gone_when_its_task_goes_on(
    quick_path: Path, becomes_folder: bool
) -> None:
    """Not even what the journal had not heard of yet."""

    def die(call: Call) -> int | None:
        if call.operation == "rename":
            raise Crashed
        return None

    engine = Engine(quick_path, items=SINGLE, plan=die)
    (engine.source / "large").write_bytes(b"not so large")
    with pytest.raises(Crashed):
        await engine.run()
    assert engine.temporaries()
    (engine.source / "large").unlink()
    if becomes_folder:
        (engine.source / "large").mkdir()
    after = engine.revived()
    observed = await after.run()
    assert observed.error_code == ("" if becomes_folder else "ITEMS_FAILED")
    assert after.temporaries() == []
