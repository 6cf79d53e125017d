"""Blocks of large files are read back from the device: asked for together behind their sync, and only then read."""

from __future__ import annotations

import errno
import itertools
import queue
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.storage import page_cache
from agent.transfer.asking.arrivals import CHECK_AFTER, BlockBooks
from agent.transfer.basis.jobs import Abandoned, BlocksChecked, LargeFile, RangeRequest
from agent.transfer.settling.block_check import BlockChecker, CheckLine, _runs
from agent.transfer.settling.side_thread import Broken
from protocol.errors import RetryLater
from protocol.lane import digest
from protocol.threads import NoThread

BLOCK, MIB = 1024, 1024 * 1024


class Job:
    attributes = None
    access = None

    class row:  # noqa: N801
        size = 20 * BLOCK + 5
        mode = 0o644
        mtime_ns = 12345


def new_file() -> LargeFile:
    job: Any = Job
    return LargeFile(job, b"t", 7, BLOCK, bytearray(3), 0)


def quiet_checker(disk: Any) -> BlockChecker:
    unused: Any = None
    return BlockChecker(
        disk, unused, verify=True, mode_mask=0o777, preserve_timestamp=True, refused=unused, remover=unused
    )


def check(checker: BlockChecker, file: LargeFile) -> BlocksChecked:
    """Both halves, and what the settler does with the answer."""
    (finish,) = checker.begin([file])
    answer = finish()
    file.done_count += len(answer.good)
    file.checked(answer.taken)
    return answer


class Disk:
    """Notes what is asked of it, in order."""

    def __init__(self, file: LargeFile, later: list[int]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._file, self._later = file, later

    def part_mark(self, _descriptor: int) -> tuple[int, int]:
        return (0, self._file.job.row.size)

    def fsync(self, _descriptor: int) -> None:
        self.calls.append(("fsync",))
        # What a lane writes meanwhile: not synced, and not to be read back yet.
        for index in self._later:
            self._file.add_unchecked(index, b"")

    def preadv(self, _descriptor: int, views: list[memoryview], offset: int) -> int:
        self.calls.append(("preadv", offset))
        views[0][:] = bytes(len(views[0]))
        return len(views[0])

    def fchmod(self, _descriptor: int, mode: int) -> None:
        self.calls.append(("fchmod", mode))

    def futimes(self, _descriptor: int, mtime_ns: int) -> None:
        self.calls.append(("futimes", mtime_ns))

    def close_file(self, _descriptor: int) -> None:
        self.calls.append(("close",))

    def advice(self, name: str) -> Any:
        return lambda _descriptor, offset, length: self.calls.append((name, offset, length))


@pytest.mark.parametrize("verify", [True, False])
def test_blocks_are_dropped_asked_for_and_read_behind_their_sync(monkeypatch: pytest.MonkeyPatch, verify: bool) -> None:
    file = new_file()
    for index in (3, 1, 2, 20):
        file.add_unchecked(index, digest(bytes(file.length_of(index))))
    disk = Disk(file, [8, 9])
    root: Any = disk
    for name in ("forget", "want", "write_soon"):
        monkeypatch.setattr(page_cache, name, disk.advice(name))
    unused: Any = None
    checker = BlockChecker(
        root, unused, verify=verify, mode_mask=0, preserve_timestamp=False, refused=unused, remover=unused
    )
    answer = check(checker, file)
    assert sorted(answer.good) == [1, 2, 3, 20]
    assert not answer.bad
    assert sorted(file.unchecked) == [8, 9]
    if not verify:
        assert [call[0] for call in disk.calls] == ["fsync"]
        return
    neighbours, tail = (BLOCK, 3 * BLOCK), (20 * BLOCK, 5)
    assert disk.calls[:5] == [
        ("fsync",),
        ("forget", *neighbours),
        ("want", *neighbours),
        ("forget", *tail),
        ("want", *tail),
    ]
    assert {call[0] for call in disk.calls[5:]} == {"preadv"}


@pytest.mark.parametrize("mode", [0o644, 0o200])
@pytest.mark.parametrize("spoilt", [False, True])
def test_mode_and_time_are_durable_before_a_file_may_have_its_name(
    monkeypatch: pytest.MonkeyPatch, mode: int, spoilt: bool
) -> None:
    """With the last blocks, in one sync; again when one of them has to be written once more; for themselves where the
    mode would keep us from opening the file after a crash."""
    monkeypatch.setattr(Job.row, "mode", mode)
    file = new_file()
    file.done_count = 19
    content = [bytes(file.length_of(index)) for index in (3, 20)]
    disk = Disk(file, [])
    root: Any = disk
    for name in ("forget", "want", "write_soon"):
        monkeypatch.setattr(page_cache, name, lambda *_: None)
    unused: Any = None
    checker = BlockChecker(
        root, unused, verify=True, mode_mask=0o777, preserve_timestamp=True, refused=unused, remover=unused
    )
    file.add_unchecked(3, digest(b"spoilt" if spoilt else content[0]))
    file.add_unchecked(20, digest(content[1]))
    answer = check(checker, file)
    set_both = [("fchmod", mode), ("futimes", 12345)]
    early = set_both if mode == 0o644 else []
    assert [call for call in disk.calls if call[0] != "preadv"] == [*early, ("fsync",)]
    if spoilt:
        assert answer.bad == [3]
        disk.calls.clear()
        file.add_unchecked(3, digest(content[0]))
        assert check(checker, file).good == [3]
        assert [call for call in disk.calls if call[0] != "preadv"] == [*early, ("fsync",)]
    disk.calls.clear()
    assert checker.seal(file).error is None
    assert disk.calls == ([("close",)] if early else [*set_both, ("fsync",), ("close",)])


def test_what_waits_is_synced_together_and_read_behind_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced before any is dropped from the cache."""
    files = [new_file(), new_file()]
    for file in files:
        file.add_unchecked(0, digest(bytes(BLOCK)))
    disk = Disk(files[0], [])
    checker = quiet_checker(disk)
    for name in ("forget", "want", "write_soon"):
        monkeypatch.setattr(page_cache, name, disk.advice(name))
    checks = checker.begin(files)
    names = [call[0] for call in disk.calls]
    assert names == ["fsync"] * 2 + ["forget", "want"] * 2
    assert [check().file for check in checks] == files


def test_what_waits_is_written_early(monkeypatch: pytest.MonkeyPatch) -> None:
    file = new_file()
    disk = Disk(file, [])
    monkeypatch.setattr(page_cache, "write_soon", disk.advice("write_soon"))
    for index in (3, 1, 2, 20):
        file.add_unchecked(index, b"")
    checker = quiet_checker(disk)
    checker.write_soon(file)
    assert disk.calls == [("write_soon", BLOCK, 3 * BLOCK), ("write_soon", 20 * BLOCK, 5)]
    assert len(file.unchecked) == 4
    file.failed = True
    checker.write_soon(file)
    assert len(disk.calls) == 2


def test_a_file_is_sealed_with_its_last_blocks_although_others_are_still_being_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = new_file()
    disk = Disk(file, [])
    checker = quiet_checker(disk)
    for name in ("forget", "want", "write_soon"):
        monkeypatch.setattr(page_cache, name, lambda *_: None)
    first = dict.fromkeys(range(20), digest(bytes(BLOCK)))
    for index, expected in first.items():
        file.add_unchecked(index, expected)
    (early,) = checker.begin([file])
    before = file.sealed
    file.add_unchecked(20, digest(bytes(5)))
    (late,) = checker.begin([file])
    assert (before, file.sealed) == (False, True)
    assert [call[0] for call in disk.calls] == ["fsync", "fchmod", "futimes", "fsync"]
    assert len(early().good) == 20
    assert late().good == [20]


def test_each_call_of_a_line_has_one_answer_and_everything_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [new_file() for _ in range(3)]
    for file in files:
        file.add_unchecked(0, digest(bytes(BLOCK)))
    disk = Disk(files[0], [])
    for name in ("forget", "want"):
        monkeypatch.setattr(page_cache, name, lambda *_: None)
    monkeypatch.setattr(page_cache, "write_soon", disk.advice("write_soon"))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    held, begun = threading.Event(), threading.Event()
    sync = disk.fsync

    def first_waits(descriptor: int) -> None:
        begun.set()
        assert held.wait(10)
        sync(descriptor)

    monkeypatch.setattr(disk, "fsync", first_waits)
    checker = quiet_checker(disk)
    together: list[int] = []
    begin = checker.begin

    def counted(taken: list[LargeFile]) -> Any:
        together.append(len(taken))
        return begin(taken)

    monkeypatch.setattr(checker, "begin", counted)
    with CheckLine[str](checker, answers) as line:
        line.check(files[0])
        assert disk.calls == [("write_soon", 0, BLOCK)]
        assert begun.wait(10)
        # These wait together, one of them twice.
        for file in (*files[1:], files[1]):
            line.check(file)
        line.ask(lambda: "closed")
        assert line.asked == 5
        held.set()
    got = [answers.get_nowait() for _ in range(5)]
    assert answers.empty()
    assert [answer if isinstance(answer, str) else answer.file for answer in got] == [*files, files[1], "closed"]
    assert [answer if isinstance(answer, str) else answer.good for answer in got] == [[0], [0], [0], [], "closed"]
    assert together == [1, 3, 0, 0]


def test_blocks_behind_a_sync_that_failed_do_not_count_although_the_next_sync_does_not_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system tells a write error once; what it lost may be any block that was written by then."""
    file = new_file()
    disk = Disk(file, [1])
    root: Any = disk
    unused: Any = None
    # Where blocks are read back that would notice, too.
    checker = BlockChecker(
        root, unused, verify=False, mode_mask=0, preserve_timestamp=False, refused=unused, remover=unused
    )
    file.add_unchecked(0, digest(bytes(BLOCK)))
    sync = disk.fsync

    def fails(descriptor: int) -> None:
        sync(descriptor)
        raise OSError(errno.EIO, "on purpose")

    monkeypatch.setattr(disk, "fsync", fails)
    (first,) = checker.begin([file])
    monkeypatch.setattr(disk, "fsync", sync)
    # Before the settler has heard of the first one.
    (second,) = checker.begin([file])
    assert isinstance(first().error, OSError)
    answer = second()
    assert (answer.good, answer.error, answer.size) == ([], None, BLOCK)


def test_what_a_check_found_good_is_kept_of_a_file_that_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settler may hear of the check only when the temporary is closed already."""
    file = new_file()
    disk: Any = Disk(file, [])
    for name in ("forget", "want", "write_soon"):
        monkeypatch.setattr(page_cache, name, lambda *_: None)
    kept: list[Any] = []

    class Books:
        def put_partial(self, *row: Any) -> None:
            kept.append(row)

        def drop_partial(self, *_: object) -> None:
            raise AssertionError

        remove = drop_partial

    books: Any = Books()
    checker = BlockChecker(
        disk, books, verify=True, mode_mask=0, preserve_timestamp=False, refused=books, remover=books
    )
    monkeypatch.setattr(Job, "key", (1, b"name"), raising=False)
    monkeypatch.setattr(Job.row, "version", (0, 0, 0, 0, 0), raising=False)
    file.add_unchecked(3, digest(bytes(BLOCK)))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    item = Abandoned(file, RetryLater("on purpose"))
    with CheckLine[Abandoned](checker, answers) as line:
        line.check(file)
        line.ask(lambda: checker.abandon(item))
    assert not kept
    assert disk.calls[-1] == ("close",)
    for index in answers.get_nowait().good:
        file.mark_done(index)
    assert answers.get_nowait() is item
    checker.keep(file)
    ((*key, row),) = kept
    assert (key, row.temporary, row.done) == ([1, b"name"], b"t", bytearray([8, 0, 0]))


def test_a_line_that_gets_no_second_thread_leaves_no_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "flush":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    line = CheckLine[str](quiet_checker(None), queue.SimpleQueue())
    with pytest.raises(NoThread), line:
        pass
    assert not line._second._thread.is_alive()


def test_what_goes_wrong_in_the_first_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    file = new_file()
    checker = quiet_checker(Disk(file, []))

    def fails(_files: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(checker, "begin", fails)
    with CheckLine[str](checker, answers) as line:
        line.check(file)
    answer = answers.get_nowait()
    assert isinstance(answer, Broken)
    assert str(answer.__cause__) == "on purpose"


@given(st.sets(st.integers(0, 20)))
def test_runs_are_exactly_the_blocks(blocks: set[int]) -> None:
    file = new_file()
    runs = list(_runs(file, blocks))
    covered = [at for offset, length in runs for at in range(offset, offset + length)]
    wanted = [at for index in sorted(blocks) for at in range(index * BLOCK, index * BLOCK + file.length_of(index))]
    assert covered == wanted
    assert all(end + length < begin for (end, length), (begin, _) in itertools.pairwise(runs))


@pytest.mark.parametrize("block", [MIB, 2 * CHECK_AFTER])
def test_a_check_that_has_not_begun_is_not_asked_for_with_each_block(block: int) -> None:
    class Large:
        class row:  # noqa: N801
            size = 1 << 40

    job: Any = Large
    file = LargeFile(job, b"t", 7, block, bytearray(100), 0)
    settle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    nobody: Any = None
    books, request = BlockBooks(settle, nobody), RangeRequest(1, file, 0, 100 * block)
    asked = []
    for index in range(40):
        books.arrived(request, index, block, b"", good=True, last=index == 35)
        if settle.qsize() > len(asked):
            asked.append(index)
    every = max(1, CHECK_AFTER // block)
    assert asked == sorted({*range(every - 1, 40, every), 35})
    assert settle.qsize() == len(asked)
    # One begins: the next is asked for when as much has come since.
    file.take_unchecked()
    for index in range(40, 40 + every):
        assert settle.qsize() == len(asked)
        books.arrived(request, index, block, b"", good=True, last=False)
    assert settle.qsize() == len(asked) + 1
