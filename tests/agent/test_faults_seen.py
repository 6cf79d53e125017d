"""Faults as users meet them in a running task: each has an event, a status, a sentence, somebody who can mend it; and
the task goes on by itself when it is mended."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.storage.base import Root
from agent.storage.faulty import Call, FaultyRoot
from agent.storage.mounts import Mark
from agent.storage.posix import open_root
from agent.transfer.basis import patience
from agent.transfer.books.manifest import SkippedRow, read_page
from protocol.control import TaskObserved, TaskOptions
from protocol.errors import NeedsPerson, RetryLater, TowpathError
from protocol.session import MAX_PACK_FILES
from protocol.ticket import TICKET_EXPIRED
from tests.agent import engine_inside
from tests.agent.engine_inside import Engine, Line, contents, quick_path, skipped
from tests.agent.seen_trouble import Seen
from tests.agent.small_disks import Disk, needs_root, unmounting

__all__ = ["quick_path"]

MIB = 1024 * 1024


def failing(operation: str, code: int, broken: list[bool]) -> Callable[[Call], int | None]:
    return lambda call: code if call.operation == operation and broken[0] else None


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (errno.EDQUOT, "QUOTA_EXCEEDED", "quota is used up"),
        (errno.ENOSPC, "NO_SPACE", "disk is full"),
        *([(errno.EKEYEXPIRED, "COLLECTION_UNAVAILABLE", "has expired")] if hasattr(errno, "EKEYEXPIRED") else []),
    ],
)
@pytest.mark.parametrize("operation", ["pwrite", "fsync", "create_temporary", "mkdir"])
async def test_what_a_person_mends_is_waited_for(
    quick_path: Path, operation: str, code: int, name: str, words: str
) -> None:
    broken = [True]
    seen = Seen(name, lambda: broken.__setitem__(0, False))
    engine = Engine(quick_path, plan=failing(operation, code, broken), on_report=seen)
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"content")
    (engine.source / "large").write_bytes(os.urandom(2 * MIB))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    seen.check(engine, "destination owner", words)
    assert engine.temporaries() == []


@pytest.mark.parametrize("side", ["destination", "source"])
@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (errno.ESTALE, "STALE_HANDLE", "changed on the file server"),
        (errno.ETIMEDOUT, "TIMEOUT", "did not answer in time"),
        (errno.EBUSY, "BUSY", "is in use"),
        (errno.EIO, "IO_ERROR", "reported a fault"),
    ],
)
async def test_what_passes_is_told_and_tried_again(
    quick_path: Path, side: str, code: int, name: str, words: str
) -> None:
    left = [3]
    operation = "open_read" if side == "source" else "create_temporary"

    def plan(call: Call) -> int | None:
        if call.operation == operation and left[0]:
            left[0] -= 1
            return code
        return None

    engine = Engine(quick_path)
    if side == "source":
        engine.source_plan = plan
    else:
        engine.plan = plan
    (engine.source / "file").write_bytes(b"content")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == {"file": b"content"}
    told = [event for event in engine.events if event.code == name]
    assert len(told) == 3
    assert all(event.is_error and words in event.details and side in event.details for event in told)
    # What is left of its budget is visible.
    for attempt, event in enumerate(told, 1):
        assert f"Attempt {attempt} of {patience.ATTEMPTS[name]}." in event.details


@pytest.mark.parametrize(
    ("code", "name", "who"),
    [
        (errno.EACCES, "PERMISSION_DENIED", "destination owner"),
        (errno.EROFS, "READ_ONLY", "destination owner"),
        (errno.EILSEQ, "ILLEGAL_NAME", ""),
        (errno.ENAMETOOLONG, "ILLEGAL_NAME", ""),
        (errno.EFBIG, "TOO_LARGE", ""),
    ],
)
async def test_what_lasts_is_listed_and_costs_nothing_else(quick_path: Path, code: int, name: str, who: str) -> None:
    engine = Engine(quick_path, plan=lambda call: code if call.operation == "rename" and call.name == b"bad" else None)
    for file in ("bad", "good"):
        (engine.source / file).write_bytes(b"content")
    observed = await engine.run()
    assert (observed.state, observed.error_code, observed.counters.failed) == ("FAILED", "ITEMS_FAILED", 1)
    assert contents(engine.destination) == {"good": b"content"}
    (row,) = read_page(engine.state / "skipped.manifest", SkippedRow, None, 10, complete=True).rows
    assert (row.source, row.code) == (b"bad", name)
    (event,) = (event for event in engine.events if event.code == name)
    assert "bad" in event.details
    assert who in event.details
    assert engine.temporaries() == []


# --- the other side --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, 240])
async def test_very_many_files_that_may_not_be_read_are_all_listed(quick_path: Path, length: int) -> None:
    """Of long names, the reasons of one pack together were more than a frame may say, and the task began anew without
    end."""
    folder = quick_path / "source" / ("folder-" + "a" * length) / ("b" * length)
    folder.mkdir(parents=True)
    for number in range(MAX_PACK_FILES):
        (folder / ("c" * (length - 5) + f"{number:05}")).touch()
    engine = Engine(quick_path, source_plan=failing("open_read", errno.EACCES, [True]))
    observed = await engine.run()
    assert (observed.error_code, observed.counters.failed) == ("ITEMS_FAILED", MAX_PACK_FILES)
    assert set(skipped(engine).values()) == {"PERMISSION_DENIED"}


@pytest.mark.parametrize("size", [2 * MIB, 100], ids=["ranges", "packs"])
async def test_a_ticket_that_ran_out_is_no_files_fault(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """However long the relay takes with a new one: more refusals than any file has attempts. Of packs only what is
    asked for their content is refused, once for a folder that the ticket covers."""
    refused: list[int] = []
    covered: list[object] = []

    def covers(_: object, folder: object) -> bool:
        covered.append(folder)
        return True

    def check(_: object, path: object, *__: object) -> None:
        of_a_pack = path in covered
        covered.clear()
        if begun and len(refused) < 30 and (of_a_pack or size > MIB):
            refused.append(1)
            raise RetryLater("The ticket of the session has run out; the relay renews it.", code=TICKET_EXPIRED)

    begun: list[int] = []
    monkeypatch.setattr(engine_inside.OpenPolicy, "check", check)
    monkeypatch.setattr(engine_inside.OpenPolicy, "covers", covers)
    engine = Engine(quick_path, source_plan=lambda call: begun.append(1) if call.operation == "scan" else None)
    for number in range(5):
        (engine.source / str(number)).write_bytes(os.urandom(size))
    observed = await engine.run()
    assert len(refused) == 30
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    held = [report for report in engine.reports if report.status_code == TICKET_EXPIRED]
    assert all(report.state == "WAITING" and "the relay renews it" in report.status_sentence for report in held)
    assert TICKET_EXPIRED in engine.codes()


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (RetryLater("The other agent is not connected.", code="GC_NOT_CONNECTED"), ""),
        (
            NeedsPerson("The collection's folder is not mounted.", code="COLLECTION_UNAVAILABLE", who="source owner"),
            "source owner",
        ),
    ],
    ids=["peer gone", "source gone"],
)
async def test_a_source_that_is_gone_is_waited_for(quick_path: Path, error: TowpathError, who: str) -> None:
    mended: list[int] = []

    def session(number: int) -> None:
        if not mended:
            raise error

    def look(_line: Line, observed: TaskObserved) -> None:
        if observed.status_code == error.code and not mended and engine.sessions > 4:
            assert (observed.state, observed.who, observed.status_sentence) == ("WAITING", who, error.sentence)
            mended.append(1)

    engine = Engine(quick_path, on_session=session, on_report=look)
    for number in range(10):
        (engine.source / str(number)).write_bytes(b"content")
    observed = await engine.run()
    assert mended
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    (event, *_) = (event for event in engine.events if event.code == error.code)
    assert event.is_error
    assert error.sentence in event.details


# --- real disks ------------------------------------------------------------------------------------------


class Marked(Engine):
    """An engine that knows its destination by a mark, as the worker does."""

    mark: Mark | None = None

    def open_destination(self) -> Root:
        return FaultyRoot(open_root(str(self.destination), self.mark), self._planned)


def accept(place: Path) -> Mark:
    with open_root(str(place)) as root:
        return root.place_marker()


@needs_root
@pytest.mark.parametrize("other", [True, False], ids=["replaced", "lost"])
async def test_a_disk_that_is_taken_away_in_the_middle_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, other: bool
) -> None:
    """Taken away while files arrive, with another disk or none in its place; then it comes back."""
    monkeypatch.setattr("agent.transfer.begun_place.LOOK_AT_ROOT", 0.02)
    place = tmp_path / "destination"
    ours, foreign = Disk(tmp_path / "ours"), Disk(tmp_path / "foreign")
    with unmounting(place):
        ours.mount(place)
        mark = accept(place)
        if not mark.marker:
            pytest.skip("this file system keeps no extended attributes")
        taken: list[Call] = []

        def plan(call: Call) -> int | None:
            if call.operation == "rename" and call.nth == 20:
                taken.append(call)
                subprocess.run(["umount", "--lazy", place], check=True)
                if other:
                    foreign.mount(place)
            return None

        def bring_back() -> None:
            # Nothing of the task went to the place without the disk.
            assert {path.name for path in place.iterdir()} <= {"lost+found"}
            if other:
                subprocess.run(["umount", "--lazy", place], check=True)
            ours.mount(place)

        seen = Seen("COLLECTION_UNAVAILABLE", lambda: None)
        changed = Seen("ROOT_CHANGED", bring_back)
        back: list[int] = []

        def watch(line: Line, observed: TaskObserved) -> None:
            seen(line, observed)
            if other:
                changed(line, observed)
            elif seen.told and not back:
                back.append(1)
                bring_back()

        engine = Marked(tmp_path, TaskOptions(verify_checksum=True), plan=plan, on_report=watch)
        engine.mark = mark
        for folder in range(10):
            (engine.source / str(folder)).mkdir()
            for number in range(20):
                (engine.source / str(folder) / str(number)).write_bytes(os.urandom(20_000))
        (engine.source / "large").write_bytes(os.urandom(5 * MIB))
        observed = await engine.run(60)
        assert taken
        assert observed.state == "SUCCEEDED", observed
        there = {name: content for name, content in contents(place).items() if name != "lost+found"}
        assert there == contents(engine.source)
        (seen if not other else changed).check(engine, "destination owner", "mount" if not other else "set up")
        assert "ROOT_REPLACED" not in engine.codes()
        print(f"taken away at rename 20, {dict(Counter(engine.codes()))}")


async def test_a_root_that_its_owner_replaced_gets_everything(tmp_path: Path) -> None:
    """Half of the task is in a folder that is gone; its owner accepts the new one, and nothing is missing there."""
    place = tmp_path / "destination"
    place.mkdir()

    def plan(call: Call) -> int | None:
        if call.operation == "rename" and call.nth == 10:
            place.rename(tmp_path / "gone")
            place.mkdir()
        return None

    engine = Marked(tmp_path, TaskOptions(verify_checksum=True), plan=plan)
    engine.mark = accept(place)
    if not engine.mark.marker and not engine.mark.inode:
        pytest.skip("nothing tells one folder from another on this file system")

    def accepted() -> None:
        engine.mark = accept(place)

    seen = Seen("ROOT_CHANGED", accepted)
    engine.on_report = seen
    for folder in range(6):
        (engine.source / str(folder)).mkdir()
        for number in range(20):
            (engine.source / str(folder) / str(number)).write_bytes(b"%d of %d" % (number, folder))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(place) == contents(engine.source)
    seen.check(engine, "destination owner", "accept-root")
    assert "ROOT_REPLACED" in engine.codes()
    assert observed.counters.files_transferred == 120
