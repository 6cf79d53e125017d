"""A root whose hidden files (names that begin with a dot) do not exist for anybody who comes through it.

They are not listed, cannot be read, changed or made, and no symlink leads to them. For collections with ``hidden:
denied``. Temporaries of transfers have reserved names and are let through; nobody can ask for those anyway.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import msgspec

from agent.storage.access_lists import FoundLists
from agent.storage.attributes import Found
from agent.storage.base import Bytes, Directory, PartMark, Root
from agent.storage.node import Node, node_from_stat
from agent.storage.reach import Reach
from protocol.names import CollectionPath, is_reserved


def is_hidden(name: bytes) -> bool:
    """Whether a name is hidden by its form."""
    # What cannot be the name of an entry at all is refused by the storage, with its own reason.
    possible = name not in (b".", b"..") and b"/" not in name and b"\0" not in name
    return name.startswith(b".") and possible and not is_reserved(name)


class HiddenDenied(PermissionError):
    """The owner does not offer hidden files."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "is hidden, and the owner of the collection does not offer hidden files")


def _check(names: Iterable[bytes]) -> None:
    if any(map(is_hidden, names)):
        raise HiddenDenied


class HidingDirectory(Directory):
    """A folder without its hidden entries."""

    def __init__(self, inner: Directory) -> None:
        self.inner = inner

    @property
    def path(self) -> CollectionPath:
        return self.inner.path

    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        return (node for node in self.inner.scan(reserved=reserved) if not is_hidden(node.name))

    def reserved_names(self) -> list[bytes]:
        return self.inner.reserved_names()

    def folds(self, prefix: bytes) -> bool:
        return self.inner.folds(prefix)

    def check_disks(self) -> None:
        self.inner.check_disks()

    def lstat(self, name: bytes) -> Node:
        _check([name])
        return self.inner.lstat(name)

    def stat(self, name: bytes) -> Node:
        _check([name])
        node = self.inner.lstat(name)
        if node.kind != "symlink":
            return node
        if self.inner.stat(name).kind == "dir":
            with self.inner.open_directory(name, follow=True) as opened:
                _check(opened.path)
                return msgspec.structs.replace(opened.status(), name=name)
        # Of what was opened, and seen to be no hidden file: the link may lead elsewhere by now.
        fd, status = self.inner.open_read_status(name, follow=True)
        try:
            self._check_place(fd)
        finally:
            os.close(fd)
        return node_from_stat(name, status)

    def mode_without_list(self, node: Node, *, follow: bool = False) -> int:
        return self.inner.mode_without_list(node, follow=follow)

    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        return self.open_read_status(name, follow=follow)[0]

    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        _check([name])
        if not follow:
            return self.inner.open_read_status(name)
        self._check_link(name)
        fd, status = self.inner.open_read_status(name, follow=True)
        try:
            self._check_opened(fd, status, name)
        except BaseException:
            os.close(fd)
            raise
        return fd, status

    def open_directory(self, name: bytes, *, follow: bool = False) -> Directory:
        _check([name])
        return _seen(self.inner.open_directory(name, follow=follow))

    def _check_link(self, name: bytes) -> None:
        """A symlink may not lead to hidden files, by whatever way: the system says where it ends."""
        if self.inner.lstat(name).kind != "symlink":
            return
        if self.inner.stat(name).kind == "dir":
            with self.inner.open_directory(name, follow=True) as opened:
                _check(opened.path)
            return
        fd = self.inner.open_read(name, follow=True)
        try:
            self._check_place(fd)
        finally:
            os.close(fd)

    def _check_opened(self, fd: int, status: os.stat_result, name: bytes) -> None:
        """What was opened may be led to by another link than the one that was looked at: anybody on this machine who
        may write to the folder can change that in between."""
        node = self.inner.lstat(name)
        if (node.device, node.inode) != (status.st_dev, status.st_ino):
            self._check_place(fd)

    def _check_place(self, fd: int) -> None:
        """Whether an open file lies in a folder, and has a name, that may be seen."""
        handle = self.inner.fileno()
        if handle is None:
            raise HiddenDenied
        try:
            place = os.readlink(os.fsencode(f"/proc/self/fd/{fd}"))
            here = os.readlink(os.fsencode(f"/proc/self/fd/{handle}"))
        except OSError:
            # This system cannot say; then the link is not followed.
            raise HiddenDenied from None
        # What lies above the collection's root may be called what it likes.
        depth = len(here.rstrip(b"/").split(b"/")) - len(self.inner.path)
        _check(place.split(b"/")[depth:])

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        _check([name])
        return self.inner.create_temporary(name, mode)

    def open_temporary(self, name: bytes) -> int:
        _check([name])
        return self.inner.open_temporary(name)

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        _check([old, new])
        self.inner.rename(old, new, _inner(target), replace_symlink=replace_symlink)

    def link(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        _check([old, new])
        self.inner.link(old, new, _inner(target))

    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        _check([old, new])
        self.inner.rename_no_replace(old, new, _inner(target))

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        _check([name])
        self.inner.mkdir(name, mode)

    def unlink(self, name: bytes) -> None:
        _check([name])
        self.inner.unlink(name)

    def rmdir(self, name: bytes) -> None:
        _check([name])
        self.inner.rmdir(name)

    def symlink(self, name: bytes, target: bytes) -> None:
        _check([name])
        self.inner.symlink(name, target)

    def readlink(self, name: bytes) -> bytes:
        _check([name])
        return self.inner.readlink(name)

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        _check([name])
        self.inner.set_times(name, mtime_ns, follow=follow)

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        _check([name])
        self.inner.set_mode(name, mode, special=special)

    def status(self) -> Node:
        return self.inner.status()

    def sync(self) -> None:
        self.inner.sync()

    def disk(self) -> int | None:
        return self.inner.disk()

    def components_in_place(self, probe: bytes) -> int:
        return self.inner.components_in_place(probe)

    def sync_disk(self) -> None:
        self.inner.sync_disk()

    def fileno(self) -> int | None:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


def _inner(directory: Directory | None) -> Directory | None:
    return directory.inner if isinstance(directory, HidingDirectory) else directory


def _seen(directory: Directory) -> Directory:
    """A folder that was just opened, if no link on the way led to a hidden one."""
    try:
        _check(directory.path)
    except HiddenDenied:
        directory.close()
        raise
    return HidingDirectory(directory)


class HidingRoot(Root):
    """A root without hidden entries."""

    hides = True

    def __init__(self, inner: Root) -> None:
        self.inner = inner
        self.features = inner.features

    def open_directory(self, path: CollectionPath) -> Directory:
        _check(path)
        return _seen(self.inner.open_directory(path))

    def open_parent(self, path: CollectionPath) -> tuple[Directory, bytes]:
        _check(path)
        directory, name = self.inner.open_parent(path)
        return _seen(directory), name

    def stat(self, path: CollectionPath) -> Node:
        if not path:
            return self.inner.stat(path)
        directory, name = self.open_parent(path)
        with directory:
            return directory.stat(name)

    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> Directory:
        _check(path)
        return _seen(self.inner.make_directories(path, durable=durable))

    def identity(self) -> tuple[int, int]:
        return self.inner.identity()

    def place(self) -> CollectionPath | None:
        return self.inner.place()

    def narrowed(self, reach: Reach) -> HidingRoot:
        return HidingRoot(self.inner.narrowed(reach))

    def check_present(self) -> None:
        self.inner.check_present()

    def token(self) -> str:
        return self.inner.token()

    def disk_tokens(self) -> dict[CollectionPath, str]:
        return self.inner.disk_tokens()

    def check_original(self) -> None:
        self.inner.check_original()

    def free_bytes(self) -> int:
        return self.inner.free_bytes()

    def close(self) -> None:
        self.inner.close()

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        return self.inner.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> int:
        return self.inner.pwrite(fd, data, offset)

    def clone_range(self, source: int, target: int, offset: int, length: int) -> None:
        self.inner.clone_range(source, target, offset, length)

    def copy_range(self, source: int, target: int, offset: int, length: int) -> int:
        return self.inner.copy_range(source, target, offset, length)

    def ftruncate(self, fd: int, size: int) -> None:
        self.inner.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        self.inner.fsync(fd)

    def fstat(self, fd: int) -> os.stat_result:
        return self.inner.fstat(fd)

    def part_mark(self, fd: int) -> PartMark:
        return self.inner.part_mark(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        self.inner.fchmod(fd, mode)

    def futimes(self, fd: int, mtime_ns: int) -> None:
        self.inner.futimes(fd, mtime_ns)

    def get_attributes(self, fd: int) -> Found:
        return self.inner.get_attributes(fd)

    def set_attribute(self, fd: int, name: bytes, value: bytes) -> None:
        self.inner.set_attribute(fd, name, value)

    def get_access_lists(self, fd: int) -> FoundLists:
        return self.inner.get_access_lists(fd)

    def set_access_list(self, fd: int, packed: bytes, *, default: bool = False) -> None:
        self.inner.set_access_list(fd, packed, default=default)

    def close_file(self, fd: int) -> None:
        self.inner.close_file(fd)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def offered(root: Root, *, hidden: bool) -> Root:
    """The root as its owner offers it: with or without hidden files."""
    return root if hidden else HidingRoot(root)
