"""Trouble as users meet it: full disks, disks that are away or others, damaged and unwritable state, changing sources.
What the task says meanwhile, that it goes on by itself, and that nothing wrong has a final name."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.storage import page_cache
from agent.storage.base import Root
from agent.storage.faulty import Call, fail_nth
from agent.storage.mounts import Mark
from agent.storage.posix import open_root
from agent.transfer.books.manifest import SkippedRow, read_page
from agent.transfer.deleting.remove import Removal
from protocol.control import TaskItem, TaskObserved, TaskOptions
from protocol.session import DIRECTORY
from tests.agent.engine_inside import Engine, Line, contents, quick_path, when
from tests.agent.small_disks import memory_disk, needs_root

__all__ = ["quick_path"]

MIB = 1024 * 1024


def fill(ballast: Path) -> None:
    """Leave no room on a disk."""
    descriptor = os.open(ballast, os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="space"):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


# --- full disks ------------------------------------------------------------------------------------------


@needs_root
async def test_a_full_disk_is_said_and_got_over(tmp_path: Path) -> None:
    with memory_disk(tmp_path / "destination", 16):
        ballast = tmp_path / "destination" / "ballast"
        engine = Engine(tmp_path, on_report=when("NO_SPACE", lambda: ballast.unlink()))
        (engine.source / "large").write_bytes(os.urandom(6 * MIB))
        for number in range(20):
            (engine.source / f"small-{number}").write_bytes(os.urandom(100_000))
        ballast.write_bytes(bytes(14 * MIB))
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert "NO_SPACE" in engine.codes()
        assert contents(engine.destination) == contents(engine.source)


@needs_root
async def test_a_disk_that_stays_full_is_told_once_and_with_what_there_is_to_do(tmp_path: Path) -> None:
    """The task looks again every few seconds; nobody needs to hear of each look. And the first attempt, which met the
    full disk at once, has counted what it found."""
    with memory_disk(tmp_path / "destination", 16):
        ballast = tmp_path / "destination" / "ballast"

        def make_room(line: Line, _: TaskObserved) -> None:
            looks = sum(report.status_code == "NO_SPACE" for report in line.engine.reports)
            if looks > 3 and line.engine.sessions > 8:
                ballast.unlink(missing_ok=True)

        engine = Engine(tmp_path, on_report=make_room)
        (engine.source / "large").write_bytes(os.urandom(6 * MIB))
        fill(ballast)
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert engine.codes().count("NO_SPACE") == 1
        held = [report.counters for report in engine.reports if report.status_code == "NO_SPACE"]
        assert max((counters.files, counters.bytes_total) for counters in held) == (1, 6 * MIB)


@needs_root
async def test_a_full_state_directory_is_said_and_got_over(tmp_path: Path) -> None:
    with memory_disk(tmp_path / "state", 1):
        ballast = tmp_path / "state" / "ballast"
        engine = Engine(tmp_path, on_report=when("NO_SPACE", lambda: ballast.unlink(missing_ok=True)))
        for number in range(300):
            (engine.source / f"{number:0200}").write_bytes(b"x")
        fill(ballast)
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert "NO_SPACE" in {report.status_code for report in engine.reports}
        assert contents(engine.destination) == contents(engine.source)


# --- roots -----------------------------------------------------------------------------------------------


class Marked(Engine):
    """An engine that knows its destination by a mark, as the worker does."""

    mark: Mark | None = None

    def open_destination(self) -> Root:
        return open_root(str(self.destination), self.mark)


def mark_of(folder: Path) -> Mark:
    with open_root(str(folder)) as root:
        return root.place_marker()


@needs_root
async def test_an_unmounted_destination_is_waited_for_and_not_filled(tmp_path: Path) -> None:
    place = tmp_path / "destination"
    with memory_disk(place, 16):
        mark = mark_of(place)
    mounts: list[Iterator[None]] = []

    def mount_again() -> None:
        assert list(place.iterdir()) == []
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], check=True)

    engine = Marked(tmp_path, on_report=when("COLLECTION_UNAVAILABLE", mount_again))
    engine.mark = mark
    (engine.source / "file").write_bytes(b"content")
    try:
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert (place / "file").read_bytes() == b"content"
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    assert list(place.iterdir()) == []
    assert not mounts


async def test_nothing_is_deleted_for_a_mirror_in_a_folder_that_is_not_the_one_set_up(tmp_path: Path) -> None:
    (tmp_path / "destination").mkdir()
    mark = mark_of(tmp_path / "destination")
    if not mark.marker:
        pytest.skip("this file system keeps no extended attributes")
    (tmp_path / "destination" / "precious").write_bytes(b"precious")
    os.setxattr(tmp_path / "destination", "user.towpath.root", b"another disk")

    def restored() -> None:
        assert (tmp_path / "destination" / "precious").exists()
        os.setxattr(tmp_path / "destination", "user.towpath.root", mark.marker.encode())

    options = TaskOptions(delete_destination_extra=True, sync_level=1)
    engine = Marked(tmp_path, options, on_report=when("ROOT_CHANGED", restored))
    engine.mark = mark
    (engine.source / "file").write_bytes(b"content")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == {"file": b"content"}
    assert observed.counters.deleted == 1


# --- sources that change ---------------------------------------------------------------------------------

LARGE = 6 * MIB


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, 3 * MIB)


def overwrite_keeping_time(path: Path) -> None:
    """Other content of the same size under the old time; only the kernel's own change time tells."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"B" * LARGE)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"C" * LARGE)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [grow, shrink, overwrite_keeping_time, replaced])
@pytest.mark.parametrize("at", [1, 2, 5])
async def test_a_source_that_changes_while_it_is_read_is_read_again(
    quick_path: Path, change: Callable[[Path], None], at: int
) -> None:
    path = quick_path / "source" / "file"

    def plan(call: Call) -> int | None:
        if call.operation == "preadv" and call.nth == at and not changed:
            changed.append(call)
            change(path)
        return None

    changed: list[Call] = []
    engine = Engine(quick_path, source_plan=plan)
    path.write_bytes(b"A" * LARGE)
    observed = await engine.run()
    assert changed
    assert observed.state == "SUCCEEDED", observed
    assert "FILE_CHANGED" in engine.codes()
    arrived = (engine.destination / "file").read_bytes()
    assert arrived == path.read_bytes()
    assert engine.temporaries() == []


async def test_a_source_that_never_rests_is_given_up_in_words(quick_path: Path) -> None:
    path = quick_path / "source" / "file"

    def plan(call: Call) -> int | None:
        if call.operation == "preadv":
            grow(path)
        return None

    engine = Engine(quick_path, source_plan=plan)
    path.write_bytes(b"A" * 2000)
    (engine.source / "other").write_bytes(b"other")
    observed = await engine.run()
    assert observed.state == "FAILED"
    assert observed.counters.failed == 2 or observed.counters.failed == 1
    assert Counter(engine.codes())["FILE_CHANGED"] >= 4
    assert not (engine.destination / "file").exists()
    assert engine.temporaries() == []


# --- integrity -------------------------------------------------------------------------------------------


class Rotten:
    """A root whose storage changes a bit of what is written, now and then, behind everybody's back."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.lock = threading.Lock()

    def wrap(self, root: Root) -> Root:
        pwrite = root.pwrite

        def rotten(fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
            with self.lock:
                spoil = self.left > 0 and len(data) > 0
                self.left -= spoil
            if spoil:
                changed = bytearray(data)
                changed[len(changed) // 2] ^= 1
                return pwrite(fd, changed, offset)
            return pwrite(fd, data, offset)

        root.pwrite = rotten  # type: ignore[method-assign]
        return root


@pytest.mark.parametrize("times", [1, 3])
async def test_what_the_destination_stores_wrongly_is_found_and_fetched_again(quick_path: Path, times: int) -> None:
    rotten = Rotten(times)
    engine = Engine(quick_path, wrap=rotten.wrap)
    (engine.source / "large").write_bytes(os.urandom(5 * MIB + 3))
    for number in range(4):
        (engine.source / f"small-{number}").write_bytes(os.urandom(5000))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert rotten.left == 0
    told = [event.details for event in engine.events if event.code == "VERIFY_CHECKSUM"]
    assert len(told) == times
    assert all(any(name in details for name in contents(engine.source)) for details in told), told
    assert contents(engine.destination) == contents(engine.source)
    # One block or one small file again for each bad one, and nothing else.
    assert observed.counters.bytes_sent_again <= times * MIB
    print(f"bits flipped on disk: {times}, found: {times}, bytes sent again: {observed.counters.bytes_sent_again}")


@needs_root
async def test_read_back_finds_what_changed_on_the_device_behind_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop device whose backing file is altered after the sync: the page cache still has the right bytes."""
    image, place = tmp_path / "image", tmp_path / "destination"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    place.mkdir()
    made = subprocess.run(["mkfs.ext4", "-q", "-F", image], capture_output=True)
    mounted_loop = made.returncode == 0 and subprocess.run(["mount", "-o", "loop", image, place], capture_output=True)
    if not mounted_loop or mounted_loop.returncode:
        pytest.skip("loop devices cannot be mounted here")
    signature = os.urandom(64)
    altered: list[int] = []
    forget = page_cache.forget

    def alter_first(descriptor: int, offset: int = 0, length: int = 0) -> None:
        # Behind the first sync, and before anything is asked of the device.
        if not altered:
            with image.open("r+b") as device:
                content = device.read()
                where = content.find(signature)
                assert where > 0, "the block is not on the device"
                device.seek(where)
                device.write(bytes(64))
                device.flush()
                os.fsync(device.fileno())
            altered.append(where)
        forget(descriptor, offset, length)

    monkeypatch.setattr(page_cache, "forget", alter_first)
    try:
        engine = Engine(tmp_path)
        body = bytearray(os.urandom(4 * MIB))
        body[2 * MIB + 1000 : 2 * MIB + 1064] = signature
        (engine.source / "large").write_bytes(body)
        observed = await engine.run()
        assert altered
        assert observed.state == "SUCCEEDED", observed
        (event,) = (event for event in engine.events if event.code == "VERIFY_CHECKSUM")
        assert event.details.startswith("Block 2 of large reads back")
        assert observed.counters.bytes_sent_again == MIB
        assert (engine.destination / "large").read_bytes() == bytes(body)
        print(f"altered at {altered[0]}, bytes sent again: {observed.counters.bytes_sent_again}; {event.details}")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


# --- sizes -----------------------------------------------------------------------------------------------


async def test_sizes_at_every_edge(quick_path: Path) -> None:
    sizes = [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 3 * MIB, 16 * MIB + 1]
    engine = Engine(quick_path)
    for size in sizes:
        (engine.source / str(size)).write_bytes(os.urandom(size))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    print(f"sizes: {sizes}")


# --- depth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [300, pytest.param(1500, marks=pytest.mark.soak)])
async def test_a_very_deep_tree_arrives_and_can_be_deleted(quick_path: Path, depth: int) -> None:
    engine = Engine(quick_path)
    dig(engine.source, depth)
    observed = await engine.run(60)
    assert observed.state == "SUCCEEDED", observed
    assert observed.counters.directories == depth + 1
    for folder in (engine.destination, engine.source):
        remover = Engine(
            folder.parent / f"delete-{folder.name}",
            TaskOptions(recursive=True),
            [TaskItem(source_path="/d")],
            type="DELETE",
        )
        remover.destination = folder
        gone = await remover.run(60)
        assert gone.state == "SUCCEEDED", gone
        assert gone.counters.deleted == depth + 1
        assert list(folder.iterdir()) == []


async def test_wildcards_of_a_delete_stand_for_characters(quick_path: Path) -> None:
    """As for every other pattern. Taken for bytes, two of them would name one letter, and delete what was not meant."""
    items = [TaskItem(source_path="/??.txt"), TaskItem(source_path="/[é-î]x")]
    remover = Engine(quick_path, TaskOptions(recursive=True, interpret_globs=True), items, type="DELETE")
    for name in ("é.txt", "ab.txt", "éb.txt", ".a.txt", "êx", "Ãx", "zx"):
        (remover.destination / name).write_bytes(b"")
    observed = await remover.run()
    assert observed.state == "SUCCEEDED", observed
    assert set(contents(remover.destination)) == {"é.txt", ".a.txt", "Ãx", "zx"}


async def test_what_goes_wrong_at_the_destination_is_no_error_of_the_source(quick_path: Path) -> None:
    """Somebody removes the folder into which files come: skipped as errors of the source, the task would have
    succeeded."""
    engine = Engine(
        quick_path, TaskOptions(skip_source_errors=True), plan=fail_nth(1, errno.ENOENT, "create_temporary", times=0)
    )
    (engine.source / "small").write_bytes(b"small")
    (engine.source / "large").write_bytes(bytes(2 * MIB))
    observed = await engine.run()
    assert (observed.state, observed.counters.failed, observed.counters.skipped_errors) == ("FAILED", 2, 0)


def dig(folder: Path, depth: int) -> None:
    """Folders inside one another, a file in the last one; deeper than any path may be long."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def test_removing_knows_no_depth(quick_path: Path) -> None:
    (quick_path / "bystander").write_bytes(b"")
    (quick_path / "tree").mkdir()
    dig(quick_path / "tree", 5000)
    with open_root(str(quick_path)) as root, root.open_directory(()) as folder:
        before = len(os.listdir("/proc/self/fd"))
        removal = Removal()
        removal.entry(folder, folder.lstat(b"tree"), recursive=True)
        assert removal.count == 5002
        assert len(os.listdir("/proc/self/fd")) == before
    assert [path.name for path in quick_path.iterdir()] == ["bystander"]


# --- orphans ---------------------------------------------------------------------------------------------


async def test_temporaries_of_dead_tasks_are_collected_and_young_ones_are_not(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(quick_path)
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"content")
    (engine.destination / "folder").mkdir()
    orphans = [engine.destination / ".towpath.dead.1", engine.destination / "folder" / ".towpath.dead.2"]
    for orphan in orphans:
        orphan.write_bytes(b"left by a task that nobody remembers")
        # A temporary may have its source's time already; that says nothing about its age.
        os.utime(orphan, (0, 0))
    assert (await engine.run()).state == "SUCCEEDED"
    assert all(orphan.exists() for orphan in orphans)
    monkeypatch.setattr("agent.transfer.planning.left_behind.ORPHAN_AGE", -1)
    again = Engine(quick_path / "again", TaskOptions(sync_level=1))
    again.source, again.destination = engine.source, engine.destination
    assert (await again.run()).state == "SUCCEEDED"
    assert not any(orphan.exists() for orphan in orphans)
    assert contents(engine.destination) == contents(engine.source)
    print(f"orphans collected: {len(orphans)}")


async def test_orphans_are_nobodys_extras(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror counts no temporary of a dead task among what it deletes, and nothing lists one."""
    monkeypatch.setattr("agent.transfer.planning.left_behind.ORPHAN_AGE", -1)
    options = TaskOptions(delete_destination_extra=True, delete_destination_extra_limit=1)
    engine = Engine(quick_path, options)
    (engine.source / "file").write_bytes(b"content")
    orphans = [engine.destination / f".towpath.dead.{number}" for number in range(20)]
    for path in (*orphans, engine.source / ".towpath.dead.1", engine.destination / "extra"):
        path.write_bytes(b"left by a task that nobody remembers")
    with open_root(str(engine.destination)) as root, root.open_directory(()) as folder:
        assert [node.name for node in folder.scan()] == [b"extra"]
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (observed.counters.deleted, observed.counters.files) == (1, 1)
    assert contents(engine.destination) == {"file": b"content"}
    print(f"orphans collected: {len(orphans)}, counted as deleted: {observed.counters.deleted}, the extra alone")


async def test_events_say_which_item_they_are_about(quick_path: Path) -> None:
    engine = Engine(quick_path)
    os.mkfifo(engine.source / "pipe")
    await engine.run()
    (told,) = [event.details for event in engine.events if event.code == "UNSUPPORTED_TYPE"]
    assert told.startswith("/pipe: This is a device, pipe or socket")


async def test_a_delete_says_what_it_could_not_delete_and_names_no_other_side(quick_path: Path) -> None:
    items = [TaskItem(source_path="/folder"), TaskItem(source_path="/missing")]
    engine = Engine(quick_path, TaskOptions(recursive=False), items, type="DELETE")
    (engine.destination / "folder").mkdir()
    await engine.run()
    told = {event.code: event.details for event in engine.events}
    assert told["IS_A_DIRECTORY"] == "/folder: This is a folder; it is deleted only with --recursive. (you)"
    assert told["FILE_NOT_FOUND"] == "/missing does not exist. (destination owner)"
    rows = read_page(engine.state / "skipped.manifest", SkippedRow, None, 10, complete=True).rows
    assert [(row.source, row.kind) for row in rows] == [(b"folder", DIRECTORY), (b"missing", -1)]
