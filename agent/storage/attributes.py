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
import struct
import sys
from dataclasses import dataclass, field
from typing import TypeAlias

Attributes: TypeAlias = list[tuple[bytes, bytes]]

# Of one file. The kernel's own bounds are 255 bytes of name, namespace included, and 64 KiB of value.
MOST_ATTRIBUTES = 128
MOST_BYTES = 64 * 1024
LONGEST_NAME = 250
_NAMESPACE = b"user."
_OURS = b"towpath."
_LIST = b"system.posix_acl_access"
# What grants rights to certain accounts.
_RIGHTS = frozenset({_LIST, b"system.posix_acl_default", b"system.nfs4_acl", b"security.capability"})
# Of an access list as the kernel gives it (linux/posix_acl_xattr.h): version, then tag, permission and account of each.
_LIST_VERSION, _LIST_HEADER, _LIST_ENTRY, _OWNING_GROUP = 2, struct.Struct("<I"), struct.Struct("<HHI"), 0x04


@dataclass(frozen=True, slots=True)
class Found:
    """What a file has. ``left_out``: too many, too large, or not to be read; ``rights``: access lists, capabilities."""

    attributes: Attributes = field(default_factory=list)
    left_out: int = 0
    rights: int = 0


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


def mode_without_list(file: int | tuple[int, bytes], mode: int) -> int:
    """A mode whose rights of the group are the group's own, and not the mask of an access list. The file is open, or an
    entry of an open folder. Never raises: what cannot be looked at has no rights that not everybody has."""
    if sys.platform == "linux":
        try:
            found = _list_of(file)
        except OSError as error:
            without = error.errno in (errno.ENODATA, errno.ENOTSUP, errno.ENOSYS)
            return mode if without else mode_of_everybody(mode)
        if len(found) < _LIST_HEADER.size or _LIST_HEADER.unpack_from(found)[0] != _LIST_VERSION:
            return mode_of_everybody(mode)
        entries = found[_LIST_HEADER.size : len(found) - (len(found) - _LIST_HEADER.size) % _LIST_ENTRY.size]
        whose: int
        permission: int
        for whose, permission, _ in _LIST_ENTRY.iter_unpack(entries):
            if whose == _OWNING_GROUP:
                return mode & ~0o070 | mode & permission << 3 & 0o070
        return mode_of_everybody(mode)
    else:  # noqa: RET505 - as above
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
            return os.getxattr(file, _LIST)
        # There is no call for an entry of an open folder before Linux 6.13.
        return os.getxattr(b"/proc/self/fd/%d/%s" % file, _LIST, follow_symlinks=False)

    def _read(fd: int) -> Found:
        try:
            names = os.listxattr(fd)
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS):
                return Found()
            raise
        found: Attributes = []
        left_out = size = rights = 0
        for full in sorted(os.fsencode(name) for name in names):
            rights += full in _RIGHTS
            name = full.removeprefix(_NAMESPACE)
            if name == full or not is_attribute(name):
                continue
            try:
                value = os.getxattr(fd, full)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise
                # Gone meanwhile, or not for this account.
                left_out += error.errno != errno.ENODATA
                continue
            if len(found) >= MOST_ATTRIBUTES or size + len(name) + len(value) > MOST_BYTES:
                left_out += 1
                continue
            size += len(name) + len(value)
            found.append((name, value))
        return Found(found, left_out, rights)
