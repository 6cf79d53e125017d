"""A storage that does not tell case and Unicode forms apart, as APFS, FAT or ext4 with ``casefold``: names are kept as
they were first written and found in any spelling."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

from agent.storage.base import Directory, Root
from agent.storage.faulty import FaultyDirectory, FaultyRoot
from agent.storage.node import Node
from protocol.names import CollectionPath


def folded(name: bytes) -> str:
    """Canonical caseless matching (Unicode 3.13, D145)."""
    text = name.decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


class FoldingDirectory(FaultyDirectory):
    """A folder in which every spelling finds the entry."""

    def _actual(self, name: bytes) -> bytes:
        wanted = folded(name)
        descriptor = self.fileno()
        assert descriptor is not None
        # A handle of its own: the reading position belongs to the open file, and other threads look, too.
        own = os.open(".", os.O_RDONLY, dir_fd=descriptor)
        try:
            for entry in os.listdir(own):
                if folded(os.fsencode(entry)) == wanted:
                    return os.fsencode(entry)
        finally:
            os.close(own)
        return name

    def folds(self, prefix: bytes) -> bool:
        return True

    def lstat(self, name: bytes) -> Node:
        return super().lstat(self._actual(name))

    def stat(self, name: bytes) -> Node:
        return super().stat(self._actual(name))

    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        return super().open_read(self._actual(name), follow=follow)

    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        return super().open_read_status(self._actual(name), follow=follow)

    def open_directory(self, name: bytes, *, follow: bool = False) -> Directory:
        inner = super().open_directory(self._actual(name), follow=follow)
        assert isinstance(inner, FaultyDirectory)
        return FoldingDirectory(inner.inner, inner.script)

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        return super().create_temporary(self._actual(name), mode)

    def open_temporary(self, name: bytes) -> int:
        return super().open_temporary(self._actual(name))

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        assert target is None
        super().rename(self._actual(old), self._actual(new), replace_symlink=replace_symlink)

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        super().mkdir(self._actual(name), mode)

    def unlink(self, name: bytes) -> None:
        super().unlink(self._actual(name))

    def rmdir(self, name: bytes) -> None:
        super().rmdir(self._actual(name))

    def symlink(self, name: bytes, target: bytes) -> None:
        super().symlink(self._actual(name), target)

    def readlink(self, name: bytes) -> bytes:
        return super().readlink(self._actual(name))

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        super().set_times(self._actual(name), mtime_ns, follow=follow)

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        super().set_mode(self._actual(name), mode, special=special)


class FoldingRoot(FaultyRoot):
    """A root of such folders."""

    @staticmethod
    def around(root: Root) -> FoldingRoot:
        """For `Engine.wrap`."""
        assert isinstance(root, FaultyRoot)
        made = FoldingRoot(root.inner)
        made.script = root.script
        return made

    def _actual(self, path: CollectionPath) -> CollectionPath:
        done: CollectionPath = ()
        for name in path:
            try:
                with FoldingDirectory(self.inner.open_directory(done), self.script) as folder:
                    done = (*done, folder._actual(name))
            except FileNotFoundError:
                done = (*done, name)
        return done

    def _folding(self, directory: Any) -> FaultyDirectory:
        return FoldingDirectory(directory.inner, directory.script)

    def open_directory(self, path: CollectionPath) -> FaultyDirectory:
        return self._folding(super().open_directory(self._actual(path)))

    def open_parent(self, path: CollectionPath) -> tuple[FaultyDirectory, bytes]:
        directory, name = super().open_parent((*self._actual(path[:-1]), path[-1]))
        return self._folding(directory), name

    def stat(self, path: CollectionPath) -> Node:
        return super().stat(self._actual(path))

    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> FaultyDirectory:
        return self._folding(super().make_directories(self._actual(path), durable=durable))
