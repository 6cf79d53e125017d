"""File systems mounted below a root, and whether each is still there: the folder left when a disk is not mounted is not
an empty folder of the collection, and what is written into it is not on the disk.

The table of mounts says which there are (`look`); it also knows bind mounts, although they have the device
of what they show. They are remembered with the root (`agent.collections.Marks`), and a worker enters a remembered
folder only while the same disk is there (`Disks.check`). Mounts that come and go by themselves are not remembered.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from agent.storage import mounts
from agent.storage.mounts import Mark, Mount
from protocol.names import CollectionPath

# So many are remembered below one root.
MOST = 256
# The codes of `DiskAway`.
DISK_MISSING, DISK_REPLACED = "DISK_MISSING", "DISK_REPLACED"

# File systems of the kernel, of containers, packages and desktops: there today and gone tomorrow, and nobody's disks.
# fmt: off
_FLEETING = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devfs", "devpts", "devtmpfs",
    "efivarfs", "fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal", "fuse.snapfuse", "fusectl", "hugetlbfs", "mqueue",
    "nsfs", "overlay", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs", "squashfs", "sysfs",
    "tracefs",
})
# fmt: on
# Made anew with every mount, so nothing in them tells one from the next. A folder in memory does not outlast a restart,
# and neither does what is mounted on it (/run).
_IN_MEMORY = frozenset({"ramfs", "tmpfs"})


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system mounted at a folder below a root, as it was when it was first seen there."""

    path: CollectionPath
    mark: Mark


class DiskAway(OSError):
    """What was mounted below the root is not mounted (`DISK_MISSING`), or something else is (`DISK_REPLACED`)."""

    def __init__(self, path: CollectionPath, code: str = DISK_MISSING) -> None:
        super().__init__(errno.ENODEV, "is not on the disk that was mounted there")
        self.path = path
        self.code = code


def verdict(expected: Mark, found: Mark) -> str:
    """The code of what is wrong with what is mounted at a remembered folder; empty if it is the same disk."""
    if not mounts.difference(expected, found):
        return ""
    return DISK_MISSING if expected.mount_point != found.mount_point else DISK_REPLACED


class Disks:
    """The disks remembered below one root. Never changes; may be asked from several threads."""

    def __init__(self, disks: Iterable[Disk] = ()) -> None:
        self._marks = {disk.path: disk.mark for disk in disks}
        ways: defaultdict[CollectionPath, dict[bytes, CollectionPath]] = defaultdict(dict)
        for path in self._marks:
            for depth, name in enumerate(path):
                ways[path[:depth]].setdefault(name, path)
        self._ways = dict(ways)

    def __bool__(self) -> bool:
        return bool(self._marks)

    def check(self, fd: int, path: CollectionPath) -> None:
        """Raise `DiskAway` unless an open folder, which may be open for lookups only, is on the disk that was mounted
        there, if any was."""
        expected = self._marks.get(path)
        if expected is None:
            return
        code = verdict(*_comparable(fd, expected))
        if code:
            raise DiskAway(path, code)

    def tokens(self) -> dict[CollectionPath, str]:
        """What tells each disk from another one in its place, by its folder."""
        return {path: f"{mark.inode} {mark.marker}" for path, mark in self._marks.items()}

    def ways(self, path: CollectionPath) -> Iterator[tuple[bytes, CollectionPath]]:
        """The names in a folder that lead to disks below it, with one of those disks each."""
        yield from self._ways.get(path, {}).items()


def _comparable(fd: int, expected: Mark) -> tuple[Mark, Mark]:
    """What was expected and what an open folder is, as far as can be told now."""
    mount = mounts.mount_of(fd, expected.mount_point)
    if not _has_identity(mount.file_system):
        return expected, Mark(mount.mount_point, mount.file_system, 0, mounts.uuid_of_device(mount.device))
    try:
        # The marker cannot be read through a handle for lookups.
        readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except PermissionError:
        return replace(expected, marker=""), mounts.mark_of(mount, os.fstat(fd).st_ino)
    try:
        return expected, mounts.look(readable, mount)
    finally:
        os.close(readable)


def _has_identity(file_system: str) -> bool:
    return mounts.is_local(file_system) and file_system not in _IN_MEMORY


# --- what is mounted now -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of the table of mounts: its number, that of the mount it stands on, where, and on which device."""

    number: int
    parent: int
    point: bytes
    file_system: str
    device: str = ""


def mounted_below(table: Iterable[Mounted], number: int, top: bytes) -> list[Mounted]:
    """The mounts that can be reached from the one with this number (the root's) and lie below a folder of it: of
    several at one place the last; none that comes and goes by itself, and none that stands on such a one."""
    standing: defaultdict[int, list[Mounted]] = defaultdict(list)
    for row in table:
        if row.number != row.parent:
            standing[row.parent].append(row)
    above = top.rstrip(b"/") + b"/"
    found: dict[bytes, Mounted] = {}
    waiting = [number]
    seen = {number}
    while waiting:
        for row in standing[waiting.pop()]:
            # The kernel says so of a place that somebody has removed.
            if not row.point.startswith(above) or row.point.endswith(b"//deleted"):
                continue
            # Mounted by ZFS when somebody looks.
            if b"/.zfs/snapshot/" in row.point:
                continue
            stack = list(_stacked(row, standing))
            if not seen.isdisjoint(one.number for one in stack):
                continue
            seen.update(one.number for one in stack)
            # A file system on one of autofs is mounted when somebody looks.
            if any(one.file_system == "autofs" for one in stack) or stack[-1].file_system in _FLEETING:
                continue
            found[row.point] = stack[-1]
            if stack[-1].file_system not in _IN_MEMORY:
                waiting.append(stack[-1].number)
    return sorted(found.values(), key=lambda row: row.point)


def _stacked(row: Mounted, standing: defaultdict[int, list[Mounted]]) -> Iterator[Mounted]:
    """A mount, and those mounted over it in the same place, the last one last."""
    for _ in range(MOST):
        yield row
        over = [other for other in standing[row.number] if other.point == row.point]
        if not over:
            return
        row = over[-1]


def look(fd: int, top: str, known: Collection[CollectionPath], *, place: bool) -> list[Disk]:
    """The disks mounted below an open root, those excepted that are known already. ``top`` is its real path; with
    ``place`` disks of this machine are given a marker where they can hold one.

    Blocks, though not for file servers: those are not touched. Raises OSError where the table cannot be read.
    """
    disks = []
    start = os.fsencode(top).rstrip(b"/")
    for row in mounted_below(*_table(fd), os.fsencode(top)):
        path = tuple(row.point[len(start) + 1 :].split(b"/"))
        if path in known:
            continue
        # What vanishes meanwhile, or may not be looked at, is not remembered; nor is a place without a name in Unicode,
        # since marks are kept and handed over as text.
        with suppress(OSError, UnicodeError):
            row.point.decode()
            mark = _mark(row, place=place)
            if mark is not None:
                disks.append(Disk(path, mark))
    return disks


def _mark(row: Mounted, *, place: bool) -> Mark | None:
    point = os.fsdecode(row.point)
    if not mounts.is_local(row.file_system):
        return Mark(point, row.file_system, 0, mounts.uuid_of_device(row.device))
    # Not what is mounted over a file, as containers do.
    fd = os.open(row.point, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mount = mounts.mount_of(fd, point)
        if mount != Mount(row.file_system, point):
            return None
        if not _has_identity(row.file_system):
            return Mark(point, row.file_system, 0)
        return mounts.look(fd, mount, place=place)
    finally:
        os.close(fd)


def _table(fd: int) -> tuple[list[Mounted], int]:
    """The mounts of this process, and the number of the one that an open folder is on."""
    try:
        number = int(mounts.number_of(fd))
        with open("/proc/self/mountinfo", "rb") as lines:
            return [_row(line) for line in lines], number
    except (FileNotFoundError, StopIteration):
        # A system without that table: which mount stands on which is not known there.
        import psutil

        rows = psutil.disk_partitions(all=True)
        return [Mounted(n, 0, os.fsencode(row.mountpoint), row.fstype) for n, row in enumerate(rows, 1)], 0


def _row(line: bytes) -> Mounted:
    number, parent, _ = line.split(b" ", 2)
    mount = mounts.parse_mount(line)
    return Mounted(int(number), int(parent), os.fsencode(mount.mount_point), mount.file_system, mount.device)
