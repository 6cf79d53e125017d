"""Extended attributes of open files and folders: those of the user's own namespace, and no others, on every system.

Names are given without that namespace, so that what comes from a peer cannot even name one of ``security.*``,
``trusted.*`` or ``system.*`` (capabilities, labels, access lists), which grant rights. Access lists and capabilities
are counted: they name accounts of one machine and would mean somebody else on another. Labels are the machine's own
affair. What the agent itself keeps in attributes is never read for, or set by, anybody. Where the system has no such
calls (macOS and Windows, in Python), files have no attributes and none can be set.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass, field
from typing import TypeAlias

from agent.storage import access_lists

Attributes: TypeAlias = list[tuple[bytes, bytes]]

# Of one file. The kernel's own bounds are 255 bytes of name, namespace included, and 64 KiB of value.
MOST_ATTRIBUTES = 128
MOST_BYTES = 64 * 1024
LONGEST_NAME = 250
_NAMESPACE = b"user."
_OURS = b"towpath."
# What grants rights to certain accounts.
_LISTS = frozenset({access_lists.ACCESS, access_lists.DEFAULT, access_lists.NFS4})
_RIGHTS = _LISTS | {b"security.capability"}


@dataclass(frozen=True, slots=True)
class Found:
    """What a file has. ``left_out``: too many, too large, or not to be read; ``rights``: access lists, capabilities;
    ``lists``: the access lists among them."""

    attributes: Attributes = field(default_factory=list)
    left_out: int = 0
    rights: int = 0
    lists: int = 0


def usable() -> bool:
    """Whether this system has calls for them at all."""
    return sys.platform == "linux"


def is_attribute(name: bytes) -> bool:
    """Whether a name may be that of an attribute which is taken over."""
    return 0 < len(name) <= LONGEST_NAME and b"\0" not in name and not name.startswith(_OURS)


def read(fd: int) -> Found:
    """The attributes of an open file, by name. Raises OSError."""
    if sys.platform == "linux":
        return _read(fd)
    else:  # noqa: RET505 - mypy takes what follows an `if` of the platform for unreachable
        return Found()


def mode_of_everybody(mode: int) -> int:
    """A mode without the rights of the group that not everybody has."""
    return mode & ~0o070 | mode & mode << 3 & 0o070


def needs_look(kind: str, mode: int) -> bool:
    """Whether it matters if something has an access list. Rights of the group that everybody has anyway cannot be too
    many, which spares most files the look."""
    return kind == "file" and bool(mode >> 3 & 7 & ~mode)


def mode_without_list(file: int | tuple[int, bytes], mode: int) -> int:
    """A mode whose rights of the group are the group's own, and not the mask of an access list. The file is open, or an
    entry of an open folder. Raises OSError, EINVAL for a list that cannot be understood."""
    if sys.platform == "linux":
        try:
            found = _list_of(file)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.ENOSYS):
                return mode
            raise
        header, row = access_lists.HEADER, access_lists.ROW
        if len(found) < header.size or header.unpack_from(found)[0] != access_lists.VERSION:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        rows = found[header.size : len(found) - (len(found) - header.size) % row.size]
        whose: int
        permission: int
        for whose, permission, _ in row.iter_unpack(rows):
            if whose == access_lists.OWNING_GROUP:
                return mode & ~0o070 | mode & permission << 3 & 0o070
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    else:  # noqa: RET506 - as above
        return mode


def write(fd: int, name: bytes, value: bytes) -> None:
    """Set one attribute of an open file. Raises OSError; ENOTSUP where there are none."""
    if not is_attribute(name):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if sys.platform == "linux":
        os.setxattr(fd, _NAMESPACE + name, value)
    else:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


if sys.platform == "linux":

    def _list_of(file: int | tuple[int, bytes]) -> bytes:
        if isinstance(file, int):
            return os.getxattr(file, access_lists.ACCESS)
        # There is no call for an entry of an open folder before Linux 6.13.
        try:
            return os.getxattr(b"/proc/self/fd/%d/%s" % file, access_lists.ACCESS, follow_symlinks=False)
        except FileNotFoundError:
            # Gone meanwhile; or there is no /proc here.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(file[1], flags, dir_fd=file[0])
            try:
                return os.getxattr(fd, access_lists.ACCESS)
            finally:
                os.close(fd)

    def _read(fd: int) -> Found:
        try:
            names = os.listxattr(fd)
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS):
                return Found()
            raise
        found: Attributes = []
        left_out = size = rights = lists = 0
        for full in sorted(os.fsencode(name) for name in names):
            rights += full in _RIGHTS
            lists += full in _LISTS
            name = full.removeprefix(_NAMESPACE)
            if name == full or not is_attribute(name):
                continue
            try:
                value = os.getxattr(fd, full)
            except OSError as error:
                if error.errno != errno.ENODATA and error.errno not in access_lists.REFUSED:
                    raise
                # Gone meanwhile, or not for this account.
                left_out += error.errno != errno.ENODATA
                continue
            if len(found) >= MOST_ATTRIBUTES or size + len(name) + len(value) > MOST_BYTES:
                left_out += 1
                continue
            size += len(name) + len(value)
            found.append((name, value))
        return Found(found, left_out, rights, lists)
