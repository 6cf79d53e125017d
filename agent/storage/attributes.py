"""Extended attributes of open files and folders: those of the user's own namespace, and no others, on every system.

Names are given without that namespace, so that what comes from a peer cannot even name one of ``security.*``,
``trusted.*`` or ``system.*`` (capabilities, labels, access lists), which grant rights. What the agent itself keeps in
attributes is never read for, or set by, anybody. Where the system has no such calls (macOS and Windows, in Python),
files have no attributes and none can be set.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TypeAlias

Attributes: TypeAlias = list[tuple[bytes, bytes]]

# Of one file. The kernel's own bounds are 255 bytes of name, namespace included, and 64 KiB of value.
MOST_ATTRIBUTES = 128
MOST_BYTES = 64 * 1024
LONGEST_NAME = 250
_NAMESPACE = b"user."
_OURS = b"towpath."


def usable() -> bool:
    """Whether this system has calls for them at all."""
    return sys.platform == "linux"


def is_attribute(name: bytes) -> bool:
    """Whether a name may be that of an attribute which is taken over."""
    return 0 < len(name) <= LONGEST_NAME and b"\0" not in name and not name.startswith(_OURS)


def read(fd: int) -> tuple[Attributes, int]:
    """The attributes of an open file, by name, and how many are left out because there are too many, they are too
    large, or may not be read. Raises OSError."""
    if sys.platform == "linux":
        return _read(fd)
    else:  # noqa: RET505 - mypy takes what follows an `if` of the platform for unreachable
        return [], 0


def write(fd: int, name: bytes, value: bytes) -> None:
    """Set one attribute of an open file. Raises OSError; ENOTSUP where there are none."""
    if not is_attribute(name):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if sys.platform == "linux":
        os.setxattr(fd, _NAMESPACE + name, value)
    else:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


if sys.platform == "linux":

    def _read(fd: int) -> tuple[Attributes, int]:
        try:
            names = os.listxattr(fd)
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS):
                return [], 0
            raise
        found: Attributes = []
        left_out = size = 0
        for full in sorted(os.fsencode(name) for name in names):
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
        return found, left_out
