"""The walk from a root's handle down a path: the only place that resolves paths and symlinks on POSIX.

Every component is opened relative to the handle of the folder before it and with O_NOFOLLOW. A symlink on the way is
read and resolved here, against the root, and the walk starts again from the root's handle. ``..`` is never given to
the kernel, so a folder that is moved away during the walk leads nowhere.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from collections.abc import Sequence

from agent.storage.base import MAX_LINKS
from agent.storage.disks import Disks
from agent.storage.handles import LOOKUP, PERHAPS_LINK, os_error, sync_folder
from agent.storage.own_files import AgentsOwn, OwnFiles
from agent.storage.reach import LeavesCollection, Reach
from protocol.names import CollectionPath

# Bounds the work that a maze of links can cause.
_MAX_STEPS = 20_000


def components(path: bytes) -> list[bytes]:
    """The components of a path of the system, ``..`` among them."""
    return [part for part in path.split(b"/") if part not in (b"", b".")]


class Walker:
    """Walks below one root handle, which stays the caller's. ``spellings`` are the root's absolute paths: a symlink
    with an absolute target is inside when it begins with one of them. A narrowed one (see `narrowed`) follows
    symlinks into some folders only; what was asked for by name is not looked at."""

    def __init__(self, fd: int, spellings: Sequence[str]) -> None:
        self._fd = fd
        self._spellings = [components(os.fsencode(spelling)) for spelling in spellings]
        self._reach: Reach | None = None
        # Entered only while they are what is remembered.
        self.disks = Disks()
        # Never entered.
        self.own = OwnFiles()

    def narrowed(self, fd: int, reach: Reach) -> Walker:
        """One with a handle of its own, for whom symlinks lead into some folders only."""
        walker = copy.copy(self)
        walker._fd, walker._reach = fd, reach
        return walker

    def retire(self) -> None:
        """Walk no more: the root's handle is about to be closed, and its number may soon mean something else."""
        self._fd = -1

    def walk(
        self,
        path: Sequence[bytes],
        *,
        make: bool = False,
        durable: bool = False,
        followed: bool = False,
        name: tuple[bytes, ...] = (),
    ) -> tuple[int, CollectionPath]:
        """Descend to a folder, through symlinks that stay inside: a handle for lookups, and where it really is.

        With ``make`` missing folders are made, and with ``durable`` synced. ``followed`` says that the path itself is
        what a symlink stands for, ``name`` what is wanted in the folder then. The caller owns the handle.
        """
        pending = list(reversed(path))
        done: list[bytes] = []
        links = 0
        fd = os.dup(self._fd)
        try:
            # What the root, and the folder reached so far, hold of the agent's own.
            around = above = self.own.around(fd, ()) if self.own else None
            for _ in range(_MAX_STEPS):
                reach = self._reach if followed or links else None
                if not pending:
                    if reach is not None:
                        reach.check_end((*done, *name))
                    return fd, tuple(done)
                step = pending.pop()
                # Comes from link targets only. `done` holds no links, so its parent is one component shorter.
                if step == b"..":
                    way = _parent(done)
                else:
                    if reach is not None:
                        # Before the look, so that not even its existence is told.
                        reach.check_way((*done, step))
                    if around is not None and around.conceals(fd, step):
                        raise AgentsOwn if make else os_error(errno.ENOENT)
                    below = _enter(fd, step)
                    if isinstance(below, int):
                        os.close(fd)
                        fd = below
                        done.append(step)
                        if self.disks:
                            self.disks.check(fd, tuple(done))
                        if self.own:
                            around = self.own.entered(fd, done, make=make)
                        continue
                    if below is None:
                        # Made or not, the next round sees what is there now.
                        _make(fd, step, make, durable)
                        pending.append(step)
                        continue
                    links += 1
                    way = self.expand(done, below)
                if links > MAX_LINKS:
                    break
                pending.extend(reversed(way))
                top = os.dup(self._fd)
                os.close(fd)
                fd = top
                done = []
                around = above
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        raise os_error(errno.ELOOP)

    def expand(self, where: Sequence[bytes], target: bytes) -> list[bytes]:
        """The way from the root that a link in the folder ``where`` stands for; it may contain ``..`` and links."""
        way = components(target)
        if not target.startswith(b"/"):
            return [*where, *way]
        for spelling in self._spellings:
            if way[: len(spelling)] == spelling:
                return way[len(spelling) :]
        raise LeavesCollection

    def resolve(self, way: list[bytes]) -> tuple[int, CollectionPath, bytes]:
        """Follow a symlink's way to its end: a handle of the folder that holds it, where that is, and its name there,
        which is no link. The name is empty if the way ends at the folder itself. The caller owns the handle."""
        for _ in range(MAX_LINKS):
            if not way or way[-1] == b"..":
                return (*self.walk(way, followed=True), b"")
            fd, where = self.walk(way[:-1], followed=True, name=(way[-1],))
            try:
                if self.own:
                    self.own.check_name(fd, where, way[-1])
                target = os.readlink(way[-1], dir_fd=fd)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return fd, where, way[-1]
                os.close(fd)
                raise
            os.close(fd)
            way = self.expand(where, target)
        raise os_error(errno.ELOOP)


def _enter(fd: int, name: bytes) -> int | bytes | None:
    """Open one folder: its handle; or the target, if it is a symlink; or None, if there is nothing."""
    try:
        return os.open(name, LOOKUP, dir_fd=fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in PERHAPS_LINK:
            raise
        return read_link(fd, name, error)


def read_link(fd: int, name: bytes, otherwise: OSError) -> bytes:
    """The target of a symlink; ``otherwise`` is raised if it turns out to be none."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise otherwise from None
        raise


def _parent(done: list[bytes]) -> list[bytes]:
    if not done:
        raise LeavesCollection
    return done[:-1]


def _make(fd: int, name: bytes, make: bool, durable: bool) -> None:
    """Make one folder on the way, unless somebody else just did."""
    if not make:
        raise os_error(errno.ENOENT)
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=fd)
    if durable:
        sync_folder(fd)
