"""Files that somebody moves from one folder of the source to another one while both are listed: nothing of them is
missing, and no mirror deletes what the source has."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from agent.storage.access_lists import AccessList
from agent.storage.faulty import Call
from agent.storage.posix import open_root
from agent.transfer.planning import items, second_look
from agent.transfer.planning.second_look import LOOKS, SecondLook
from agent.transfer.source import serve, source_rows
from protocol import session
from protocol.control import TaskItem, TaskOptions
from tests.agent.access_list_scene import give
from tests.agent.engine_inside import CHECKED, Crashed, Engine, contents, quick_path, skipped, tree
from tests.agent.folding_root import FoldingRoot

__all__ = ["quick_path"]

MIRROR = msgspec.structs.replace(CHECKED, delete_destination_extra=True)
FILES = [f"{folder}/{name}" for folder in ("a", "b") for name in ("one", "two")]


class Mover:
    """When the second of two folders is about to be listed, does something with it and the one that was listed."""

    def __init__(self, engine: Engine, move: Callable[[Path, Path], None], *, times: int = 1) -> None:
        self._engine, self._move, self._left = engine, move, times
        self._seen: list[bytes] = []
        self.listings = 0

    def plan(self, call: Call) -> int | None:
        if call.operation == "open_directory" and call.name in (b"a", b"b"):
            self.listings += 1
            self._seen.append(call.name)
            if len(self._seen) == 2:
                first, second = (self._engine.source / name.decode() for name in self._seen)
                self._seen = [self._seen[1]]
                if first != second and self._left:
                    self._left -= 1
                    self._move(second, first)
        return None


def engine_with(base: Path, move: Callable[[Path, Path], None], options: TaskOptions, *, times: int = 1) -> Engine:
    engine = Engine(base, options)
    tree(engine.source, FILES)
    engine.source_plan = Mover(engine, move, times=times).plan
    return engine


def move_file(second: Path, first: Path) -> None:
    (second / "one").rename(first / "moved")


@pytest.mark.parametrize("options", [CHECKED, MIRROR], ids=["copy", "mirror"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "was there"])
async def test_a_file_that_is_moved_into_a_folder_that_was_listed_arrives(
    quick_path: Path, options: TaskOptions, *, there: bool
) -> None:
    engine = engine_with(quick_path, move_file, options)
    if there:
        # As the run before has left it: a mirror has the file where it was.
        tree(engine.destination, FILES)
        tree(engine.destination, ["a/extra"])
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    found, wanted = contents(engine.destination), contents(engine.source)
    assert wanted.keys() <= found.keys()
    assert {name: found[name] for name in wanted} == wanted
    if options is MIRROR:
        assert found == wanted
    counters = observed.counters
    total = sum(len(content) for content in wanted.values() if content != "folder")
    assert (counters.files, counters.files_transferred, counters.directories) == (4, 4, 3)
    assert (counters.bytes_total, counters.bytes_transferred) == (total, total)
    assert engine.sessions == 2
    assert not engine.temporaries()


async def test_a_source_that_cannot_say_for_a_moment_whether_a_folder_changed_is_asked_again(quick_path: Path) -> None:
    """Else the folder would pass for one that did not, and the mirror delete what it has of the file."""
    engine = engine_with(quick_path, move_file, MIRROR)
    tree(engine.destination, FILES)
    mover = Mover(engine, move_file)
    faults: list[bytes] = []

    def plan(call: Call) -> int | None:
        if call.operation == "stat" and call.name in (b"a", b"b") and mover.listings >= 2 and len(faults) < 2:
            faults.append(call.name)
            return errno.EIO
        return mover.plan(call)

    engine.source_plan = plan
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert sorted(faults) == [b"a", b"b"]
    assert contents(engine.destination) == contents(engine.source)
    assert engine.codes().count("IO_ERROR") == 1


async def test_a_folder_that_is_moved_arrives_with_all_that_is_in_it(quick_path: Path) -> None:
    def move(second: Path, first: Path) -> None:
        (second / "inner").rename(first / "inner")

    engine = engine_with(quick_path, move, MIRROR)
    tree(engine.source, ["a/inner/deep/file", "b/inner/deep/file"])
    for name in ("a", "b"):
        (engine.source / name / "inner").rename(engine.source / name / f"inner-{name}")

    def move_own(second: Path, first: Path) -> None:
        (second / f"inner-{second.name}").rename(first / "moved")

    engine.source_plan = Mover(engine, move_own).plan
    tree(engine.destination, ["a/inner-a/deep/file", "b/inner-b/deep/file"])
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


async def test_what_failed_is_neither_tried_nor_counted_once_more(quick_path: Path) -> None:
    options = msgspec.structs.replace(MIRROR, recursive_symlinks="copy")

    def move(second: Path, first: Path) -> None:
        (second / "one").rename(first / "moved")

    engine = engine_with(quick_path, move, options)
    for name in ("a", "b"):
        (engine.source / name / "broken").symlink_to("nowhere")
        (engine.source / name / "loop").symlink_to("loop")
    observed = await engine.run()
    failed = skipped(engine)
    assert observed.counters.failed + observed.counters.skipped_errors == len(failed)
    assert (engine.destination / "a" / "moved").exists() or (engine.destination / "b" / "moved").exists()


async def test_a_folder_that_failed_is_neither_tried_nor_counted_once_more(quick_path: Path) -> None:
    engine = engine_with(quick_path, move_file, CHECKED)
    for name in ("a", "b"):
        tree(engine.source, [f"{name}/inner/file"])
        # A file has its place.
        tree(engine.destination, [f"{name}/inner"])
    observed = await engine.run()
    assert engine.sessions == 2
    assert (observed.state, observed.counters.failed) == ("FAILED", 2), observed
    assert skipped(engine) == {"a/inner": "NOT_A_DIRECTORY", "b/inner": "NOT_A_DIRECTORY"}
    assert sum((engine.destination / name / "moved").exists() for name in ("a", "b")) == 1


async def test_links_that_are_left_out_are_counted_once(quick_path: Path) -> None:
    engine = engine_with(quick_path, move_file, msgspec.structs.replace(CHECKED, recursive_symlinks="ignore"))
    for name in ("a", "b"):
        (engine.source / name / "link").symlink_to("two")
    observed = await engine.run()
    assert engine.sessions == 2
    assert (observed.state, observed.counters.symlinks) == ("SUCCEEDED", 2), observed


async def test_a_source_that_never_rests_is_not_followed_for_ever(quick_path: Path) -> None:
    """A file goes back and forth at every listing; the task ends, and a mirror as well."""

    def swap(second: Path, first: Path) -> None:
        (second / "one").rename(first / "one-from-there")
        (first / "one-from-there").rename(first / "one")

    engine = engine_with(quick_path, swap, MIRROR, times=1000)
    observed = await engine.run()
    assert observed.state in ("SUCCEEDED", "FAILED"), observed
    assert engine.sessions <= 1 + LOOKS


async def test_a_source_at_rest_is_not_asked_again(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[session.StatPaths] = []

    def counted(control: serve.Control, request: session.StatPaths) -> list[session.StatResult]:
        asked.append(request)
        return stat_all(control, request)

    stat_all = serve.Control._stat_all
    monkeypatch.setattr(serve.Control, "_stat_all", counted)
    # As if the tree had been made long ago.
    monkeypatch.setattr(source_rows, "CLOCK_TICK", -(10**12))
    monkeypatch.setattr(source_rows, "OTHER_CLOCKS", -(10**12))
    engine = Engine(quick_path, MIRROR)
    tree(engine.source, FILES)
    observed = await engine.run()
    assert (observed.state, engine.sessions, len(asked)) == ("SUCCEEDED", 1, 1)
    asked.clear()
    monkeypatch.setattr(source_rows, "CLOCK_TICK", 10**12)
    monkeypatch.setattr(source_rows, "OTHER_CLOCKS", 10**12)
    again = Engine(quick_path / "again", MIRROR)
    tree(again.source, FILES)
    assert (await again.run()).state == "SUCCEEDED"
    assert (again.sessions, len(asked)) == (1, 2)


async def test_a_crash_while_folders_are_listed_again_loses_nothing(quick_path: Path) -> None:
    for nth in range(1, 40):
        base = quick_path / str(nth)
        engine = engine_with(base, move_file, MIRROR)
        tree(engine.destination, FILES)
        after, crashed = engine, False
        steps = itertools.count(1)

        def plan(call: Call, nth: int = nth, engine: Engine = engine, steps: Iterator[int] = steps) -> int | None:
            durable = call.operation in ("rename", "journal_commit", "unlink", "lstat")
            if engine.sessions == 2 and durable and next(steps) == nth:
                raise Crashed
            return None

        engine.plan = plan
        try:
            observed = await engine.run()
        except Crashed:
            crashed = True
            after = engine.revived()
            observed = await after.run()
        assert observed.state == "SUCCEEDED", observed
        assert contents(after.destination) == contents(engine.source)
        # One that had just been given its name, and was not in the books yet, counts among what is there already.
        assert observed.counters.files in ((3, 4) if crashed else (4,))
        if not crashed:
            assert nth > 3
            return
    raise AssertionError("it never came to its end")


async def test_single_items_are_not_listed(quick_path: Path) -> None:
    engine = Engine(quick_path, items=[TaskItem(source_path="/a/one", destination_path="/one")])
    tree(engine.source, FILES)
    assert (await engine.run()).state == "SUCCEEDED"
    assert engine.sessions == 1


@pytest.fixture
def long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder says that it changed lately."""
    monkeypatch.setattr(source_rows, "CLOCK_TICK", -(10**12))
    monkeypatch.setattr(source_rows, "OTHER_CLOCKS", -(10**12))


@pytest.fixture
def just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder says that it did."""
    monkeypatch.setattr(source_rows, "CLOCK_TICK", 10**12)


def moved_at_the_end(monkeypatch: pytest.MonkeyPatch, move: Callable[[], object]) -> None:
    """Do something at the source when all has arrived."""
    look = SecondLook.look
    moved: list[object] = []

    async def moved_before(self: SecondLook) -> bool:
        if not moved:
            moved.append(move())
        return await look(self)

    monkeypatch.setattr(SecondLook, "look", moved_before)


async def test_what_is_moved_to_a_name_that_a_mirror_had_before_is_compared(quick_path: Path) -> None:
    """Else the old file would stay there, and what the mirror has of the moved one be deleted."""
    engine = engine_with(quick_path, move_file, MIRROR)
    tree(engine.destination, [*FILES, "a/moved", "b/moved"])
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)


@pytest.mark.usefixtures("long_ago")
async def test_what_is_moved_before_a_mirror_deletes_is_not_deleted(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(quick_path, MIRROR)
    tree(engine.source, FILES)
    tree(engine.destination, [*FILES, "a/moved"])
    moved_at_the_end(monkeypatch, lambda: (engine.source / "b/one").rename(engine.source / "a/moved"))
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)


@pytest.mark.usefixtures("long_ago")
async def test_a_mirror_deletes_nothing_in_folders_that_changed_and_are_not_listed_any_more(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_look, "LOOKS", 0)
    engine = Engine(quick_path, MIRROR)
    tree(engine.source, FILES)
    tree(engine.destination, [*FILES, "a/moved", "extra"])
    moved_at_the_end(monkeypatch, lambda: (engine.source / "b/one").rename(engine.source / "a/moved"))
    assert (await engine.run()).state == "SUCCEEDED"
    assert set(contents(engine.destination)) == {*FILES, "a", "b", "a/moved"}
    assert (engine.sessions, engine.codes().count("EXTRA_NOT_DELETED")) == (1, 1)


@pytest.mark.usefixtures("long_ago")
async def test_what_is_moved_before_it_is_read_arrives_under_its_new_name(quick_path: Path) -> None:
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, skip_source_errors=True))
    tree(engine.source, FILES)
    moved: list[bytes] = []

    def plan(call: Call) -> int | None:
        if call.operation == "open_read" and not moved:
            moved.append(call.name)
            (engine.source / "a/two").rename(engine.source / "b/from-a")
            (engine.source / "b/two").rename(engine.source / "a/from-b")
        return None

    engine.source_plan = plan
    assert (await engine.run()).state == "SUCCEEDED"
    assert {"content of a/two", "content of b/two"} <= {path.read_text() for path in engine.destination.glob("*/*")}


async def test_a_folder_that_could_not_be_listed_counts_once(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(quick_path, CHECKED)
    tree(engine.source, FILES)
    refuse = ("open_directory", b"b")
    engine.source_plan = lambda call: errno.EACCES if (call.operation, call.name) == refuse else None
    moved_at_the_end(monkeypatch, lambda: tree(engine.source, ["a/three", "b/three"]))
    observed = await engine.run()
    assert (observed.state, observed.counters.failed, engine.sessions) == ("FAILED", 1, 2)
    assert (engine.destination / "a/three").exists()


async def test_a_folder_that_cannot_be_listed_again_is_an_error(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved into it is missing, and nothing of it is deleted."""
    engine = Engine(quick_path, MIRROR)
    tree(engine.source, FILES)
    tree(engine.destination, [*FILES, "b/three"])
    moved_at_the_end(monkeypatch, lambda: (engine.source / "a/one").rename(engine.source / "b/three"))
    refuse = ("open_directory", b"b")
    engine.source_plan = lambda call: (
        errno.EACCES if engine.sessions == 2 and (call.operation, call.name) == refuse else None
    )
    observed = await engine.run()
    assert (observed.state, observed.counters.failed, engine.sessions) == ("FAILED", 1, 2)
    assert (engine.destination / "b/three").exists()


async def test_what_is_moved_beside_a_name_that_is_the_same_here_fails(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(quick_path, MIRROR, wrap=FoldingRoot.around)
    tree(engine.source, FILES)
    moved_at_the_end(monkeypatch, lambda: (engine.source / "b/one").rename(engine.source / "a/TWO"))
    assert (await engine.run()).state == "FAILED"
    assert skipped(engine) == {"a/TWO": "NAME_COLLISION"}
    assert (engine.destination / "a/two").read_text() == "content of a/two"


async def test_what_is_moved_between_a_list_asked_for_ahead_and_the_look_at_its_folder_arrives(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's time is then one of after the move."""
    monkeypatch.setattr(items, "LISTED_AHEAD", 1)
    pairs = [TaskItem(source_path=f"/{name}", destination_path=f"/{name}", recursive=True) for name in ("a", "b")]
    engine = Engine(quick_path, MIRROR, pairs)
    tree(engine.source, FILES)
    tree(engine.destination, [*FILES, "a/moved"])
    listed = threading.Event()
    stat_all, message = serve.Control._stat_all, source_rows.Listing.message

    def listing(self: source_rows.Listing) -> bytes:
        answer = message(self)
        listed.set()
        return answer

    def stat(control: serve.Control, request: session.StatPaths | session.TakePaths) -> list[session.StatResult]:
        assert listed.wait(10)
        if (engine.source / "b/one").exists():
            (engine.source / "b/one").rename(engine.source / "a/moved")
        return stat_all(control, request)

    monkeypatch.setattr(serve.Control, "_stat_all", stat)
    monkeypatch.setattr(source_rows.Listing, "message", listing)
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)


@pytest.mark.usefixtures("just_now")
@pytest.mark.parametrize("links", ["ignore", "copy"])
async def test_folders_that_change_their_places_are_told_apart_though_they_have_one_time(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, links: Literal["ignore", "copy"]
) -> None:
    engine = Engine(quick_path, msgspec.structs.replace(MIRROR, recursive_symlinks=links))
    tree(engine.source, ["new/in/one", "old/in/two"])
    for path in [*engine.source.rglob("in"), engine.source / "new", engine.source / "old"]:
        os.utime(path, (1_600_000_000, 1_600_000_000))

    def swap() -> None:
        (engine.source / "new").rename(quick_path / "aside")
        (engine.source / "old").rename(engine.source / "new")
        (quick_path / "aside").rename(engine.source / "old")

    moved_at_the_end(monkeypatch, swap)
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination).items() >= contents(engine.source).items()
    assert engine.sessions == 2


@pytest.mark.usefixtures("just_now")
async def test_a_link_that_is_put_where_another_one_was_arrives(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(quick_path, MIRROR)
    tree(engine.source, FILES)
    for folder in ("a", "b"):
        (engine.source / folder / "link").symlink_to(f"from {folder}")
    moved_at_the_end(monkeypatch, lambda: (engine.source / "b/link").rename(engine.source / "a/link"))
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)


@pytest.mark.usefixtures("just_now")
async def test_access_lists_of_folders_that_are_listed_again_count_once(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, preserve_acls=True))
    tree(engine.source, FILES)
    for name in ("a", "b"):
        give(engine.source / name, AccessList(7, 5, 0, mask=5))
    moved_at_the_end(monkeypatch, lambda: (engine.source / "b/one").rename(engine.source / "a/moved"))
    observed = await engine.run()
    assert (observed.state, engine.sessions, observed.counters.acls_kept) == ("SUCCEEDED", 2, 2), observed


async def test_a_clock_that_is_set_back_hides_no_change(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SetBack()
    monkeypatch.setattr(source_rows, "time", clock)

    def move(second: Path, first: Path) -> None:
        clock.ahead = 0
        move_file(second, first)

    engine = engine_with(quick_path, move, CHECKED)
    assert (await engine.run()).state == "SUCCEEDED"
    assert clock.ahead == 0
    assert contents(engine.destination) == contents(engine.source)


class SetBack:
    """The times of a machine whose clock is an hour ahead until somebody sets it back."""

    ahead = 3600 * 10**9

    def time_ns(self) -> int:
        return time.time_ns() + self.ahead

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()


def test_a_folder_whose_time_is_told_in_whole_seconds_may_have_changed_since(quick_path: Path) -> None:
    with open_root(str(quick_path)) as root:
        listing = source_rows.Listing(root, (), session.ListDirectory(1, b""), source_rows.SessionBegin())
        second = time.time_ns() // 10**9 * 10**9
        assert listing._is_recent(second)
        assert not listing._is_recent(second - 10**9 + 1)
