"""Which disks below a root are remembered: those mounted there to stay, until their owner has them forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.availability import Availability
from agent.collections import MARKS_FILE, Collections, Marks
from agent.daemon import Daemon
from agent.policy import Policy
from agent.storage import disks, mounts
from agent.storage.disks import DISK_MISSING, DISK_REPLACED, Disk, DiskAway, Mounted, mounted_below
from agent.storage.mounts import Mark
from agent.storage.posix import open_root
from tests.agent.recorded_tasks import RecordedTasks
from tests.agent.small_disks import ELSEWHERE, ID, bound, config_for, memory_disk, needs_root

# The number of the root's mount.
ROOT = 30


def below(*rows: tuple[int, int, str, str]) -> dict[str, str]:
    table = [Mounted(1, 1, b"/", "ext4"), Mounted(ROOT, 1, b"/data", "ext4")]
    table += [Mounted(number, parent, point.encode(), kind) for number, parent, point, kind in rows]
    return {row.point.decode(): row.file_system for row in mounted_below(table, ROOT, b"/data")}


def test_disks_below_a_root_are_found_whatever_stands_on_whatever() -> None:
    rows = (
        (31, ROOT, "/data/scratch", "xfs"),
        (32, 31, "/data/scratch/inner", "nfs4"),
        # Of the same device as the root: only the table shows a bind mount.
        (33, ROOT, "/data/bound", "ext4"),
        (34, 1, "/database", "ext4"),
        (35, 1, "/other", "ext4"),
    )
    assert below(*rows) == {"/data/scratch": "xfs", "/data/scratch/inner": "nfs4", "/data/bound": "ext4"}
    assert below(*reversed(rows)) == below(*rows)


def test_of_mounts_over_each_other_only_the_last_counts() -> None:
    rows = (31, ROOT, "/data/a", "ext4"), (32, 31, "/data/a/covered", "ext4"), (33, 31, "/data/a", "xfs")
    assert below(*rows, (34, 33, "/data/a/seen", "btrfs")) == {"/data/a": "xfs", "/data/a/seen": "btrfs"}
    # One in a place that the root's own mount covers.
    assert below((31, 1, "/data/hidden", "ext4")) == {}


@pytest.mark.parametrize("kind", ["overlay", "proc", "squashfs", "fuse.portal", "autofs"])
def test_what_comes_and_goes_by_itself_is_not_remembered(kind: str) -> None:
    assert below((31, ROOT, "/data/x", kind), (32, 31, "/data/x/y", "ext4")) == {}


def test_what_is_mounted_when_somebody_looks_is_not_remembered() -> None:
    assert below((31, ROOT, "/data/home", "autofs"), (32, 31, "/data/home", "nfs4")) == {}
    assert below((31, ROOT, "/data/net", "autofs"), (32, 31, "/data/net/server", "nfs4")) == {}
    assert below((31, ROOT, "/data/.zfs/snapshot/monday", "zfs")) == {}


def test_mounts_on_a_file_system_in_memory_and_on_removed_folders_are_not_remembered() -> None:
    assert below((31, ROOT, "/data/run", "tmpfs"), (32, 31, "/data/run/user", "tmpfs")) == {"/data/run": "tmpfs"}
    assert below((31, ROOT, "/data/gone//deleted", "ext4")) == {}


def test_a_table_in_circles_ends() -> None:
    assert below((31, 32, "/data/a", "ext4"), (32, 31, "/data/a", "ext4"), (33, ROOT, "/data/a", "xfs"))


def test_without_a_table_of_the_kernel_the_list_of_file_systems_has_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import psutil

    def missing(_: int) -> bytes:
        raise FileNotFoundError

    class Row:
        def __init__(self, mountpoint: Path, fstype: str) -> None:
            self.mountpoint, self.fstype = str(mountpoint), fstype

    rows = [Row(tmp_path / "server", "smbfs"), Row(tmp_path / "auto", "autofs"), Row(Path("/"), "apfs")]
    monkeypatch.setattr(mounts, "number_of", missing)
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: rows)
    assert disks.look(-1, str(tmp_path), (), place=True) == [
        Disk((b"server",), Mark(str(tmp_path / "server"), "smbfs", 0))
    ]


def enter(marks: Marks, root: Path) -> str:
    """What is said to a worker that enters the folder ``disk``."""
    with open_root(str(root), disks=marks.disks(config_for(root))) as opened:
        try:
            opened.open_directory((b"disk",)).close()
        except DiskAway as error:
            return error.code
    return ""


@needs_root
def test_a_disk_seen_below_a_root_is_remembered_until_its_owner_has_it_forgotten(tmp_path: Path) -> None:
    root, config = tmp_path / "root", config_for(tmp_path / "root")
    root.mkdir()
    with memory_disk(root / "disk", 1):
        assert Collections(Marks(tmp_path / MARKS_FILE)).report(config).available
    # After a restart, and another look.
    marks = Marks(tmp_path / MARKS_FILE)
    collections = Collections(marks)
    assert collections.report(config).available
    assert [disk.path for disk in marks.disks(config)] == [(b"disk",)]
    assert enter(marks, root) == DISK_MISSING
    with memory_disk(root / "disk", 1):
        assert enter(marks, root) == ""
    collections.accept(config)
    assert enter(marks, root) == ""
    assert Marks(tmp_path / MARKS_FILE).disks(config) == ()


@needs_root
def test_what_is_mounted_over_a_file_is_no_disk(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "hosts").touch()
    marks = Marks(None)
    with bound(tmp_path / "root" / "hosts", root / "hosts"):
        assert Collections(marks).report(config_for(root)).available
    assert marks.disks(config_for(root)) == ()


@needs_root
def test_a_bind_mount_is_known_by_its_place_and_by_what_it_shows(tmp_path: Path) -> None:
    root, one, other = (tmp_path / name for name in ("root", "one", "other"))
    for folder in (root / "disk", one, other):
        folder.mkdir(parents=True)
    marks = Marks(None)
    with bound(one, root / "disk"):
        assert Collections(marks).report(config_for(root)).available
        # It has the device of the root.
        assert (root / "disk").stat().st_dev == root.stat().st_dev
        assert enter(marks, root) == ""
    assert enter(marks, root) == DISK_MISSING
    with bound(other, root / "disk"):
        assert enter(marks, root) == DISK_REPLACED


class Looked:
    """A root below which these are mounted."""

    def __init__(self, count: int) -> None:
        self.found = [Disk((b"%d" % number,), ELSEWHERE) for number in range(count)]

    def look_below(self, known: set[tuple[bytes, ...]], *, place: bool) -> list[Disk]:
        assert place
        return [disk for disk in self.found if disk.path not in known]


def test_so_many_are_remembered_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, marks = config_for(tmp_path), Marks(tmp_path / MARKS_FILE)
    marks.keep(config, ELSEWHERE)
    for count in (3, disks.MOST - 1, disks.MOST + 5):
        marks.keep_disks(config, Looked(count))  # type: ignore[arg-type]
    assert len(marks.disks(config)) == disks.MOST
    assert "More than 256 disks" in caplog.text
    # A new mark of the same root says nothing of them.
    marks.keep(config, dataclasses.replace(ELSEWHERE, marker="b" * 32))
    assert Marks(tmp_path / MARKS_FILE).disks(config) == marks.disks(config)
    assert marks.disks(config_for(tmp_path / "elsewhere")) == ()


def test_what_is_forgotten_during_a_look_does_not_come_back(tmp_path: Path) -> None:
    config, marks = config_for(tmp_path), Marks(None)
    marks.keep(config, ELSEWHERE)
    marks.keep_disks(config, Looked(1))  # type: ignore[arg-type]

    class Slow(Looked):
        def look_below(self, known: set[tuple[bytes, ...]], *, place: bool) -> list[Disk]:
            marks.forget(ID)
            marks.keep(config, ELSEWHERE)
            return super().look_below(known, place=place)

    marks.keep_disks(config, Slow(2))  # type: ignore[arg-type]
    assert marks.disks(config) == ()


async def test_tasks_and_sessions_that_run_hear_of_what_their_owner_has_accepted(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    told: list[str] = []

    class Tasks(RecordedTasks):
        async def owner_changed(self, collection_ids: Collection[str]) -> None:
            # Who begins anew now is told of the new root.
            assert marks.disks(config) == ()
            told.extend(collection_ids)

    marks = Marks(None)
    marks.keep(config, ELSEWHERE)
    marks.keep_disks(config, Looked(1))  # type: ignore[arg-type]
    policy, collections, tasks = Policy([config]), Collections(marks), Tasks()
    daemon = Daemon.__new__(Daemon)
    daemon._policy, daemon._tasks = policy, tasks  # type: ignore[assignment]
    daemon._data = SimpleNamespace(collections=collections)  # type: ignore[assignment]
    daemon._availability = Availability(policy, collections, tasks.announce_collections)
    await daemon.accept_root(ID)
    assert told == [ID]


def test_disks_in_hidden_folders_that_are_not_offered_are_nobody_elses_business(tmp_path: Path) -> None:
    config, marks = config_for(tmp_path), Marks(None)
    marks.keep(config, ELSEWHERE)
    looked = Looked(1)
    looked.found.append(Disk((b"a", b".hidden", b"b"), ELSEWHERE))
    marks.keep_disks(config, looked)  # type: ignore[arg-type]
    assert len(marks.disks(config)) == 2
    assert [disk.path for disk in marks.disks(dataclasses.replace(config, hidden=False))] == [(b"0",)]
