"""The few calls of the C library that Python does not offer: ``syncfs`` and renames that never replace."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys

_RENAME_NOREPLACE = 1  # linux/fs.h
_RENAME_EXCL = 4  # sys/stdio.h of macOS


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def has_syncfs() -> bool:
    """Whether `syncfs` works here."""
    return sys.platform == "linux" and hasattr(_library(), "syncfs")


def syncfs(fd: int) -> None:
    """Make everything written to the file system of ``fd`` durable (Linux). Since Linux 5.8 it reports write errors.

    Raises OSError, ENOTSUP elsewhere."""
    if not has_syncfs():
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    _check(_library().syncfs(fd))


def has_rename_no_replace() -> bool:
    """Whether `rename_no_replace` exists here; a file system may still refuse it with EINVAL."""
    return hasattr(_library(), "renameat2") or hasattr(_library(), "renameatx_np")


def rename_no_replace(old_fd: int, old: bytes, new_fd: int, new: bytes) -> None:
    """Rename, with EEXIST if the new name is taken; one atomic step. Raises OSError, ENOTSUP where there is none."""
    if hasattr(_library(), "renameat2"):
        _check(_library().renameat2(old_fd, old, new_fd, new, ctypes.c_uint(_RENAME_NOREPLACE)))
    elif hasattr(_library(), "renameatx_np"):
        _check(_library().renameatx_np(old_fd, old, new_fd, new, ctypes.c_uint(_RENAME_EXCL)))
    else:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
