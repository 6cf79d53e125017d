"""One entry of a folder, and the times and the version of a file, as the system tells them."""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from typing import Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["file", "dir", "symlink", "chr", "blk", "pipe", "other"]
Version: TypeAlias = tuple[int, int, int, int, int]

_KINDS: dict[int, Kind] = {
    stat_bits.S_IFREG: "file",
    stat_bits.S_IFDIR: "dir",
    stat_bits.S_IFLNK: "symlink",
    stat_bits.S_IFCHR: "chr",
    stat_bits.S_IFBLK: "blk",
    stat_bits.S_IFIFO: "pipe",
}


class Node(msgspec.Struct, frozen=True, gc=False):
    """One directory entry as `lstat` (or `stat`) saw it. Sizes in bytes, times in nanoseconds since 1970."""

    name: bytes
    kind: Kind
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int
    mode: int
    uid: int
    gid: int
    nlink: int

    @property
    def version(self) -> Version:
        """Changes whenever the content may have: device, inode, size, mtime_ns, ctime_ns."""
        return (self.device, self.inode, self.size, self.mtime_ns, self.ctime_ns)


# What 64 bits hold, of nanoseconds since 1970: the years 1677 to 2262. Some file systems keep others (Btrfs, tmpfs).
_EARLIEST, _LATEST = -(1 << 63), (1 << 63) - 1


def nearest_time(mtime_ns: int) -> int:
    """The time itself, or the nearest one that can be told and written down."""
    return mtime_ns if _EARLIEST <= mtime_ns <= _LATEST else max(_EARLIEST, min(mtime_ns, _LATEST))


def mtime_of(status: os.stat_result) -> int:
    """The modification time of a stat result, as `nearest_time` has it."""
    mtime_ns = status.st_mtime_ns
    # One call less for every file of a tree.
    return mtime_ns if _EARLIEST <= mtime_ns <= _LATEST else nearest_time(mtime_ns)


def ctime_of(status: os.stat_result) -> int:
    """The time of the last change of a stat result, as `nearest_time` has it: clocks were wrong, and servers lie."""
    ctime_ns = status.st_ctime_ns
    return ctime_ns if _EARLIEST <= ctime_ns <= _LATEST else nearest_time(ctime_ns)


def node_from_stat(name: bytes, status: os.stat_result) -> Node:
    """The node of a stat result; the file type bits are left out of its mode."""
    mode = status.st_mode
    return Node(
        name,
        _KINDS.get(mode & 0o170000, "other"),
        status.st_size,
        mtime_of(status),
        ctime_of(status),
        status.st_dev,
        status.st_ino,
        mode & 0o7777,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
    )


def version_of(status: os.stat_result) -> Version:
    """`Node.version` of a stat result, for example of `os.fstat` on an open file."""
    return (status.st_dev, status.st_ino, status.st_size, mtime_of(status), ctime_of(status))


def checked_time(mtime_ns: int) -> int:
    """The time itself if 64 bits hold it, else EINVAL: a peer's time must not become an `OverflowError`."""
    if not _EARLIEST <= mtime_ns <= _LATEST:
        raise OSError(errno.EINVAL, "is given a time that no file can have")
    return mtime_ns
