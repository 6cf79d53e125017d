"""Renaming without ever replacing something: in one step where the system and the file system have a call for it, else
with as little at risk as there can be."""

from __future__ import annotations

import errno
import os
import stat as stat_bits

from agent.storage import libc
from agent.storage.handles import os_error


def rename_no_replace(old_fd: int, old: bytes, new_fd: int, new: bytes) -> None:
    """Rename a name in one open folder to a name in another. Raises OSError, EEXIST if that is taken."""
    try:
        libc.rename_no_replace(old_fd, old, new_fd, new)
    except OSError as error:
        # EINVAL may also mean a folder moved into itself, which the plain way says again.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        _in_steps(old_fd, old, new_fd, new)


def _in_steps(old_fd: int, old: bytes, new_fd: int, new: bytes) -> None:
    if stat_bits.S_ISDIR(os.stat(old, dir_fd=old_fd, follow_symlinks=False).st_mode):
        # A folder cannot be hard-linked. A rename replaces nothing but an empty folder, so no data is at risk.
        if _exists(new_fd, new):
            raise os_error(errno.EEXIST)
        os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        return
    try:
        os.link(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # Neither call: looking first is all that is left.
        if _exists(new_fd, new):
            raise os_error(errno.EEXIST) from error
        os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        return
    os.unlink(old, dir_fd=old_fd)


def _exists(fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
