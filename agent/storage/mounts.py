"""Which file system a folder is on, and whether it is still the one the owner set up."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from dataclasses import dataclass

# File systems on a disk (or in the memory) of this machine. On any other, what another machine does with a sync or a
# link is not ours to say, so nothing is assumed.
# fmt: off
_LOCAL = frozenset({
    "apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "msdos", "nilfs2", "ntfs",
    "ntfs3", "overlay", "ramfs", "reiserfs", "tmpfs", "ufs", "vfat", "xfs", "zfs",
})
# fmt: on
# Inode numbers that do not outlive a mount.
_UNSTABLE_INODES = frozenset({"exfat", "msdos", "ntfs", "ntfs3", "overlay", "vfat"})
_MARKER = "user.towpath.root"
_MARKER_LENGTH = 64
# What stands for a marker where no attributes can be kept: the number that a FAT volume got when it was formatted.
_VOLUME = "volume "
# `FAT_IOCTL_GET_VOLUME_ID`, of an open folder, for everybody; see ioctl_fat(2). It means nothing elsewhere.
_GET_VOLUME_ID = 0x80047213
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """Type (empty if not known) and mount point of a file system."""

    file_system: str
    mount_point: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells a root from the empty folder left when its disk is not mounted. Device numbers change with every
    boot and are left out; the inode is 0 where it does not outlive a mount. The marker is a random word kept as an
    extended attribute of the root, or the volume's number, empty where there is neither: another disk in the same place
    does not have it."""

    mount_point: str
    file_system: str
    inode: int
    marker: str = ""


def mount_of(fd: int, path: str) -> Mount:
    """The mount an open folder is on; by the kernel's mount table where there is one, else by walking up."""
    try:
        number = number_of(fd)
        with open("/proc/self/mountinfo", "rb") as lines:
            return next(parse_mount(line) for line in lines if line.split(b" ", 1)[0] == number)
    except (FileNotFoundError, StopIteration):
        point = os.path.realpath(path)
        while not os.path.ismount(point):
            point = os.path.dirname(point)
        return Mount("", point)


def number_of(fd: int) -> bytes:
    """The number of the mount an open folder is on, as text. Raises FileNotFoundError or StopIteration where the system
    does not say so."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        return next(line.split()[1] for line in lines if line.startswith(b"mnt_id:"))


def parse_mount(line: bytes) -> Mount:
    """A line of /proc/self/mountinfo."""
    # proc(5): id, parent, device, root, mount point, options, optional fields, "-", type, source, options.
    before, _, after = line.partition(b" - ")
    point = unescaped(before.split(b" ")[4])
    return Mount(after.split(b" ", 1)[0].decode("ascii", "replace"), os.fsdecode(point))


def unescaped(field: bytes) -> bytes:
    """A path as it is, out of a line of /proc/self/mountinfo."""
    return _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field)


def is_local(file_system: str) -> bool:
    """Whether a file system is known to be on this machine."""
    return file_system in _LOCAL


def mark_of(mount: Mount, inode: int, marker: str = "") -> Mark:
    """The mark of a root folder on this mount."""
    stable = mount.file_system not in _UNSTABLE_INODES and not mount.file_system.startswith("fuse")
    return Mark(mount.mount_point, mount.file_system, inode if stable else 0, marker)


def read_marker(fd: int) -> str:
    """The marker of an open folder; empty where there is none or where there can be none."""
    if sys.platform == "linux":
        try:
            return os.getxattr(fd, _MARKER)[:_MARKER_LENGTH].decode("ascii", "replace")
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return _volume(fd)
            # No such attribute, or no permission to look: all the same here.
    return ""


def _volume(fd: int) -> str:
    """The number of the volume that an open folder is on, empty where it has none."""
    import fcntl

    with contextlib.suppress(OSError):
        number = int.from_bytes(fcntl.ioctl(fd, _GET_VOLUME_ID, bytes(4)), sys.byteorder)
        # As it is shown everywhere.
        return f"{_VOLUME}{number >> 16:04X}-{number & 0xFFFF:04X}" if number else ""
    return ""


def place_marker(fd: int) -> str:
    """Give an open folder a marker unless it has one. The marker, empty where it cannot be kept."""
    known = read_marker(fd)
    if sys.platform == "linux" and not known:
        # A folder that may only be read, or a file system without attributes: mount and inode must do.
        with contextlib.suppress(OSError):
            os.setxattr(fd, _MARKER, os.urandom(16).hex().encode(), os.XATTR_CREATE)
        return read_marker(fd)
    return known


# Roots of file systems have the same low numbers everywhere.
_LAST_ROOT_INODE = 256


def _same_folder(expected: Mark, found: Mark) -> bool:
    """Whether it is the very folder, reached by another mount: a service's sandbox shows folders through bind mounts.

    The empty folder below a missing disk has neither the disk's marker nor, but for the roots of file systems, an
    inode of the same number. Where numbers do not last, the marker alone has to show it.
    """
    if (expected.file_system, expected.inode) != (found.file_system, found.inode):
        return False
    if expected.marker:
        # The number of a volume is that of all its folders.
        return expected.marker == found.marker and not expected.marker.startswith(_VOLUME)
    return expected.inode > _LAST_ROOT_INODE


def difference(expected: Mark, found: Mark, *, strict: bool = True) -> str:
    """Why the folder found is not the one expected, as the end of a sentence; empty if it is.

    Without ``strict`` only the disk counts: a folder that was made anew in the same place is its owner's doing.
    """
    if expected.mount_point != found.mount_point and not _same_folder(expected, found):
        return f"is not on the disk mounted at {expected.mount_point} as when it was set up"
    if expected.file_system != found.file_system:
        return f"is on a file system of type {found.file_system}, not {expected.file_system} as when it was set up"
    numbered = expected.marker.startswith(_VOLUME)
    if numbered and expected.marker != found.marker:
        return f"is not on the volume it was on when it was set up, with the number {expected.marker[len(_VOLUME) :]}"
    if not strict:
        return ""
    if expected.inode != found.inode:
        return "is not the folder it was when it was set up"
    if expected.marker and expected.marker != found.marker:
        return "is not the folder it was when it was set up (its marker, an extended attribute, is missing or another)"
    return ""
