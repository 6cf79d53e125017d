"""Giving one file a part of another one, both open: by sharing its blocks on the disk, which writes nothing, or by a
copy that need not come through this machine's network."""

from __future__ import annotations

import errno
import os
import platform
import struct
import sys

# _IOW(0x94, 13, struct file_clone_range) of linux/fs.h: source, its offset, length, offset here.
_CLONE_RANGE, _ARGUMENT = 0x4020940D, struct.Struct("=qQQQ")
# Where requests are numbered otherwise.
_ELSEWHERE = ("alpha", "mips", "parisc", "ppc", "sparc")
# That it cannot be done here at all: no such call, not on this file system, not between these two.
NEVER = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EXDEV, errno.EPERM})
# That it cannot be done with this part: not on the borders of the file system's blocks, or the file is swapped to.
NOT_THIS = frozenset({errno.EINVAL, errno.ETXTBSY})


def clone_range(source: int, target: int, offset: int, length: int) -> None:
    """Have a part of an open file share its blocks with the same part of another one. Both keep their own content
    whatever is written to either later. Raises OSError; one of `NEVER` or `NOT_THIS` where another way must be taken.
    """
    if sys.platform == "linux" and not platform.machine().startswith(_ELSEWHERE):
        import fcntl

        fcntl.ioctl(target, _CLONE_RANGE, _ARGUMENT.pack(source, offset, length, offset))
    else:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def copy_range(source: int, target: int, offset: int, length: int) -> int:
    """Copy a part of an open file to the same part of another one inside the system, which a file server does by
    itself: how much was copied, 0 at the end of the file. Raises OSError as `clone_range` does."""
    if sys.platform == "linux":
        return os.copy_file_range(source, target, length, offset, offset)
    else:  # noqa: RET505 - mypy takes what follows an `if` of the platform for unreachable
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
