"""Blocks of large files are read back from the device: asked for together behind their sync, and only then read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.storage import page_cache
from agent.transfer.block_check import BlockChecker, _runs
from agent.transfer.jobs import LargeFile
from protocol.lane import digest

BLOCK = 1024


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


class Disk:
    """Notes what is asked of it, in order."""

    def __init__(self, file: LargeFile, later: list[int]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._file, self._later = file, later

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
    answer = checker.check(file)
    assert sorted(answer.good) == [1, 2, 3, 20]
    assert not answer.bad
    assert file.waiting() == [8, 9]
    if not verify:
        assert disk.calls == [("fsync",)]
        return
    neighbours, tail = (BLOCK, 3 * BLOCK), (20 * BLOCK, 5)
    assert disk.calls[:6] == [
        ("fsync",),
        ("forget", *neighbours),
        ("want", *neighbours),
        ("forget", *tail),
        ("want", *tail),
        ("write_soon", 8 * BLOCK, 2 * BLOCK),
    ]
    assert {call[0] for call in disk.calls[6:]} == {"preadv"}


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
    answer = checker.check(file)
    set_both = [("fchmod", mode), ("futimes", 12345)]
    early = set_both if mode == 0o644 else []
    assert [call for call in disk.calls if call[0] != "preadv"] == [*early, ("fsync",)]
    if spoilt:
        assert answer.bad == [3]
        file.done_count += 1
        disk.calls.clear()
        file.add_unchecked(3, digest(content[0]))
        assert checker.check(file).good == [3]
        assert [call for call in disk.calls if call[0] != "preadv"] == [*early, ("fsync",)]
    disk.calls.clear()
    assert checker.seal(file).error is None
    assert disk.calls == ([("close",)] if early else [*set_both, ("fsync",), ("close",)])


@given(st.sets(st.integers(0, 20)))
def test_runs_are_exactly_the_blocks(blocks: set[int]) -> None:
    file = new_file()
    runs = list(_runs(file, blocks))
    covered = [at for offset, length in runs for at in range(offset, offset + length)]
    wanted = [at for index in sorted(blocks) for at in range(index * BLOCK, index * BLOCK + file.length_of(index))]
    assert covered == wanted
    assert all(end + length < begin for (end, length), (begin, _) in itertools.pairwise(runs))
