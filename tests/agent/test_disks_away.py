"""Disks mounted below a root that are away: their folders are not taken for empty ones, tasks say so and wait."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from agent.collections import Collections, Marks
from agent.storage.base import Root
from agent.storage.disks import DISK_MISSING, DISK_REPLACED, Disk, DiskAway, verdict
from agent.storage.faults import fault
from agent.storage.faulty import Call, FaultyRoot
from agent.storage.memory import MemoryRoot
from agent.storage.mounts import Mark
from agent.storage.posix import open_root
from protocol.control import TaskItem, TaskOptions
from protocol.errors import NeedsPerson
from tests.agent.engine_inside import Engine, quick_path, when
from tests.agent.engine_world import world
from tests.agent.small_disks import ELSEWHERE, bound, config_for, memory_disk, needs_root

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")

MIRROR = TaskOptions(delete_destination_extra=True, sync_level=1)

# --- whether it is the same ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ""),
        ({"mount_point": "/mnt"}, DISK_MISSING),
        ({"mount_point": "/", "file_system": "xfs"}, DISK_MISSING),
        # A sandbox shows the same folder through a mount of its own.
        ({"mount_point": "/sandbox", "inode": 2, "marker": "a" * 32}, ""),
        ({"file_system": "xfs"}, DISK_REPLACED),
        ({"marker": "b" * 32}, DISK_REPLACED),
        ({"marker": ""}, DISK_REPLACED),
        ({"inode": 3}, DISK_REPLACED),
    ],
)
def test_a_disk_is_the_same_missing_or_another_one(changes: dict[str, object], code: str) -> None:
    found = dataclasses.replace(ELSEWHERE, **changes)  # type: ignore[arg-type]
    if changes == {"mount_point": "/mnt"}:
        found = dataclasses.replace(found, marker="")
    assert verdict(ELSEWHERE, found) == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ""),
        ({"marker": "volume 1234-0002"}, DISK_REPLACED),
        ({"marker": ""}, DISK_REPLACED),
        ({"mount_point": "/", "file_system": "ext4", "marker": ""}, DISK_MISSING),
        # Every folder of a volume has its number, so that it does not show that another mount leads to this one.
        ({"mount_point": "/mnt"}, DISK_MISSING),
    ],
)
def test_of_two_volumes_without_attributes_and_lasting_inodes_the_number_tells(
    changes: dict[str, object], code: str
) -> None:
    expected = Mark("/data/stick", "vfat", 0, "volume 1234-0001")
    assert verdict(expected, dataclasses.replace(expected, **changes)) == code  # type: ignore[arg-type]


def test_a_folder_without_its_disk_is_not_entered_and_its_parent_not_whole_without_it() -> None:
    root = MemoryRoot()
    root.make_directories((b"a", b"disk", b"inner")).close()
    root.make_directories((b"a", b"link")).close()
    root.away.add((b"a", b"disk"))
    check_guarded(root)


def test_a_folder_of_this_machine_without_its_disk_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "a" / "disk" / "inner").mkdir(parents=True)
    with open_root(str(tmp_path), disks=[Disk((b"a", b"disk"), ELSEWHERE)]) as root:
        check_guarded(root)


def check_guarded(root: Root) -> None:
    for path in ((b"a", b"disk"), (b"a", b"disk", b"inner")):
        with pytest.raises(DiskAway):
            root.open_directory(path)
        with pytest.raises(DiskAway):
            root.make_directories(path)
    with root.open_directory(()) as top, root.open_directory((b"a",)) as above:
        above.symlink(b"way", b"disk/inner")
        for name, follow in ((b"disk", False), (b"way", True)):
            with pytest.raises(DiskAway) as caught:
                above.open_directory(name, follow=follow)
        assert above.lstat(b"disk").kind == "dir"
        top.check_disks()
        above.check_disks()
        above.rename(b"disk", b"renamed")
        with pytest.raises(DiskAway):
            above.check_disks()
        top.check_disks()
        top.rename(b"a", b"b")
        with pytest.raises(DiskAway):
            top.check_disks()
    error = fault(caught.value, "source", (b"a",))
    assert isinstance(error, NeedsPerson)
    assert (error.code, error.who, error.subject) == (DISK_MISSING, "source owner", "/a/disk/")
    assert "accept-root" in error.sentence


def test_handles_are_given_back_when_a_disk_is_away(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with open_root(str(tmp_path), disks=[Disk((b"disk",), ELSEWHERE)]) as root, root.open_directory(()) as top:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DiskAway):
            top.open_directory(b"disk")
        with pytest.raises(DiskAway):
            root.open_directory((b"disk",))
        assert len(os.listdir("/proc/self/fd")) == before


# --- tasks ---------------------------------------------------------------------------------------------------


class Guarded(Engine):
    """An engine whose sides remember disks, as workers do."""

    at_the_source: tuple[Disk, ...] = ()
    at_the_destination: tuple[Disk, ...] = ()

    def open_destination(self) -> Root:
        return FaultyRoot(open_root(str(self.destination), disks=self.at_the_destination), self._planned)

    def source_root(self) -> Root:
        return open_root(str(self.source), disks=self.at_the_source)

    def forget(self) -> None:
        self.at_the_source = self.at_the_destination = ()


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def lay_out(engine: Engine) -> None:
    """The disk at the source is not mounted: its folder is empty there, and its copy at the destination is not."""
    for place, names in ((engine.source, ("a/new", "disk/")), (engine.destination, ("a/old", "disk/precious"))):
        for name in names:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(name.encode())


@pytest.mark.parametrize("xattrs", [False, True])
async def test_a_mirror_of_a_folder_without_its_disk_deletes_nothing_and_waits(
    quick_path: Path, *, xattrs: bool
) -> None:
    engine = Guarded(quick_path, msgspec.structs.replace(MIRROR, preserve_xattrs=xattrs))
    lay_out(engine)
    engine.at_the_source = (Disk((b"disk",), ELSEWHERE),)

    def look() -> None:
        # Everything else has arrived, and nothing is deleted before all is known.
        assert files(engine.destination) == {"a/new": b"a/new", "a/old": b"a/old", "disk/precious": b"disk/precious"}
        assert engine.reports[-1].who == "source owner"
        engine.forget()

    engine.on_report = when(DISK_MISSING, look)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert DISK_MISSING in engine.codes()
    assert files(engine.destination) == {"a/new": b"a/new"}


async def test_a_mount_point_that_went_with_its_disk_is_no_reason_to_delete(quick_path: Path) -> None:
    engine = Guarded(quick_path, MIRROR)
    lay_out(engine)
    (engine.source / "disk").rmdir()
    engine.at_the_source = (Disk((b"disk",), ELSEWHERE),)

    def look() -> None:
        assert (engine.destination / "disk" / "precious").exists()
        engine.forget()

    engine.on_report = when(DISK_MISSING, look)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert DISK_MISSING in engine.codes()
    assert files(engine.destination) == {"a/new": b"a/new"}


@pytest.mark.parametrize("options", [MIRROR, TaskOptions()], ids=["mirror", "plain"])
async def test_nothing_is_written_in_a_folder_of_the_destination_without_its_disk(
    quick_path: Path, options: TaskOptions
) -> None:
    engine = Guarded(quick_path, options)
    (engine.destination / "disk").mkdir()
    for name in ("disk/inner/file", "other/file"):
        (engine.source / name).parent.mkdir(parents=True)
        (engine.source / name).write_bytes(b"content")
    engine.at_the_destination = (Disk((b"disk",), ELSEWHERE),)

    def look() -> None:
        assert files(engine.destination) == {"other/file": b"content"}
        assert engine.reports[-1].who == "destination owner"
        engine.forget()

    engine.on_report = when(DISK_MISSING, look)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert files(engine.destination) == files(engine.source)
    # What it has brought to the disk before may be gone with it: everything is compared.
    assert {DISK_MISSING, "ROOT_REPLACED"} <= set(engine.codes())


async def test_an_extra_folder_without_its_disk_is_not_deleted(quick_path: Path) -> None:
    engine = Guarded(quick_path, MIRROR)
    (engine.destination / "extra" / "disk").mkdir(parents=True)
    engine.at_the_destination = (Disk((b"extra", b"disk"), ELSEWHERE),)

    def look() -> None:
        assert (engine.destination / "extra" / "disk").is_dir()
        engine.forget()

    engine.on_report = when(DISK_MISSING, look)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert list(engine.destination.iterdir()) == []


async def test_a_delete_does_not_enter_a_folder_without_its_disk(quick_path: Path) -> None:
    engine = Guarded(quick_path, TaskOptions(recursive=True), [TaskItem(source_path="/all", destination_path="/all")])
    engine.type = "DELETE"
    (engine.destination / "all" / "disk" / "inner").mkdir(parents=True)
    engine.at_the_destination = (Disk((b"all", b"disk"), ELSEWHERE),)

    def look() -> None:
        assert (engine.destination / "all" / "disk" / "inner").is_dir()
        engine.forget()

    engine.on_report = when(DISK_MISSING, look)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert list(engine.destination.iterdir()) == []


# A source's worker is asked again after five seconds.
@pytest.mark.parametrize("side", [pytest.param("source", marks=pytest.mark.soak), "destination"])
async def test_workers_are_told_of_disks_and_begin_anew_when_one_is_forgotten(tmp_path: Path, side: str) -> None:
    async with world(tmp_path) as made:
        node = made.alpha if side == "source" else made.beta
        for folder in (made.alpha.root, made.beta.root):
            (folder / "disk").mkdir()
        (made.alpha.root / "disk" / "file").write_bytes(b"content")
        node.disks = (Disk((b"disk",), ELSEWHERE),)
        task = await made.submit([TaskItem(source_path="/", destination_path="/", recursive=True)])
        observed = await made.wait(task, states=frozenset({"WAITING", "SUCCEEDED"}))
        assert (observed.state, observed.status_code, observed.who) == ("WAITING", DISK_MISSING, f"{side} owner")
        assert list((made.beta.root / "disk").iterdir()) == []
        node.disks = ()
        assert node.service is not None
        await node.service.owner_changed({node.collection})
        assert (await made.wait(task)).state == "SUCCEEDED"
        assert (made.beta.root / "disk" / "file").read_bytes() == b"content"


# --- real mounts ---------------------------------------------------------------------------------------------


@needs_root
async def test_a_task_waits_until_a_disk_below_its_source_is_mounted_again(tmp_path: Path) -> None:
    engine = Guarded(tmp_path, MIRROR)
    disk = engine.source / "disk"
    marks = Marks(None)
    with memory_disk(disk, 4):
        assert Collections(marks).report(config_for(engine.source)).available
    engine.at_the_source = marks.disks(config_for(engine.source))
    (engine.destination / "disk").mkdir()
    (engine.destination / "disk" / "precious").write_bytes(b"precious")
    mounted: list[bool] = []

    def mount_again() -> None:
        assert (engine.destination / "disk" / "precious").exists()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
        mounted.append(True)
        for name in ("precious", "new"):
            (disk / name).write_bytes(b"precious")

    engine.on_report = when(DISK_MISSING, mount_again)
    try:
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert files(engine.destination) == {"disk/precious": b"precious", "disk/new": b"precious"}
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", disk], check=True)


@needs_root
async def test_a_disk_below_its_destination_that_is_taken_away_in_the_middle_is_waited_for(tmp_path: Path) -> None:
    engine, ours = Guarded(tmp_path), tmp_path / "ours"
    place = engine.destination / "disk"
    place.mkdir()
    ours.mkdir()
    marks = Marks(None)
    mounted = ExitStack()
    mounted.enter_context(bound(ours, place))
    assert Collections(marks).report(config_for(engine.destination)).available
    engine.at_the_destination = marks.disks(config_for(engine.destination))

    def plan(call: Call) -> int | None:
        if call.operation == "rename" and call.nth == 5:
            mounted.close()
        return None

    def mount_again() -> None:
        assert list(place.iterdir()) == []
        mounted.enter_context(bound(ours, place))

    engine.plan = plan
    engine.on_report = when(DISK_MISSING, mount_again)
    (engine.source / "disk").mkdir()
    for number in range(10):
        (engine.source / "disk" / str(number)).write_bytes(b"content")
    with mounted:
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert DISK_MISSING in engine.codes()
        assert "ROOT_REPLACED" not in engine.codes()
        assert files(engine.destination) == files(engine.source)
    assert len(files(ours)) == 10
