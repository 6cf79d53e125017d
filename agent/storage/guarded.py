"""Roots in which the agent's own files are not there for others, and the folders that hold some of them. Every other
folder is an ordinary `PosixDirectory`, so that nothing is asked for its files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

from agent.storage.base import Directory
from agent.storage.disks import Disk
from agent.storage.handles import os_error
from agent.storage.mounts import Mark
from agent.storage.node import Node
from agent.storage.own_files import AgentsOwn, Around, HoldsOwn, OwnFiles
from agent.storage.posix import PosixDirectory, PosixRoot, open_root
from agent.storage.unavailable import CollectionUnavailable
from protocol.names import CollectionPath, escape


def open_guarded(
    path: str, expected: Mark | None = None, disks: Iterable[Disk] = (), *, own: Iterable[str] = ()
) -> PosixRoot:
    """`open_root`, without the agent's own folders and files at the absolute paths ``own``.

    Raises `NeedsPerson` (COLLECTION_UNAVAILABLE) also where the root is one of those folders or lies in one.
    """
    root = open_root(path, expected, disks)
    try:
        files = OwnFiles(own, path)
        if files.are_above(path):
            why = "belongs to the agent itself, which keeps its state or configuration there; that is never offered."
            raise CollectionUnavailable(
                f"The collection's folder {why}",
                owners=f"The collection's folder {escape(os.fsencode(path))} {why} Choose another folder.",
            )
        if files:
            root.guard(files, GuardedDirectory)
    except BaseException:
        root.close()
        raise
    return root


class GuardedDirectory(PosixDirectory):
    """A folder that holds something of the agent's own, or a way to it. To look for that fails as if it were not there;
    to put something in its place is refused (`AgentsOwn`), and so is to move or remove the way to it (`HoldsOwn`)."""

    __slots__ = ("_around",)

    def __init__(self, root: PosixRoot, fd: int, path: CollectionPath, around: Around) -> None:
        super().__init__(root, fd, path)
        self._around = around

    def _look(self, name: bytes) -> None:
        if self._around.conceals(self._fd, name):
            raise os_error(errno.ENOENT)

    def _take(self, name: bytes) -> None:
        self._look(name)
        if self._around.leads(self._fd, name):
            raise HoldsOwn

    def _put(self, name: bytes) -> None:
        if self._around.conceals(self._fd, name):
            raise AgentsOwn

    def arrival(self, name: bytes) -> int:
        self._put(name)
        if self._around.leads(self._fd, name):
            raise AgentsOwn
        return self._fd

    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        found = super().scan(reserved=reserved)
        if not self._around.names:
            return found
        return (node for node in found if not self._around.conceals(self._fd, node.name))

    def lstat(self, name: bytes) -> Node:
        self._look(name)
        return super().lstat(name)

    def open_anything(self, name: bytes, *, follow: bool) -> int:
        self._look(name)
        return super().open_anything(name, follow=follow)

    def open_directory(self, name: bytes, *, follow: bool = False) -> PosixDirectory:
        self._look(name)
        return super().open_directory(name, follow=follow)

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        self._put(name)
        return super().create_temporary(name, mode)

    def open_temporary(self, name: bytes) -> int:
        self._look(name)
        return super().open_temporary(name)

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        self._take(old)
        super().rename(old, new, self if target is None else target, replace_symlink=replace_symlink)

    def link(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        self._look(old)
        super().link(old, new, self if target is None else target)

    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        self._take(old)
        super().rename_no_replace(old, new, self if target is None else target)

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        self._put(name)
        super().mkdir(name, mode)

    def unlink(self, name: bytes) -> None:
        self._take(name)
        super().unlink(name)

    def rmdir(self, name: bytes) -> None:
        self._take(name)
        super().rmdir(name)

    def symlink(self, name: bytes, target: bytes) -> None:
        self._put(name)
        super().symlink(name, target)

    def readlink(self, name: bytes) -> bytes:
        self._look(name)
        return super().readlink(name)

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        self._look(name)
        super().set_times(name, mtime_ns, follow=follow)

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        self._look(name)
        super().set_mode(name, mode, special=special)
