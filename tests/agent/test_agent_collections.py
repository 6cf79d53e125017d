"""Open roots: looked at before use, closed when nobody needs them, known again after a restart."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from agent import availability
from agent.availability import Availability
from agent.collections import MARKS_FILE, Collections, Marks, report_of
from agent.config.keys import CollectionConfig
from agent.policy import Policy
from agent.storage.mounts import Mark, Mount, difference, mark_of
from agent.storage.unavailable import CollectionUnavailable
from protocol.control import CollectionReport
from protocol.errors import NeedsPerson, TowpathError

ID = "00000000-0000-4000-8000-0000000000a1"


def config_for(root: Path, name: str = "Data") -> CollectionConfig:
    return CollectionConfig(id=ID, name=name, root=str(root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def open_handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_root_is_shared_by_its_users_and_closed_by_the_last(root: Path) -> None:
    """An open folder would keep the owner from unmounting its disk."""
    before = open_handles()
    collections = Collections(Marks(None))
    config = config_for(root)
    with collections.using(config) as first:
        with collections.using(config) as second:
            assert first is second
        assert open_handles() == before + 1
        assert first.stat(()).kind == "dir"
    assert open_handles() == before
    assert collections.report(config).available
    assert open_handles() == before


def test_a_root_that_was_replaced_is_opened_anew_and_the_old_one_closed(root: Path) -> None:
    before = open_handles()
    collections = Collections(Marks(None))
    config = config_for(root)
    with collections.using(config) as old:
        root.rename(root.with_name("moved"))
        with pytest.raises(NeedsPerson) as caught, collections.using(config):
            pass
        assert caught.value.code == "COLLECTION_UNAVAILABLE"
        root.mkdir()
        with collections.using(config) as new:
            assert new is not old
            assert new.identity() != old.identity()
    assert open_handles() == before


def write_mark(tmp_path: Path, config: CollectionConfig, **changes: Any) -> Path:
    """A state directory that remembers another file system for the root."""
    path = tmp_path / MARKS_FILE
    marks = Marks(path)
    collections = Collections(marks)
    with collections.using(config):
        found = marks.expected(config)
    assert found is not None
    fields = {"mount_point": found.mount_point, "file_system": found.file_system, "inode": found.inode}
    marks.keep(config, Mark(**(fields | changes)))
    return path


def test_an_empty_mount_point_is_not_taken_for_the_disk(tmp_path: Path, root: Path) -> None:
    """The agent starts before the disk is mounted: there is a folder, but not the one of the last time."""
    path = write_mark(tmp_path, config_for(root), mount_point="/mnt/disk", inode=2)
    collections = Collections(Marks(path))
    with pytest.raises(CollectionUnavailable, match="that it was on") as caught, collections.using(config_for(root)):
        pass
    assert "/mnt/disk" not in str(caught.value.to_document())
    report = collections.report(config_for(root))
    assert (report.available, report.id) == (False, ID)
    assert "/mnt/disk" in report.reason
    assert "towpath config accept-root" in report.reason


@pytest.mark.parametrize("writable_then", [True, False])
def test_the_same_folder_through_a_bind_mount_is_the_same_folder(
    tmp_path: Path, root: Path, writable_then: bool
) -> None:
    """A service's sandbox (ReadWritePaths) gives folders mount points that they have not elsewhere."""
    config = dataclasses.replace(config_for(root), read_only=not writable_then)
    path = write_mark(tmp_path, config, mount_point=str(root))
    assert Collections(Marks(path)).report(config_for(root)).available


@pytest.mark.parametrize(("marker", "same"), [("a" * 32, True), ("b" * 32, False), ("", False)])
def test_where_inodes_do_not_last_the_marker_alone_shows_the_same_folder(marker: str, same: bool) -> None:
    """A container's overlay, once more in the sandbox of a service."""
    before = mark_of(Mount("overlay", "/"), 4711, "a" * 32)
    now = mark_of(Mount("overlay", "/data"), 4812, marker)
    assert (difference(before, now) == "") is same
    assert difference(mark_of(Mount("overlay", "/"), 4711), mark_of(Mount("overlay", "/data"), 4812))


def test_the_owner_can_accept_a_root_that_moved(tmp_path: Path, root: Path) -> None:
    path = write_mark(tmp_path, config_for(root), file_system="nfs4")
    collections = Collections(Marks(path))
    assert not collections.report(config_for(root)).available
    collections.accept(config_for(root))
    assert collections.report(config_for(root)).available
    assert Collections(Marks(path)).report(config_for(root)).available


def test_a_folder_made_anew_on_the_same_disk_is_the_owners_doing(tmp_path: Path, root: Path) -> None:
    path = write_mark(tmp_path, config_for(root), inode=1)
    assert Collections(Marks(path)).report(config_for(root)).available


def test_a_mark_counts_only_for_the_root_it_was_taken_of(tmp_path: Path, root: Path) -> None:
    path = write_mark(tmp_path, config_for(root), mount_point="/mnt/disk", inode=2)
    (tmp_path / "other").mkdir()
    assert Collections(Marks(path)).report(config_for(tmp_path / "other")).available


def test_damaged_marks_are_an_error_and_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / MARKS_FILE).write_text("{")
    with pytest.raises(TowpathError, match=r"roots\.json"):
        Marks(tmp_path / MARKS_FILE)


def test_a_full_disk_of_the_agent_does_not_make_collections_unavailable(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent.collections.write_private_file", full)
    assert Collections(Marks(tmp_path / MARKS_FILE)).report(config_for(root)).available
    assert "could not be remembered" in caplog.text


async def test_a_file_server_that_hangs_is_reported_and_looked_at_by_one_thread_only(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "PATIENCE", 0.05)
    released = threading.Event()
    looks: list[str] = []

    class Hanging(Collections):
        def report(self, config: CollectionConfig) -> CollectionReport:
            looks.append(config.id)
            released.wait()
            return report_of(config)

    announced: list[list[bool]] = []
    watch = Availability(
        Policy([config_for(root)]),
        Hanging(Marks(None)),
        lambda reports: announced.append([report.available for report in reports]),
    )
    assert [report.available for report in watch.reports()] == [False]
    for _ in range(3):
        (report,) = await watch.look()
        assert not report.available
        assert "does not answer" in watch.owners_reports()[0].reason
        assert str(root) not in report.reason
    assert looks == [ID]
    assert announced == []
    released.set()
    with trio.fail_after(5):
        while not (await watch.look())[0].available:
            await trio.sleep(0.01)
    assert announced == [[True]]


async def test_collections_that_the_owner_removed_are_forgotten(root: Path) -> None:
    policy = Policy([config_for(root)])
    watch = Availability(policy, Collections(Marks(None)), lambda _: None)
    assert [report.id for report in await watch.look()] == [ID]
    policy.replace([])
    assert await watch.look() == []
