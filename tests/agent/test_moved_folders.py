"""Folders of the destination that somebody renames, removes or replaces while a task writes into them: what belongs
there arrives there all the same, or the task says that it did not."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agent.storage.faulty import Call
from agent.storage.posix import open_root
from agent.transfer.basis.jobs import Counts, FileJob, Group
from agent.transfer.books.counted import add_counts, keep_counted, uncount
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter
from agent.transfer.books.record import FolderMoved, Record
from agent.transfer.planning import items
from protocol.control import Counters, TaskItem
from protocol.session import FILE, Row
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path, skipped, tree

__all__ = ["quick_path"]

MIB = 1024 * 1024
FILES = ["a/one", "a/two", "a/deep/three", "a/deep/er/four", "b/five"]


def source(engine: Engine) -> None:
    tree(engine.source, FILES)
    (engine.source / "a" / "large").write_bytes(os.urandom(3 * MIB))


def taken_from_its_place(folder: Path, how: str) -> None:
    if how == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(folder.parent / "elsewhere")
    if how == "replaced":
        folder.mkdir()
        (folder / "of-somebody").write_bytes(b"stays")


def at(engine: Engine, operation: str, name: bytes, what: Callable[[], object], *, times: int = 1) -> None:
    """Have something done just before a call of the destination."""
    left = times

    def plan(call: Call) -> int | None:
        nonlocal left
        if left and (call.operation, call.name) == (operation, name):
            left -= 1
            what()
        return None

    engine.plan = plan


@pytest.mark.parametrize("file", ["one", "large", "three"])
@pytest.mark.parametrize("how", ["renamed", "removed", "replaced", "linked"])
async def test_a_folder_that_leaves_its_place_gets_everything_once_more(quick_path: Path, file: str, how: str) -> None:
    engine = Engine(quick_path)
    source(engine)
    place = engine.destination / "a"

    def move() -> None:
        taken_from_its_place(place, how)
        if how == "linked":
            (engine.destination / "inside").mkdir()
            place.symlink_to("inside")

    at(engine, "rename", file.encode(), move)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert "FOLDER_MOVED" in engine.codes() or how == "removed", engine.codes()
    for name in FILES:
        assert (engine.destination / name).read_bytes() == (engine.source / name).read_bytes(), name
    assert (place / "large").read_bytes() == (engine.source / "a" / "large").read_bytes()
    assert how != "replaced" or (place / "of-somebody").read_bytes() == b"stays"
    assert not list(place.rglob(".towpath.*"))
    counters = observed.counters
    assert (counters.failed, counters.bytes_transferred) == (0, counters.bytes_total)
    print(f"{how} before {file}: {engine.codes()}, {counters.files_transferred} files counted")


async def test_a_folder_of_items_that_leaves_its_place_gets_them_once_more(quick_path: Path) -> None:
    items = [TaskItem(source_path=f"/{name}", destination_path=f"/to/{name}") for name in FILES]
    engine = Engine(quick_path, items=items)
    source(engine)
    at(engine, "rename", b"one", lambda: (engine.destination / "to").rename(engine.destination / "elsewhere"))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert "FOLDER_MOVED" in engine.codes()
    assert not any(report.needs_person for report in engine.reports)
    for name in FILES:
        assert (engine.destination / "to" / name).read_bytes() == (engine.source / name).read_bytes(), name
    counters, total = observed.counters, sum((engine.source / name).stat().st_size for name in FILES)
    assert (counters.files, counters.files_transferred) == (len(FILES), len(FILES))
    assert (counters.bytes_total, counters.bytes_transferred) == (total, total)


async def test_a_link_out_of_the_collection_in_a_folders_place_gets_nothing(quick_path: Path) -> None:
    engine = Engine(quick_path)
    source(engine)
    outside = quick_path / "outside"
    outside.mkdir()

    def move() -> None:
        (engine.destination / "a").rename(engine.destination / "elsewhere")
        (engine.destination / "a").symlink_to(outside)

    at(engine, "rename", b"one", move)
    observed = await engine.run()
    assert observed.state == "FAILED", observed
    assert set(skipped(engine).values()) == {"PERMISSION_DENIED"}
    assert list(outside.iterdir()) == []


async def test_a_folder_that_is_moved_again_and_again_ends_the_task(quick_path: Path) -> None:
    engine = Engine(quick_path)
    source(engine)
    serial = iter(range(100))

    def move() -> None:
        (engine.destination / "a").rename(engine.destination / f"elsewhere-{next(serial)}")

    at(engine, "rename", b"one", move, times=100)
    observed = await engine.run()
    assert (observed.state, observed.error_code) == ("FAILED", "FOLDER_MOVED")
    assert len(list(engine.destination.glob("elsewhere-*"))) == 5


async def test_what_is_moved_when_it_is_whole_is_nobodys_affair(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program does that takes away what has arrived."""
    engine = Engine(quick_path)
    tree(engine.source, ["a/one", "b/two"])
    fold = Record._fold

    def folding(record: Record, group: Group) -> None:
        fold(record, group)
        if group.destination == b"a":
            (engine.destination / "a").rename(quick_path / "taken")

    monkeypatch.setattr(Record, "_fold", folding)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED"
    assert "FOLDER_MOVED" not in engine.codes()
    assert (quick_path / "taken" / "one").exists()
    assert not (engine.destination / "a").exists()


async def test_a_crash_after_the_move_forgets_nothing(quick_path: Path) -> None:
    engine = Engine(quick_path)
    source(engine)
    moved = False

    def plan(call: Call) -> int | None:
        nonlocal moved
        if not moved and (call.operation, call.name) == ("rename", b"one"):
            moved = True
            (engine.destination / "a").rename(engine.destination / "elsewhere")
        elif "FOLDER_MOVED" in engine.codes() and call.operation == "make_directories":
            raise Crashed
        return None

    engine.plan = plan
    with pytest.raises(Crashed):
        await engine.run()
    after = engine.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    for name in FILES:
        assert (engine.destination / name).read_bytes() == (engine.source / name).read_bytes(), name
    assert contents(engine.destination)["a/large"] == (engine.source / "a" / "large").read_bytes()


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
async def test_what_was_settled_in_a_folder_that_is_gone_in_the_next_run_comes_again(
    quick_path: Path, how: str
) -> None:
    engine = Engine(quick_path)
    source(engine)
    named: set[bytes] = set()
    durable = False

    def plan(call: Call) -> int | None:
        nonlocal durable
        if durable:
            raise Crashed
        # The large file is not done while the small ones come into the books.
        if (call.operation, call.name) == ("rename", b"large"):
            return errno.EBUSY
        named.update([call.name] if call.operation == "rename" else [])
        durable = {b"one", b"two"} <= named and call.operation == "journal_commit"
        return None

    engine.plan = plan
    with pytest.raises(Crashed):
        await engine.run()
    place = engine.destination / "a"
    taken_from_its_place(place, how)
    observed = await engine.revived().run()
    assert observed.state == "SUCCEEDED", observed
    for name in FILES:
        if not name.startswith("a/deep"):
            assert (engine.destination / name).read_bytes() == (engine.source / name).read_bytes(), name
    total = sum((engine.source / name).stat().st_size for name in [*FILES, "a/large"])
    assert (observed.counters.bytes_total, observed.counters.bytes_transferred) == (total, total)


@pytest.mark.parametrize("at_once", [250, 2], ids=["unfinished", "some done"])
@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
async def test_items_that_were_settled_in_a_folder_that_is_gone_in_the_next_run_come_again(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, at_once: int
) -> None:
    """Also those that nothing was left to do about, in a folder to which some of the task still come; and nothing of
    what failed comes twice, nor anything of a folder that was whole."""
    monkeypatch.setattr(items, "ITEMS_AT_ONCE", at_once)
    names = ["whole/0", "to/1", "to/missing", "to/2", "to/3", "to/4", "to/5"]
    engine = Engine(
        quick_path,
        items=[TaskItem(source_path=f"/{name}", destination_path=f"/{name}", recursive=False) for name in names],
    )
    tree(engine.source, [name for name in names if "missing" not in name])

    def durable() -> bool:
        with closing(sqlite3.connect(engine.state / "journal.sqlite")) as journal:
            done = {index for (index,) in journal.execute("SELECT id FROM items")}
            settled = {-1 - directory for (directory,) in journal.execute("SELECT directory FROM finished")}
        return 0 in done and done | settled >= set(range(6)) and done >= (set() if at_once == 250 else set(range(6)))

    def plan(call: Call) -> int | None:
        if (call.operation, call.name) == ("rename", b"5"):
            if durable():
                raise Crashed
            return errno.EBUSY
        return None

    engine.plan = plan
    with pytest.raises(Crashed):
        await engine.run()
    place = engine.destination / "to"
    taken_from_its_place(place, how)
    (engine.destination / "whole" / "0").rename(quick_path / "taken")
    after = engine.revived()
    observed = await after.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1), observed
    assert skipped(after) == {"to/missing": "FILE_NOT_FOUND"}
    for name in names[1:]:
        if "missing" not in name:
            assert (engine.destination / name).read_bytes() == (engine.source / name).read_bytes(), name
    assert not (engine.destination / "whole" / "0").exists()
    # One that was left in the old folder went with it.
    assert not list(place.rglob(".towpath.*"))
    counters, total = (
        observed.counters,
        sum((engine.source / name).stat().st_size for name in names if "miss" not in name),
    )
    assert (counters.files, counters.files_transferred, counters.files_skipped) == (6, 6, 0)
    assert (counters.bytes_total, counters.bytes_transferred, counters.bytes_checksummed) == (total, total, total)


def test_what_was_settled_in_folders_that_left_their_places_counts_no_more_and_all_else_does(quick_path: Path) -> None:
    """Two of them are noticed at once, and files of a third folder come into the books with theirs."""
    (quick_path / "root").mkdir()
    root, journal = open_root(str(quick_path / "root")), Journal(quick_path / "journal")
    manifests = ManifestWriter(quick_path / "transferred", 0), ManifestWriter(quick_path / "skipped", 0)
    record = Record(journal, manifests, verify=False, now=lambda: "", probe=lambda: b".towpath.probe")
    names = [b"one", b"two", b"stays", b"not done"]
    journal.add_directories((0, name, name, 0, []) for name in names)
    groups = [
        Group(number, name, name, root.make_directories((name,)), [], planned=2 if name == b"not done" else 1)
        for number, name in enumerate(names, 1)
    ]
    jobs = [FileJob(group, 0, Row(b"file", FILE, 1000, 0, 0, 1, 1, 0o644), b"file", b"file", False) for group in groups]
    for name in ("one", "two"):
        (quick_path / "root" / name).rename(quick_path / "root" / f"{name}-elsewhere")
    with pytest.raises(FolderMoved, match=r"^/one/ was renamed") as moved:
        record.settled([(job, None) for job in jobs], [], [], [], groups)
    assert [group.folded for group in groups] == [False, False, True, False]
    assert journal.moved() == [b"one", b"two"]
    assert record.settled_bytes == int(journal.get("settled") or b"") == 4000
    record.forget_below(moved.value.folders, groups)
    assert record.settled_bytes == int(journal.get("settled") or b"") == 2000
    for group in groups:
        group.handle.close()
    for manifest in manifests:
        manifest.close()
    journal.close()
    root.close()


def test_an_item_counts_once_however_often_it_comes_again(quick_path: Path) -> None:
    with closing(Journal(quick_path / "journal")) as journal:
        first = {
            index: Counts(files=1, bytes_total=10, files_transferred=1, bytes_transferred=10) for index in (0, 3, 5)
        }
        journal.put_counters(add_counts(Counters(deleted=7), list(first.values())))
        journal.put_settled(30)
        keep_counted(journal, first)
        uncount(journal, [])
        uncount(journal, [0, 4])
        uncount(journal, [0])
        assert journal.counters() == Counters(
            files=2, bytes_total=20, files_transferred=2, bytes_transferred=20, deleted=7
        )
        assert journal.settled() == 20
        again = {0: Counts(files=1, bytes_total=99, skipped_errors=1)}
        journal.put_counters(add_counts(journal.counters(), list(again.values())))
        keep_counted(journal, again)
        uncount(journal, [5, 0, 3])
        assert (journal.counters(), journal.settled()) == (Counters(deleted=7), 0)
        keep_counted(journal, first)
        journal.start_over()
        journal.put_counters(Counters(files=9))
        uncount(journal, [0, 3, 5])
        assert journal.counters() == Counters(files=9)
