"""POSIX storage, confined to one root.

Every path is walked component by component, each relative to the handle of the folder before it and with
O_NOFOLLOW. A symlink on the way is read and resolved here, against the root, and the walk starts again from the
root's handle; ``..`` is never given to the kernel, so that a folder moved away during the walk leads nowhere.
`PosixRoot._walk` is the only place that resolves anything.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_bits
import sys
import time
from collections.abc import Iterator, Sequence

from agent.storage import libc, mounts
from agent.storage.base import (
    MAX_LINKS,
    PERMISSION_BITS,
    Directory,
    Features,
    IllegalName,
    LeavesCollection,
    Node,
    NotRegularFile,
    Root,
    component,
    node_from_stat,
)
from protocol.errors import NeedsPerson
from protocol.names import RESERVED_PREFIX, CollectionPath, escape

# O_PATH needs no read permission on folders that are only passed through (0711 home directories).
_LOOKUP = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a pipe or a serial line must never wait for the other end.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_REOPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What kernels say when O_NOFOLLOW meets a symlink (Linux, macOS, FreeBSD); ENOTDIR only with O_DIRECTORY.
_LINK = frozenset({errno.ELOOP, errno.EMLINK})
_PERHAPS_LINK = _LINK | {errno.ENOTDIR}
# Bounds the work that a maze of links can cause.
_MAX_STEPS = 20_000


def open_root(path: str, expected: mounts.Mark | None = None) -> PosixRoot:
    """Open the folder of a collection. Symlinks in ``path`` are followed: it comes from the owner's configuration.

    Raises `NeedsPerson` (COLLECTION_UNAVAILABLE) if it is no folder, cannot be opened, or is not the one that
    ``expected`` (kept from set-up, see `PosixRoot.mark`) describes.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unavailable(path, f"cannot be opened ({error.strerror})") from error
    root = PosixRoot(fd, path)
    difference = mounts.difference(expected, root.mark()) if expected is not None else ""
    if difference:
        root.close()
        raise _unavailable(path, difference)
    return root


class PosixRoot(Root):
    """A folder of this machine. Made by `open_root`; owns the handle it is given."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._configured = path
        # Absolute symlinks are inside when they spell the root in either of these ways.
        spellings = {os.path.abspath(path), os.path.realpath(path)}
        self._spellings = [_components(os.fsencode(spelling)) for spelling in sorted(spellings)]
        status = os.fstat(fd)
        self._identity = (status.st_dev, status.st_ino)
        self._mount = mounts.mount_of(fd, path)
        local = mounts.is_local(self._mount.file_system)
        self.features = Features(
            file_system=self._mount.file_system,
            local=local,
            syncfs=local and libc.has_syncfs(),
            rename_no_replace=libc.has_rename_no_replace(),
        )

    def open_directory(self, path: CollectionPath) -> PosixDirectory:
        return self._readable(*self._walk(_checked(path)))

    def open_parent(self, path: CollectionPath) -> tuple[PosixDirectory, bytes]:
        if not path:
            raise IllegalName("is the collection itself")
        _checked(path)
        return self._readable(*self._walk(path[:-1])), path[-1]

    def stat(self, path: CollectionPath) -> Node:
        if not path:
            return node_from_stat(b"", os.fstat(self._fd))
        with PosixDirectory(self, *self._walk(_checked(path[:-1]))) as parent:
            return parent.stat(path[-1])

    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> PosixDirectory:
        return self._readable(*self._walk(_checked(path), make=True, durable=durable))

    def identity(self) -> tuple[int, int]:
        return self._identity

    def mark(self) -> mounts.Mark:
        """What to keep at set-up, so that `open_root` knows this folder again."""
        return mounts.mark_of(self._mount, self._identity[1])

    def check_present(self) -> None:
        try:
            status = os.stat(self._configured)
        except OSError as error:
            raise _unavailable(self._configured, f"cannot be found ({error.strerror})") from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise _unavailable(self._configured, "is not the folder that was opened; its disk may have been unmounted")

    def free_bytes(self) -> int:
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def syncfs(self) -> None:
        if not self.features.syncfs:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        libc.syncfs(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    if sys.platform == "darwin":

        def fsync(self, fd: int) -> None:
            _sync_handle(fd)

    # --- the walk --------------------------------------------------------------------------------------------

    def _walk(self, path: Sequence[bytes], *, make: bool = False, durable: bool = False) -> tuple[int, CollectionPath]:
        """Descend to a folder through symlinks that stay inside: a handle for lookups, and where it really is.

        With ``make`` missing folders are made. The caller owns the handle.
        """
        pending = list(reversed(path))
        done: list[bytes] = []
        links = 0
        fd = os.dup(self._fd)
        try:
            for _ in range(_MAX_STEPS):
                if not pending:
                    return fd, tuple(done)
                name = pending.pop()
                if name == b"..":
                    # Comes from link targets only. `done` holds no links, so its parent is one component shorter.
                    if not done:
                        raise LeavesCollection
                    pending.extend(reversed(done[:-1]))
                else:
                    try:
                        below = os.open(name, _LOOKUP, dir_fd=fd)
                    except FileNotFoundError:
                        if not make:
                            raise
                        _make(fd, name, durable)
                        pending.append(name)
                        continue
                    except OSError as error:
                        if error.errno not in _PERHAPS_LINK:
                            raise
                        links += 1
                        pending.extend(reversed(self._expand(done, _read_link(fd, name, error))))
                    else:
                        os.close(fd)
                        fd = below
                        done.append(name)
                        continue
                if links > MAX_LINKS:
                    break
                top = os.dup(self._fd)
                os.close(fd)
                fd = top
                done = []
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        except BaseException:
            os.close(fd)
            raise

    def _expand(self, where: Sequence[bytes], target: bytes) -> list[bytes]:
        """The way from the root that a link in the folder ``where`` stands for; it may contain ``..`` and links."""
        way = _components(target)
        if not target.startswith(b"/"):
            return [*where, *way]
        for spelling in self._spellings:
            if way[: len(spelling)] == spelling:
                return way[len(spelling) :]
        raise LeavesCollection

    def _resolve(self, way: list[bytes]) -> tuple[PosixDirectory, bytes]:
        """Follow a way to its end: the folder that holds it and its name there, which is no link. The name is empty
        if the way ends at the folder itself."""
        for _ in range(MAX_LINKS):
            if not way or way[-1] == b"..":
                return PosixDirectory(self, *self._walk(way)), b""
            fd, where = self._walk(way[:-1])
            try:
                target = os.readlink(way[-1], dir_fd=fd)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return PosixDirectory(self, fd, where), way[-1]
                os.close(fd)
                raise
            os.close(fd)
            way = self._expand(where, target)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def _readable(self, fd: int, where: CollectionPath) -> PosixDirectory:
        """A directory from a lookup handle, opened for reading where permissions allow."""
        try:
            readable = os.open(b".", _FOLDER, dir_fd=fd)
        except PermissionError:
            return PosixDirectory(self, fd, where)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return PosixDirectory(self, readable, where)


class PosixDirectory(Directory):
    """An open folder below a `PosixRoot`; owns the handle it is given."""

    __slots__ = ("_fd", "_path", "_root")

    def __init__(self, root: PosixRoot, fd: int, path: CollectionPath) -> None:
        self._root = root
        self._fd = fd
        self._path = path

    @property
    def path(self) -> CollectionPath:
        return self._path

    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        # A handle of its own: the reading position belongs to the open file, and scans may overlap.
        fd = os.open(b".", _FOLDER, dir_fd=self._fd)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if not reserved and name.startswith(RESERVED_PREFIX):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    yield node_from_stat(name, status)
        finally:
            os.close(fd)

    def lstat(self, name: bytes) -> Node:
        return node_from_stat(name, os.stat(component(name), dir_fd=self._fd, follow_symlinks=False))

    def stat(self, name: bytes) -> Node:
        node = self.lstat(name)
        if node.kind != "symlink":
            return node
        with self._follow(name) as (folder, last):
            if not last:
                return node_from_stat(name, os.fstat(folder._fd))
            return node_from_stat(name, os.stat(last, dir_fd=folder._fd, follow_symlinks=False))

    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        return self.open_read_status(name, follow=follow)[0]

    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        try:
            fd = os.open(component(name), _READ, dir_fd=self._fd)
        except OSError as error:
            if follow and error.errno in _LINK:
                with self._follow(name) as (folder, last):
                    if not last:
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
                    return folder.open_read_status(last)
            raise _opening(error) from error
        return fd, _regular(fd)

    def open_directory(self, name: bytes, *, follow: bool = False) -> PosixDirectory:
        try:
            return PosixDirectory(self._root, os.open(component(name), _FOLDER, dir_fd=self._fd), (*self._path, name))
        except PermissionError:
            return PosixDirectory(self._root, os.open(name, _LOOKUP, dir_fd=self._fd), (*self._path, name))
        except OSError as error:
            if error.errno not in _PERHAPS_LINK:
                raise
            if not follow:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
            way = self._root._expand(self._path, _read_link(self._fd, name, error))
            return self._root._readable(*self._root._walk(way))

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        return os.open(component(name), _CREATE, mode, dir_fd=self._fd)

    def open_temporary(self, name: bytes) -> int:
        try:
            fd = os.open(component(name), _REOPEN, dir_fd=self._fd)
        except OSError as error:
            raise _opening(error) from error
        status = _regular(fd)
        # Whoever owns it, or holds another name of it, could change it after it was verified.
        if status.st_nlink != 1 or status.st_uid != os.geteuid():
            os.close(fd)
            raise NotRegularFile("is not a temporary of this agent alone")
        return fd

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        fd = self._fd_of(target)
        if not replace_symlink:
            with contextlib.suppress(FileNotFoundError):
                if stat_bits.S_ISLNK(os.stat(component(new), dir_fd=fd, follow_symlinks=False).st_mode):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(component(old), component(new), src_dir_fd=self._fd, dst_dir_fd=fd)

    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        fd = self._fd_of(target)
        component(old), component(new)
        try:
            libc.rename_no_replace(self._fd, old, fd, new)
            return
        except OSError as error:
            # EINVAL may also mean a folder moved into itself; the plain rename below says so again.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        if stat_bits.S_ISDIR(os.stat(old, dir_fd=self._fd, follow_symlinks=False).st_mode):
            # A folder cannot be hard-linked. A rename replaces nothing but an empty folder, so no data is at risk.
            with contextlib.suppress(FileNotFoundError):
                os.stat(new, dir_fd=fd, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=fd)
            return
        os.link(old, new, src_dir_fd=self._fd, dst_dir_fd=fd, follow_symlinks=False)
        os.unlink(old, dir_fd=self._fd)

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        os.mkdir(component(name), mode & PERMISSION_BITS, dir_fd=self._fd)

    def unlink(self, name: bytes) -> None:
        os.unlink(component(name), dir_fd=self._fd)

    def rmdir(self, name: bytes) -> None:
        os.rmdir(component(name), dir_fd=self._fd)

    def symlink(self, name: bytes, target: bytes) -> None:
        if b"\0" in target:
            raise IllegalName("has a target with a null byte")
        os.symlink(target, component(name), dir_fd=self._fd)

    def readlink(self, name: bytes) -> bytes:
        return os.readlink(component(name), dir_fd=self._fd)

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        if not follow:
            _set_times(component(name), mtime_ns, self._fd)
            return
        if self.lstat(name).kind != "symlink":
            _set_times(name, mtime_ns, self._fd)
            return
        with self._follow(name) as (folder, last):
            _set_times(last or b".", mtime_ns, folder._fd)

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        mode &= 0o7777 if special else PERMISSION_BITS
        flags = _LOOKUP & ~os.O_DIRECTORY if hasattr(os, "O_PATH") else _READ
        fd = os.open(component(name), flags, dir_fd=self._fd)
        try:
            kind = os.fstat(fd).st_mode
            if not (stat_bits.S_ISREG(kind) or stat_bits.S_ISDIR(kind)):
                raise NotRegularFile("is neither a file nor a folder")
            if hasattr(os, "O_PATH"):
                # fchmod refuses such handles; through /proc it reaches the very file that was looked at.
                os.chmod(f"/proc/self/fd/{fd}", mode)
            else:
                os.fchmod(fd, mode)
        finally:
            os.close(fd)

    def status(self) -> Node:
        return node_from_stat(self._path[-1] if self._path else b"", os.fstat(self._fd))

    def sync(self) -> None:
        try:
            fd = os.open(b".", _FOLDER, dir_fd=self._fd)
        except PermissionError:
            # A folder that may be written but not read cannot be synced alone.
            os.sync()
            return
        try:
            _sync_handle(fd)
        finally:
            os.close(fd)

    def fileno(self) -> int | None:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _fd_of(self, target: Directory | None) -> int:
        if target is None:
            return self._fd
        if not isinstance(target, PosixDirectory) or target._root is not self._root:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return target._fd

    @contextlib.contextmanager
    def _follow(self, name: bytes) -> Iterator[tuple[PosixDirectory, bytes]]:
        """What the symlink ``name`` finally leads to: an open folder and the name in it (empty: the folder itself)."""
        way = self._root._expand(self._path, os.readlink(component(name), dir_fd=self._fd))
        folder, last = self._root._resolve(way)
        with folder:
            yield folder, last


def _components(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _checked(path: CollectionPath) -> CollectionPath:
    for name in path:
        component(name)
    return path


def _read_link(fd: int, name: bytes, otherwise: OSError) -> bytes:
    """The text of a link; ``otherwise`` is raised if it turns out to be none."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise otherwise from None
        raise


def _make(fd: int, name: bytes, durable: bool) -> None:
    """Make one folder on a walk, unless somebody else just did."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=fd)
    if durable:
        try:
            handle = os.open(b".", _FOLDER, dir_fd=fd)
        except PermissionError:
            os.sync()
            return
        try:
            _sync_handle(handle)
        finally:
            os.close(handle)


def _opening(error: OSError) -> OSError:
    """ENXIO and ENODEV are how sockets and absent devices refuse to be opened."""
    return NotRegularFile() if error.errno in (errno.ENXIO, errno.ENODEV) else error


def _regular(fd: int) -> os.stat_result:
    """The status of an open file if it is regular; otherwise it is closed and the reason raised."""
    try:
        status = os.fstat(fd)
        if stat_bits.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat_bits.S_ISREG(status.st_mode):
            raise NotRegularFile
    except BaseException:
        os.close(fd)
        raise
    return status


def _set_times(name: bytes, mtime_ns: int, fd: int) -> None:
    try:
        os.utime(name, ns=(time.time_ns(), mtime_ns), dir_fd=fd, follow_symlinks=False)
    except OverflowError as error:
        raise OSError(errno.EINVAL, "is given a time outside the range of this machine") from error


def _sync_handle(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # fsync on macOS only reaches the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _unavailable(path: str, why: str) -> NeedsPerson:
    shown = escape(os.fsencode(path))
    return NeedsPerson(
        f"The collection's folder {shown} {why}. Mount or restore it, or run the set-up again to accept it as it is.",
        code="COLLECTION_UNAVAILABLE",
    )
