"""How POSIX files and folders are opened, looked at and synced: flags with their reasons, and single steps."""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import sys
import time
from collections.abc import Callable

from agent.storage import libc
from agent.storage.base import PERMISSION_BITS, NotRegularFile, component
from agent.storage.node import checked_time
from protocol.folder_sync import NO_FOLDER_SYNC

# O_PATH needs no read permission on folders that are only passed through (0711 home directories).
PATH_ONLY: int | None = getattr(os, "O_PATH", None)
# Whether this system opens names relative to an open folder without following links. Where it does not (Windows), a
# path that was checked may lead elsewhere a moment later, so nothing is offered from there at all.
USABLE = hasattr(os, "O_NOFOLLOW") and hasattr(os, "O_DIRECTORY") and os.open in os.supports_dir_fd
if USABLE:
    _ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC
    # O_NONBLOCK: opening a pipe or a serial line must never wait for the other end.
    _NO_WAIT = os.O_NONBLOCK | os.O_NOCTTY | _ALWAYS
    _FOLDER = os.O_DIRECTORY | _ALWAYS
else:
    _ALWAYS = _NO_WAIT = _FOLDER = 0
LOOKUP = (PATH_ONLY or os.O_RDONLY) | _FOLDER
FOLDER = os.O_RDONLY | _FOLDER
READ = os.O_RDONLY | _NO_WAIT
REOPEN = os.O_RDWR | _NO_WAIT
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | _ALWAYS
# What kernels say when O_NOFOLLOW meets a symlink (Linux, macOS, FreeBSD); ENOTDIR only with O_DIRECTORY.
LINK = frozenset({errno.ELOOP, errno.EMLINK})
PERHAPS_LINK = LINK | {errno.ENOTDIR}
# How file systems of macOS that are not Apple's own refuse a sync through the drive's cache.
_NO_FULL_SYNC = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})


def os_error(code: int) -> OSError:
    """The `OSError` the system would raise with this number."""
    return OSError(code, os.strerror(code))


def opening(error: OSError) -> OSError:
    """The error of a failed open; ENXIO and ENODEV are how sockets and absent devices refuse."""
    return NotRegularFile() if error.errno in (errno.ENXIO, errno.ENODEV) else error


def regular(fd: int) -> os.stat_result:
    """The status of an open file if it is regular; otherwise it is closed and the reason raised."""
    status = os.fstat(fd)
    try:
        check_regular(status)
    except OSError:
        os.close(fd)
        raise
    return status


def open_temporary(fd: int, name: bytes) -> int:
    """Open a temporary in a folder: regular, ours, no second hard link, else `NotRegularFile`. One that may not be
    written any more is opened for reading and syncing only."""
    try:
        handle = os.open(component(name), REOPEN, dir_fd=fd)
    except PermissionError:
        handle = os.open(name, READ, dir_fd=fd)
    except OSError as error:
        raise opening(error) from error
    status = regular(handle)
    # Whoever owns it, or holds another name of it, could change it after it was verified.
    if not status.st_nlink:
        # Removed a moment ago.
        os.close(handle)
        raise os_error(errno.ENOENT)
    if status.st_nlink != 1 or status.st_uid != os.geteuid():
        os.close(handle)
        raise NotRegularFile("is not a temporary of this agent alone")
    return handle


def create_temporary(fd: int, name: bytes, mode: int) -> int:
    """Create a file that must not exist (EEXIST) in a folder, for reading and writing."""
    return os.open(component(name), CREATE, mode & PERMISSION_BITS, dir_fd=fd)


def fill_temporary(handle: int, content: memoryview, mtime_ns: int | None, pwrite: Callable[..., int]) -> int:
    """Write all of a new temporary, date it (None: leave it at now), and give its descriptor back, which is closed
    after an error."""
    try:
        written, size = 0, len(content)
        while written < size:
            written += pwrite(handle, content[written:] if written else content, written)
        if mtime_ns is not None:
            os.utime(handle, ns=(time.time_ns(), checked_time(mtime_ns)))
    except BaseException:
        os.close(handle)
        raise
    return handle


def check_regular(status: os.stat_result) -> None:
    """Raises EISDIR for a folder, `NotRegularFile` for what is neither that nor a regular file."""
    if not stat_bits.S_ISREG(status.st_mode):
        raise os_error(errno.EISDIR) if stat_bits.S_ISDIR(status.st_mode) else NotRegularFile()


def set_times(fd: int, name: bytes, mtime_ns: int) -> None:
    """Set the times of a name in a folder, not following it."""
    os.utime(name, ns=(time.time_ns(), checked_time(mtime_ns)), dir_fd=fd, follow_symlinks=False)


def set_mode(fd: int, name: bytes, mode: int) -> None:
    """Set the mode of a file or folder, not following it and opening nothing that reacts to being opened.

    Raises `NotRegularFile` for anything else, and what the system says."""
    flags = PATH_ONLY | os.O_NOFOLLOW | os.O_CLOEXEC if PATH_ONLY else READ
    handle = os.open(name, flags, dir_fd=fd)
    try:
        kind = os.fstat(handle).st_mode
        if not (stat_bits.S_ISREG(kind) or stat_bits.S_ISDIR(kind)):
            raise NotRegularFile("is neither a file nor a folder")
        if PATH_ONLY and os.path.isdir("/proc/self/fd"):
            # fchmod refuses such handles; through /proc it reaches the very file that was looked at.
            os.chmod(f"/proc/self/fd/{handle}", mode)
        elif PATH_ONLY:
            _fchmod(fd, name, mode)
        else:
            os.fchmod(handle, mode)
    finally:
        os.close(handle)


def _fchmod(fd: int, name: bytes, mode: int) -> None:
    """Set the mode where /proc is not mounted; this needs read permission."""
    handle = os.open(name, READ, dir_fd=fd)
    try:
        os.fchmod(handle, mode)
    finally:
        os.close(handle)


def sync_handle(fd: int) -> None:
    """Make an open file or folder durable."""
    if sys.platform == "darwin":
        import fcntl

        # fsync on macOS only reaches the drive's cache.
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:
                raise
            os.fsync(fd)
    else:
        os.fsync(fd)


def sync_folder(fd: int) -> None:
    """Make the entries of a folder durable, given any handle of it; together with all else where its file system knows
    no such step for a folder alone."""
    try:
        handle = os.open(b".", FOLDER, dir_fd=fd)
    except PermissionError:
        # A folder that may be written but not read cannot be synced alone.
        os.sync()
        return
    try:
        sync_handle(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        if libc.has_syncfs():
            libc.syncfs(handle)
        else:
            os.sync()
    finally:
        os.close(handle)
