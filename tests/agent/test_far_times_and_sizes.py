"""Files with times and sizes that hardly anybody has: damaged archives, clocks that were wrong, and peers that lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.storage.listing import Accounts, list_directory
from agent.storage.node import Node, node_from_stat
from agent.storage.posix import open_root
from agent.storage.query import Query
from agent.transfer.source import source_rows
from protocol import session
from protocol.control import encode
from protocol.errors import ProtocolError
from tests.agent.engine_inside import Engine, contents, quick_path

__all__ = ["quick_path"]

# Seconds: the year 2514, two that no 64 bits of nanoseconds hold, and their like before our time.
FAR = [1 << 34, 1 << 36, 1 << 40, -(1 << 36), -(1 << 40)]


def _dated(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))
    if path.stat().st_mtime != seconds:
        pytest.skip("this file system keeps no such times")


@pytest.mark.parametrize("seconds", FAR)
async def test_files_and_folders_with_such_times_arrive(quick_path: Path, seconds: int) -> None:
    """One of them held up everything that was in its folder, without end and without a word."""
    engine = Engine(quick_path)
    (engine.source / "folder").mkdir()
    for name, content in (("small", b"small"), ("large", bytes(2 << 20)), ("folder/below", b"below"), ("other", b"")):
        (engine.source / name).write_bytes(content)
    for name in ("small", "large", "folder/below", "folder"):
        _dated(engine.source / name, seconds)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    # As near as can be told.
    nearest = max(-(1 << 63), min(seconds * 10**9, (1 << 63) - 1))
    for name in ("small", "large", "folder"):
        assert abs((engine.destination / name).stat().st_mtime_ns - nearest) < 10**9


@pytest.mark.parametrize("seconds", FAR)
def test_such_times_can_be_listed(quick_path: Path, seconds: int) -> None:
    (quick_path / "file").write_bytes(b"")
    _dated(quick_path / "file", seconds)
    with open_root(str(quick_path)) as root:
        listing = list_directory(root, (), Query(), Accounts())
    assert encode(listing)


@dataclass
class Lie:
    """What a source says of every file and folder."""

    changes: dict[str, int]

    def tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = source_rows.row_of

        def row_of(*arguments: Any, **named: Any) -> session.Row:
            row = honest(*arguments, **named)
            return msgspec.structs.replace(row, **self.changes) if row.name else row

        monkeypatch.setattr(source_rows, "row_of", row_of)


async def test_a_folder_whose_source_tells_an_impossible_time(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lie({"mtime_ns": (1 << 64) - 1}).tell(monkeypatch)
    engine = Engine(quick_path)
    (engine.source / "folder").mkdir()
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "folder").is_dir()


@pytest.mark.parametrize("size", [(1 << 54) + 1, (1 << 63) - 1])
async def test_a_file_that_is_too_large_to_keep_books_of(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Its bitmap alone would take the memory of the machine."""
    Lie({"size": size}).tell(monkeypatch)
    engine = Engine(quick_path)
    (engine.source / "file").write_bytes(b"not so large")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert "TOO_LARGE" in engine.codes()
    assert contents(engine.destination) == {}


async def test_files_that_are_too_large_together_to_be_counted(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse files of some file systems have such sizes; the count ended the process, each time anew."""
    Lie({"size": (1 << 63) - 1}).tell(monkeypatch)
    engine = Engine(quick_path)
    for name in ("one", "two", "folder/three", "folder/four"):
        (engine.source / name).parent.mkdir(exist_ok=True)
        (engine.source / name).write_bytes(b"not so large")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 4)
    assert observed.counters.bytes_total == (1 << 63) - 1


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_sizes_that_no_file_has_are_not_read(size: int) -> None:
    rows = session.Rows(1, [session.Row(b"file", session.FILE, size, 0, 0, 0, 0, 0)])
    with pytest.raises(ProtocolError):
        session.answer_untrusted(session.encode(rows)[4:])


async def test_a_folder_too_deep_to_be_asked_about_fails_alone(quick_path: Path) -> None:
    """A large file in it ended the session at the source, each time anew."""
    engine = Engine(quick_path)
    handle = os.open(engine.source, os.O_RDONLY)
    length = 0
    while length < session.MAX_PATH - 300:
        name = "d" * min(250, session.MAX_PATH - 200 - length)
        os.mkdir(name, dir_fd=handle)
        below = os.open(name, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle, length = below, length + len(name) + 1
    file = os.open("f" * 250, os.O_WRONLY | os.O_CREAT, dir_fd=handle)
    os.ftruncate(file, 2 << 20)
    os.close(file)
    os.close(handle)
    (engine.source / "other").write_bytes(b"content")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert (engine.destination / "other").read_bytes() == b"content"
    assert "ILLEGAL_NAME" in engine.codes()


@pytest.mark.parametrize("seconds", FAR)
async def test_files_that_changed_at_such_times_arrive(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """No call sets this time: it is that of a clock which was wrong, or what a file server says."""
    fstat = os.fstat

    class Changed:
        def __init__(self, status: os.stat_result) -> None:
            self._status = status

        def __getattr__(self, name: str) -> Any:
            return seconds * 10**9 if name == "st_ctime_ns" else getattr(self._status, name)

    engine = Engine(quick_path)
    for name, content in (("small", b"small"), ("large", bytes(2 << 20))):
        (engine.source / name).write_bytes(content)
    rows = source_rows.row_of

    def listed(node: Node, *rest: Any, **options: Any) -> session.Row:
        changed: Any = Changed(os.lstat(engine.source / os.fsdecode(node.name)))
        return rows(node_from_stat(node.name, changed), *rest, **options)

    monkeypatch.setattr(source_rows, "row_of", listed)
    monkeypatch.setattr(os, "fstat", lambda descriptor: Changed(fstat(descriptor)))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
