"""Deletes and mirrors that are cancelled or paused in the middle of a folder: they end there, and say what is gone."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.storage.base import Directory
from agent.storage.faulty import Call, fail_nth
from agent.storage.posix import open_root
from agent.transfer.course.progress import Progress
from agent.transfer.deleting import remove
from agent.transfer.deleting.delete import DeleteRun
from agent.transfer.deleting.mirror import Mirror
from agent.transfer.deleting.remove import Removal
from protocol.control import TaskItem, TaskObserved, TaskOptions
from tests.agent.engine_inside import Engine, Line, quick_path

__all__ = ["quick_path"]

FILES = 40


def _engine(base: Path, kind: str) -> Engine:
    if kind == "delete":
        engine = Engine(base, TaskOptions(recursive=True), [TaskItem(source_path="/tree")], type="DELETE")
    else:
        engine = Engine(base, TaskOptions(delete_destination_extra=True))
    (engine.destination / "tree" / "inner").mkdir(parents=True)
    for number in range(FILES // 2):
        (engine.destination / "tree" / str(number)).write_bytes(b"")
        (engine.destination / "tree" / "inner" / str(number)).write_bytes(b"")
    return engine


def _left(engine: Engine) -> int:
    return sum(path.is_file() for path in engine.destination.rglob("*"))


def _stopping(engine: Engine, monkeypatch: pytest.MonkeyPatch, desired: str, nth: int) -> None:
    """Have the task stopped just before the n-th removal of a file, and the thread that removes hear of it."""
    lines: list[Line] = []
    begin, heard = Line.__init__, threading.Event()

    def noting(line: Line, *arguments: Any) -> None:
        begin(line, *arguments)
        lines.append(line)

    monkeypatch.setattr(Line, "__init__", noting)
    kinds: tuple[type[DeleteRun | Mirror], ...] = (DeleteRun, Mirror)
    for kind in kinds:

        def stop(run: DeleteRun | Mirror, stop: Callable[[Any], None] = kind.stop) -> None:
            stop(run)
            heard.set()

        monkeypatch.setattr(kind, "stop", stop)
    token = trio.lowlevel.current_trio_token()

    def plan(call: Call) -> int | None:
        if call.operation == "unlink" and call.nth == nth:
            token.run_sync_soon(lines[-1].want, desired)
            assert heard.wait(10)
        return None

    engine.plan = plan


@pytest.mark.parametrize("kind", ["delete", "mirror"])
async def test_a_cancelled_removal_ends_before_the_next_file(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine = _engine(quick_path, kind)
    _stopping(engine, monkeypatch, "cancel", 5)
    observed = await engine.run()
    assert (observed.state, observed.counters.deleted) == ("CANCELED", 5)
    assert _left(engine) == FILES - 5


@pytest.mark.parametrize("kind", ["delete", "mirror"])
async def test_a_paused_removal_goes_on_and_counts_everything_once(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine = _engine(quick_path, kind)
    _stopping(engine, monkeypatch, "pause", 5)

    async def measure(progress: Progress) -> None:
        progress.rate = 5.0
        await trio.sleep_forever()

    monkeypatch.setattr(Progress, "run", measure)
    observed = await engine.run()
    assert (observed.state, observed.counters.deleted) == ("PAUSED", 5)
    assert observed.rate == 0.0, "nothing moves any more"
    assert _left(engine) == FILES - 5
    observed = await engine.revived().run()
    # Two folders besides.
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", FILES + 2)
    assert not (engine.destination / "tree").exists()


@pytest.mark.parametrize("kind", ["delete", "mirror"])
async def test_a_fault_in_the_middle_does_not_lose_the_count(quick_path: Path, kind: str) -> None:
    engine = _engine(quick_path, kind)
    engine.plan = fail_nth(9, errno.EIO, "unlink")
    observed = await engine.run()
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", FILES + 2)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_wide_folders_are_listed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(remove, "AT_ONCE", at_once)
    for folder in ("tree", "tree/a", "tree/a/b", "tree/c"):
        (tmp_path / folder).mkdir()
        for number in range(7):
            (tmp_path / folder / f"file-{number}").write_bytes(b"")
    with open_root(str(tmp_path)) as root, root.open_directory(()) as top:
        removal = Removal()
        removal.entry(top, top.lstat(b"tree"), recursive=True)
        assert removal.count == 4 + 4 * 7
    assert list(tmp_path.iterdir()) == []


def test_a_listing_that_shows_what_is_gone_does_not_go_on_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server may give an old listing for a while."""
    monkeypatch.setattr(remove, "AT_ONCE", 2)
    (tmp_path / "tree").mkdir()
    for number in range(4):
        (tmp_path / "tree" / str(number)).write_bytes(b"")
    with open_root(str(tmp_path)) as root, root.open_directory(()) as top:
        with top.open_directory(b"tree") as folder:
            stale = list(folder.scan())
            kind: type[Directory] = type(folder)
        monkeypatch.setattr(kind, "scan", lambda _folder, *, reserved=False: iter(stale))
        with pytest.raises(OSError) as caught:
            Removal().entry(top, top.lstat(b"tree"), recursive=True)
    assert caught.value.errno == errno.ENOTEMPTY


@pytest.mark.parametrize("faster", ["by some", "by a listing", "altogether"])
async def test_two_that_remove_one_large_folder_both_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    """Somebody else removes the same entries, those of a listing that was read a moment ago among them."""
    monkeypatch.setattr(remove, "AT_ONCE", 10)
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(95):
        (folder / str(number)).touch()
    with open_root(str(tmp_path)) as root, root.open_directory(()) as parent:

        def other() -> None:
            left = sorted(folder.iterdir())
            if not left or removal.count > 60:
                return
            for path in left if faster == "altogether" else left[: {"by some": 3, "by a listing": 25}[faster]]:
                path.unlink()
            if faster == "altogether":
                folder.rmdir()

        def scanning(self: Any, *, reserved: bool = False) -> Any:
            found = sorted(scan(self, reserved=reserved), key=lambda node: node.name)
            if self.path == (b"large",):
                other()
            return iter(found)

        removal = Removal()
        scan = type(parent).scan
        monkeypatch.setattr(type(parent), "scan", scanning)
        removal.entry(parent, parent.lstat(b"large"), recursive=True)
    assert not folder.exists()


async def test_a_delete_that_goes_on_after_trouble_says_so(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.transfer.course.progress.EVERY", 0.01)
    failed, goes_on = threading.Event(), threading.Event()

    def plan(call: Call) -> int | None:
        if (call.operation, call.nth) == ("unlink", 5):
            failed.set()
            return errno.EIO
        if (call.operation, call.nth) == ("unlink", 20):
            assert goes_on.wait(10)
        return None

    def look(_line: Line, observed: TaskObserved) -> None:
        if failed.is_set() and observed.state == "ACTIVE" and observed.counters.deleted > 4:
            goes_on.set()

    engine = _engine(quick_path, "delete")
    engine.plan, engine.on_report = plan, look
    observed = await engine.run()
    assert (observed.state, _left(engine)) == ("SUCCEEDED", 0)
    assert "IO_ERROR" in engine.codes()


@pytest.mark.parametrize("nth", [1, 5, FILES])
@pytest.mark.parametrize("kind", ["delete", "mirror"])
async def test_a_root_that_is_away_takes_nothing_for_removed(quick_path: Path, kind: str, nth: int) -> None:
    """Where a file server goes by paths, everything in a root that was renamed there is not found, and comes back."""
    engine = _engine(quick_path, kind)
    away = quick_path / "away"

    def plan(call: Call) -> int | None:
        if (call.operation, call.nth) == ("unlink", nth):
            engine.destination.rename(away)
        # Not of what looks at the root itself, or of the books.
        inside = call.operation in ("open_directory", "open_parent", "lstat", "scan", "unlink", "rmdir")
        return errno.ENOENT if inside and away.exists() else None

    def look(_line: Line, observed: TaskObserved) -> None:
        if observed.status_code == "COLLECTION_UNAVAILABLE" and away.exists():
            told.append(observed.counters.deleted)
            away.rename(engine.destination)

    told: list[int] = []
    engine.plan, engine.on_report = plan, look
    observed = await engine.run(10)
    assert told == [nth - 1], "and said so, once"
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", FILES + 2)
    assert not (engine.destination / "tree").exists()
    assert observed.counters.failed == 0
