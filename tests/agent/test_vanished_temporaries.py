"""Somebody removes the temporaries of a running task: what was lost is fetched anew, told, and not for ever."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from agent.storage import handles
from agent.storage.faulty import Call
from agent.transfer.settling import small_files
from protocol.control import TaskOptions
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path, skipped

__all__ = ["quick_path"]

FILES = {"small": b"small", "other": b"other", "large": b"large" * 500_000}


class Removing:
    """Removes all temporaries just before some calls of an operation."""

    def __init__(self, operation: str, times: int) -> None:
        self.engine: Engine
        self.left = times
        self.removed = 0
        self._operation = operation
        # Calls come from several threads.
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> int | None:
        if call.operation != self._operation:
            return None
        with self._lock:
            if self.left and (found := self.engine.temporaries()):
                self.left -= 1
                self.removed += len(found)
                for path in found:
                    Path(path).unlink(missing_ok=True)
        return None


def scene(base: Path, operation: str, times: int, options: TaskOptions = CHECKED, processes: int = 0) -> Engine:
    plan = Removing(operation, times)
    engine = plan.engine = Engine(base, options, plan=plan, processes=processes)
    for name, content in FILES.items():
        (engine.source / name).write_bytes(content)
    (engine.source / "link").symlink_to("small")
    return engine


@pytest.mark.parametrize("operation", ["rename", "open_temporary", "fsync"])
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("options", [CHECKED, TaskOptions(preserve_timestamp=True, recursive_symlinks="keep")])
async def test_what_is_removed_in_mid_run_is_fetched_anew(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, processes: int, options: TaskOptions
) -> None:
    # As if no more descriptors could be kept: temporaries are opened again by their names.
    monkeypatch.setattr(small_files, "open_files", lambda: 0)
    engine = scene(quick_path, operation, 2, options, processes)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("SUCCEEDED", 0), (skipped(engine), engine.events)
    assert observed.counters.files_transferred == len(FILES)
    assert contents(engine.destination) == contents(engine.source)
    assert engine.plan.removed  # type: ignore[attr-defined]
    told = [event.details for event in engine.events if event.code == "PART_LOST"]
    assert told
    assert all("Attempt 1 of 5" in each or "Attempt 2 of 5" in each for each in told), told


async def test_what_is_removed_over_and_over_is_given_up(quick_path: Path) -> None:
    engine = scene(quick_path, "rename", 1000)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 4), observed
    assert skipped(engine) == dict.fromkeys([*FILES, "link"], "PART_LOST")
    assert sum("Attempt 5 of 5" in (event.details or "") for event in engine.events) == 4
    assert contents(engine.destination) == {}


async def test_a_folder_that_is_gone_is_no_lost_part(quick_path: Path) -> None:
    """There is nowhere to fetch it anew."""
    engine = scene(quick_path, "rename", 0)
    (engine.source / "link").unlink()
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"file")

    def remove(call: Call) -> int | None:
        folder = engine.destination / "folder"
        if call.operation == "rename" and call.name == b"file" and folder.exists():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        return None

    engine.plan = remove
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1), observed
    assert skipped(engine) == {"folder/file": "FILE_NOT_FOUND"}


def test_a_temporary_that_goes_while_it_is_opened_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no name any more, which is not the same as a second one."""
    (tmp_path / "temporary").write_bytes(b"content")
    regular = handles.regular

    def late(handle: int) -> os.stat_result:
        (tmp_path / "temporary").unlink()
        return regular(handle)

    monkeypatch.setattr(handles, "regular", late)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError):
            handles.open_temporary(folder, b"temporary")
    finally:
        os.close(folder)


@pytest.mark.parametrize("processes", [0, 1])
async def test_a_name_that_cannot_be_is_no_lost_part(quick_path: Path, processes: int) -> None:
    """exfat-fuse says of names with a colon that there is no such file: people were told that somebody had removed
    what had arrived, five times for each."""
    engine = scene(quick_path, "rename", 0, processes=processes)
    engine.plan = lambda call: errno.ENOENT if call.operation == "rename" else None
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 4), observed
    assert skipped(engine) == dict.fromkeys([*FILES, "link"], "ILLEGAL_NAME")
    assert not any("Attempt" in (event.details or "") for event in engine.events)
    assert engine.temporaries() == []
