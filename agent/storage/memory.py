"""Storage in memory: the reference implementation of `agent.storage.base`, for tests.

File contents are anonymous memory files (memfd_create), so they have real descriptors and go through the same code as
files on a disk. It shares no code with the POSIX implementation, so that each checks the other. It does not do:
permission checks, umask, owners other than this process, special files, sync (everything is as durable as the process).
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator

import msgspec

from agent.storage.base import (
    MAX_LINKS,
    PERMISSION_BITS,
    Directory,
    Features,
    IllegalName,
    NotRegularFile,
    Root,
    component,
)
from agent.storage.disks import DiskAway
from agent.storage.node import Kind, Node, checked_time, node_from_stat
from agent.storage.reach import LeavesCollection, Reach
from protocol.errors import NeedsPerson
from protocol.names import RESERVED_PREFIX, CollectionPath

_DEVICE = 0x746F77


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _anonymous_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("towpath", os.MFD_CLOEXEC)
    else:  # noqa: RET505 - mypy takes what follows an `if` of the platform for unreachable
        descriptor, name = tempfile.mkstemp(prefix="towpath-")
        os.unlink(name)
        return descriptor


class _Inode:
    """A file, folder or symlink. Files keep size and times in their descriptor, the others here."""

    def __init__(self, kind: Kind, number: int, *, mode: int = 0o777, target: bytes = b"") -> None:
        self.kind = kind
        self.number = number
        self.mode = mode & 0o7777
        self.target = target
        self.entries: dict[bytes, _Inode] = {}
        self.links = 1
        self.mtime_ns = self.ctime_ns = time.time_ns()
        self.descriptor = -1
        if kind == "file":
            self.descriptor = _anonymous_file()
            os.fchmod(self.descriptor, self.mode)
            weakref.finalize(self, os.close, self.descriptor)

    def touch(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def open(self, flags: int) -> int:
        # Through /proc it is a new open file with its own flags, as if opened by name.
        return os.open(f"/proc/self/fd/{self.descriptor}", flags | os.O_CLOEXEC)

    def node(self, name: bytes) -> Node:
        if self.kind == "file":
            return msgspec.structs.replace(node_from_stat(name, os.fstat(self.descriptor)), nlink=self.links)
        size = len(self.target) if self.kind == "symlink" else 4096
        return Node(
            name,
            self.kind,
            size,
            self.mtime_ns,
            self.ctime_ns,
            _DEVICE,
            self.number,
            self.mode,
            os.geteuid(),
            os.getegid(),
            self.links,
        )


class MemoryRoot(Root):
    """A folder tree in memory. ``path`` is the place absolute symlinks may name; ``present`` can be set to False, as
    if its disk were not mounted, and folders be put into ``away``, as if disks mounted there before were not."""

    def __init__(self, path: bytes = b"/memory", *, capacity: int = 1 << 40) -> None:
        self.features = Features(file_system="memory", local=True, rename_no_replace=True)
        self.present = True
        self.away: set[CollectionPath] = set()
        self._path = _split(path)
        self._capacity = capacity
        self._numbers = itertools.count(2)
        self._reach: Reach | None = None
        self._lock = threading.RLock()
        self.top = _Inode("dir", 1, mode=0o755)

    def open_directory(self, path: CollectionPath) -> MemoryDirectory:
        return self._open(list(_checked(path)))

    def open_parent(self, path: CollectionPath) -> tuple[MemoryDirectory, bytes]:
        if not path:
            raise IllegalName("is the collection itself")
        _checked(path)
        return self._open(list(path[:-1])), path[-1]

    def stat(self, path: CollectionPath) -> Node:
        with self._lock:
            inode, _ = self.find(list(_checked(path)))
            return inode.node(path[-1] if path else b"")

    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> MemoryDirectory:
        with self._lock:
            where: CollectionPath = ()
            for name in _checked(path):
                try:
                    _, where = self.find([*where, name], folder=True)
                except FileNotFoundError:
                    parent, way = self.parent_of([*where, name])
                    parent.entries[way[-1]] = self.new("dir")
                    where = way
            return self._open(list(where))

    def narrowed(self, reach: Reach) -> MemoryRoot:
        root = copy.copy(self)
        root._reach = reach
        return root

    def identity(self) -> tuple[int, int]:
        return (_DEVICE, self.top.number)

    def check_present(self) -> None:
        if not self.present:
            raise NeedsPerson("The collection's folder is not there.", code="COLLECTION_UNAVAILABLE")

    def free_bytes(self) -> int:
        with self._lock:
            return max(0, self._capacity - _size(self.top))

    def close(self) -> None:
        pass

    def new(self, kind: Kind, *, mode: int = 0o755, target: bytes = b"") -> _Inode:
        """An inode with the next number; the lock is held."""
        return _Inode(kind, next(self._numbers), mode=mode, target=target)

    @property
    def lock(self) -> threading.RLock:
        """Held during every operation."""
        return self._lock

    def find(self, way: list[bytes], *, folder: bool = False, follow: bool = True) -> tuple[_Inode, CollectionPath]:
        """What a way from the root leads to, and where that really is."""
        here: list[_Inode] = [self.top]
        done: list[bytes] = []
        pending = list(reversed(way))
        links = 0
        while pending:
            name = pending.pop()
            if here[-1].kind != "dir":
                raise _error(errno.ENOTDIR)
            if name == b"..":
                if not done:
                    raise LeavesCollection
                here.pop()
                done.pop()
                continue
            inode = here[-1].entries.get(name)
            if inode is None:
                raise _error(errno.ENOENT)
            if (pending or folder) and (*done, name) in self.away:
                raise DiskAway((*done, name))
            if inode.kind == "symlink" and (pending or follow):
                links += 1
                if links > MAX_LINKS:
                    raise _error(errno.ELOOP)
                if inode.target.startswith(b"/"):
                    pending.extend(reversed(self._below(inode.target)))
                    del here[1:], done[:]
                else:
                    pending.extend(reversed(_split(inode.target)))
                continue
            here.append(inode)
            done.append(name)
        if links and self._reach is not None:
            self._reach.check_end(done)
        if folder and here[-1].kind != "dir":
            raise _error(errno.ENOTDIR)
        return here[-1], tuple(done)

    def parent_of(self, way: list[bytes]) -> tuple[_Inode, CollectionPath]:
        """The folder that would hold the end of a way whose last component is missing, through a dangling symlink."""
        for turn in range(MAX_LINKS):
            parent, where = self.find(way[:-1], folder=True)
            if turn and self._reach is not None:
                self._reach.check_end((*where, way[-1]))
            inode = parent.entries.get(way[-1])
            if inode is None or inode.kind != "symlink":
                return parent, (*where, way[-1])
            absolute = inode.target.startswith(b"/")
            way = self._below(inode.target) if absolute else [*where, *_split(inode.target)]
        raise _error(errno.ELOOP)

    def _below(self, target: bytes) -> list[bytes]:
        way = _split(target)
        if way[: len(self._path)] != self._path:
            raise LeavesCollection
        return way[len(self._path) :]

    def _open(self, way: list[bytes]) -> MemoryDirectory:
        with self._lock:
            inode, where = self.find(way, folder=True)
            return MemoryDirectory(self, inode, where)


class MemoryDirectory(Directory):
    """An open folder of a `MemoryRoot`."""

    def __init__(self, root: MemoryRoot, inode: _Inode, path: CollectionPath) -> None:
        self._root = root
        self._inode = inode
        self._path = path
        self._closed = False

    @property
    def path(self) -> CollectionPath:
        return self._path

    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        with self._root.lock:
            entries = list(self._entries().items())
        for name, inode in entries:
            if reserved or not name.startswith(RESERVED_PREFIX):
                yield inode.node(name)

    def check_disks(self) -> None:
        with self._root.lock:
            depth = len(self._path)
            for path in self._root.away:
                if len(path) > depth and path[:depth] == self._path and path[depth] not in self._entries():
                    raise DiskAway(path)

    def lstat(self, name: bytes) -> Node:
        with self._root.lock:
            return self._get(name).node(name)

    def stat(self, name: bytes) -> Node:
        with self._root.lock:
            return self._follow(name).node(name)

    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        with self._root.lock:
            return _file(self._follow(name) if follow else self._get(name)).open(os.O_RDONLY)

    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        fd = self.open_read(name, follow=follow)
        return fd, os.fstat(fd)

    def open_directory(self, name: bytes, *, follow: bool = False) -> MemoryDirectory:
        with self._root.lock:
            inode = self._get(name)
            if inode.kind == "symlink" and follow:
                return MemoryDirectory(self._root, *self._root.find([*self._path, name], folder=True))
            if inode.kind != "dir":
                raise _error(errno.ENOTDIR)
            if (*self._path, name) in self._root.away:
                raise DiskAway((*self._path, name))
            return MemoryDirectory(self._root, inode, (*self._path, name))

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        with self._root.lock:
            return self._add(name, self._root.new("file", mode=mode & PERMISSION_BITS)).open(os.O_RDWR)

    def open_temporary(self, name: bytes) -> int:
        with self._root.lock:
            inode = _file(self._get(name))
            if inode.links != 1:
                raise NotRegularFile("is not a temporary of this agent alone")
            return inode.open(os.O_RDWR)

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        with self._root.lock:
            folder = self._target(target)
            inode, there = self._get(old), folder._entries().get(component(new))
            if there is not None and there.kind == "symlink" and not replace_symlink:
                raise _error(errno.EEXIST)
            if there is inode:
                return
            if inode.kind == "dir":
                if _contains(inode, folder._inode):
                    raise _error(errno.EINVAL)
                if there is not None and there.kind != "dir":
                    raise _error(errno.ENOTDIR)
                if there is not None and there.entries:
                    raise _error(errno.ENOTEMPTY)
            elif there is not None and there.kind == "dir":
                raise _error(errno.EISDIR)
            if there is not None:
                there.links = 0 if there.kind == "dir" else there.links - 1
            del self._entries()[old]
            folder._entries()[new] = inode
            self._inode.touch()
            folder._inode.touch()

    def link(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        with self._root.lock:
            folder, inode = self._target(target), self._get(old)
            if inode.kind == "dir":
                raise _error(errno.EPERM)
            if component(new) in folder._entries():
                raise _error(errno.EEXIST)
            folder._entries()[new] = inode
            inode.links += 1
            folder._inode.touch()

    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        with self._root.lock:
            self._get(old)
            if component(new) in self._target(target)._entries():
                raise _error(errno.EEXIST)
            self.rename(old, new, target)

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        with self._root.lock:
            self._add(name, self._root.new("dir", mode=mode & PERMISSION_BITS))

    def unlink(self, name: bytes) -> None:
        with self._root.lock:
            inode = self._get(name)
            if inode.kind == "dir":
                raise _error(errno.EISDIR)
            inode.links -= 1
            del self._entries()[name]
            self._inode.touch()

    def rmdir(self, name: bytes) -> None:
        with self._root.lock:
            inode = self._get(name)
            if inode.kind != "dir":
                raise _error(errno.ENOTDIR)
            if inode.entries:
                raise _error(errno.ENOTEMPTY)
            inode.links = 0
            del self._entries()[name]
            self._inode.touch()

    def symlink(self, name: bytes, target: bytes) -> None:
        if b"\0" in target:
            raise IllegalName("has a target with a null byte")
        if not target:
            raise _error(errno.ENOENT)
        with self._root.lock:
            self._add(name, self._root.new("symlink", mode=0o777, target=target))

    def readlink(self, name: bytes) -> bytes:
        with self._root.lock:
            inode = self._get(name)
            if inode.kind != "symlink":
                raise _error(errno.EINVAL)
            return inode.target

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        checked_time(mtime_ns)
        with self._root.lock:
            inode = self._follow(name) if follow else self._get(name)
            inode.mtime_ns, inode.ctime_ns = mtime_ns, time.time_ns()
            if inode.kind == "file":
                os.utime(inode.descriptor, ns=(inode.ctime_ns, mtime_ns))

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        with self._root.lock:
            inode = self._get(name)
            if inode.kind == "symlink":
                raise NotRegularFile("is neither a file nor a folder")
            inode.mode = mode & (0o7777 if special else PERMISSION_BITS)
            inode.ctime_ns = time.time_ns()
            if inode.kind == "file":
                os.fchmod(inode.descriptor, inode.mode)

    def status(self) -> Node:
        with self._root.lock:
            return self._inode.node(self._path[-1] if self._path else b"")

    def sync(self) -> None:
        if self._closed:
            raise _error(errno.EBADF)

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        self._closed = True

    def _entries(self) -> dict[bytes, _Inode]:
        if self._closed:
            raise _error(errno.EBADF)
        return self._inode.entries

    def _get(self, name: bytes) -> _Inode:
        inode = self._entries().get(component(name))
        if inode is None:
            raise _error(errno.ENOENT)
        return inode

    def _follow(self, name: bytes) -> _Inode:
        inode = self._get(name)
        return self._root.find([*self._path, name])[0] if inode.kind == "symlink" else inode

    def _add(self, name: bytes, inode: _Inode) -> _Inode:
        if len(component(name)) > 255:
            raise _error(errno.ENAMETOOLONG)
        if name in self._entries():
            raise _error(errno.EEXIST)
        if self._inode.links == 0:
            raise _error(errno.ENOENT)
        self._inode.entries[name] = inode
        self._inode.touch()
        return inode

    def _target(self, target: Directory | None) -> MemoryDirectory:
        if target is None:
            return self
        if not isinstance(target, MemoryDirectory) or target._root is not self._root:
            raise _error(errno.EXDEV)
        return target


def _split(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _checked(path: CollectionPath) -> CollectionPath:
    for name in path:
        component(name)
    return path


def _file(inode: _Inode) -> _Inode:
    if inode.kind == "dir":
        raise _error(errno.EISDIR)
    if inode.kind == "symlink":
        raise _error(errno.ELOOP)
    return inode


def _contains(inode: _Inode, sought: _Inode) -> bool:
    return inode is sought or any(_contains(child, sought) for child in inode.entries.values() if child.kind == "dir")


def _size(inode: _Inode) -> int:
    if inode.kind == "file":
        return os.fstat(inode.descriptor).st_size
    return sum(map(_size, inode.entries.values()))
