"""Which file system a folder is on, and whether it is still the one the owner set up."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from dataclasses import dataclass, field, replace

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
# What stands for a marker where none is kept and inodes tell nothing: the UUID that the file system got when it was
# made. The kernel tells it of some (`FS_IOC_GETFSUUID`, Linux 6.9: struct fsuuid2, a length and 16 bytes), udev of all
# on devices, to everybody; where there is neither (containers, other systems) it is not known.
_UUID = "uuid "
_GET_UUID = 0x80111500
_UDEV = "/run/udev/data"
_UDEV_MOST = 64 * 1024
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """Type (empty if not known) and mount point of a file system."""

    file_system: str
    mount_point: str
    # Major and minor number of the device, "0:…" where there is none.
    device: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells a root from the empty folder left when its disk is not mounted. Device numbers change with every
    boot and are left out; the inode is 0 where it does not outlive a mount. The marker is a random word kept as an
    extended attribute of the root, or the volume's number or UUID, empty where there is none of these: another disk in
    the same place does not have it."""

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
    fields = before.split(b" ")
    file_system = after.split(b" ", 1)[0].decode("ascii", "replace")
    return Mount(file_system, os.fsdecode(unescaped(fields[4])), fields[2].decode("ascii", "replace"))


def unescaped(field: bytes) -> bytes:
    """A path as it is, out of a line of /proc/self/mountinfo."""
    return _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field)


def is_local(file_system: str) -> bool:
    """Whether a file system is known to be on this machine."""
    return file_system in _LOCAL


def keeps_inodes(file_system: str) -> bool:
    """Whether the numbers of inodes outlive a mount."""
    return bool(file_system) and file_system not in _UNSTABLE_INODES and not file_system.startswith("fuse")


def mark_of(mount: Mount, inode: int, marker: str = "") -> Mark:
    """The mark of a root folder on this mount."""
    stable = not mount.file_system or keeps_inodes(mount.file_system)
    return Mark(mount.mount_point, mount.file_system, inode if stable else 0, marker)


def look(fd: int, mount: Mount, *, place: bool = False) -> Mark:
    """The mark of an open folder on this mount; with ``place`` it is given a marker if it can hold one."""
    marker = place_marker(fd) if place else read_marker(fd)
    found = mark_of(mount, os.fstat(fd).st_ino, marker)
    if not marker and found.inode <= _LAST_ROOT_INODE:
        return replace(found, marker=_uuid(fd))
    return found


def _uuid(fd: int) -> str:
    """The UUID of the file system that an open folder is on, as a marker; empty where nobody says it."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            length, *uuid = fcntl.ioctl(fd, _GET_UUID, bytes(17))
            if length == len(uuid) and any(uuid):
                digits = bytes(uuid).hex()
                return _UUID + "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    device = os.fstat(fd).st_dev
    return uuid_of_device(f"{os.major(device)}:{os.minor(device)}")


def is_alike(mark: Mark) -> bool:
    """Whether another disk of the same type, mounted in the same place, could not be told from this one. File servers,
    of which nobody expects it, are not meant."""
    on_disk = is_local(mark.file_system) and mark.file_system not in ("overlay", "ramfs", "tmpfs")
    return (on_disk or mark.file_system == "fuseblk") and not mark.marker and mark.inode <= _LAST_ROOT_INODE


def uuid_of_device(device: str) -> str:
    """The UUID of the file system on a device, by its numbers, as a marker; empty where udev does not know it. Nothing
    of the file system is touched."""
    major, _, minor = device.partition(":")
    if not (major.isdigit() and minor.isdigit()) or major == "0":
        return ""
    try:
        with open(f"{_UDEV}/b{major}:{minor}", "rb") as lines:
            known = lines.read(_UDEV_MOST)
    except OSError:
        return ""
    found = re.search(rb"^E:ID_FS_UUID=([\x21-\x7e]{1,64})$", known, re.MULTILINE)
    return _UUID + found[1].decode() if found else ""


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
    if expected.marker.startswith((_VOLUME, _UUID)):
        # That of all folders of the volume.
        return not _is_another_volume(expected.marker, found.marker) and expected.inode > _LAST_ROOT_INODE
    if expected.marker:
        return expected.marker == found.marker
    return expected.inode > _LAST_ROOT_INODE


def _is_another_volume(expected: str, found: str) -> bool:
    """By the markers. The kernel always tells the number of a volume; a UUID may not be told today."""
    if expected.startswith(_UUID):
        return found.startswith(_UUID) and found != expected
    return expected.startswith(_VOLUME) and found != expected


def difference(expected: Mark, found: Mark, *, strict: bool = True, places: bool = True) -> str:
    """Why the folder found is not the one expected, as the end of a sentence; empty if it is. Without ``places`` it
    names no path of this machine.

    Without ``strict`` only the disk counts: a folder that was made anew in the same place is its owner's doing.
    """
    if expected.mount_point != found.mount_point and not _same_folder(expected, found):
        where = f"the disk mounted at {expected.mount_point} as" if places else "the disk that it was on"
        return f"is not on {where} when it was set up"
    if expected.file_system != found.file_system:
        return f"is on a file system of type {found.file_system}, not {expected.file_system} as when it was set up"
    if _is_another_volume(expected.marker, found.marker):
        kind, _, number = expected.marker.partition(" ")
        called = "number" if f"{kind} " == _VOLUME else "UUID"
        return f"is not on the volume it was on when it was set up, with the {called} {number}"
    if not strict:
        return ""
    if expected.inode != found.inode:
        return "is not the folder it was when it was set up"
    marked = expected.marker and not expected.marker.startswith(_UUID)
    if marked and expected.marker != found.marker:
        return "is not the folder it was when it was set up (its marker, an extended attribute, is missing or another)"
    return ""
