"""The agent's own folders and files (its key, journals and tasks, its configuration) where they lie below the root of a
collection: for whoever comes through that they do not exist.

Folders are known by device and inode, so that no link, mount or other spelling leads into them; they and single files
are left out of the folder they lie in by name, also while they are not there. One look at each folder when it is opened
tells all this; nothing is asked for files elsewhere, unless they have several names (`agent.storage.own_links`). What
walks and folders do about it is in `agent.storage.walk` and `agent.storage.guarded`.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from agent.storage.folding import fold_key
from agent.storage.handles import os_error
from agent.storage.own_links import OwnLinks
from protocol.names import CollectionPath


class AgentsOwn(PermissionError):
    """Something would be put where the agent's own files are."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "belongs to the agent itself, and nobody may change that through a collection")


class HoldsOwn(OSError):
    """A folder that holds the agent's own files would be moved or removed."""

    def __init__(self) -> None:
        super().__init__(errno.ENOTEMPTY, "holds files of the agent itself, and stays")


class Around:
    """What a folder holds of the agent's own: ``names`` are not there for others, ``ways`` lead to such folders. Both
    by the names' folded forms."""

    def __init__(self) -> None:
        self.names: defaultdict[bytes, set[bytes]] = defaultdict(set)
        self.ways: defaultdict[bytes, set[bytes]] = defaultdict(set)

    def conceals(self, fd: int, name: bytes) -> bool:
        """Whether a name in this folder, open as ``fd``, is not there for others."""
        return _is_one_of(fd, name, self.names)

    def leads(self, fd: int, name: bytes) -> bool:
        """Whether something of the agent's own lies somewhere below a name in this folder, open as ``fd``."""
        return _is_one_of(fd, name, self.ways)


def _is_one_of(fd: int, name: bytes, names: Mapping[bytes, set[bytes]]) -> bool:
    alike = names.get(fold_key(name))
    if alike is None:
        return False
    # Where case does not count the same entry has many names.
    return name in alike or any(_are_one(fd, name, own) for own in alike)


def _are_one(fd: int, name: bytes, other: bytes) -> bool:
    try:
        one, two = (os.stat(each, dir_fd=fd, follow_symlinks=False) for each in (name, other))
    except (OSError, ValueError):
        return False
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)


class OwnFiles:
    """The agent's own folders and files, as they are when this is made. Never changes; for any thread.

    ``places`` are absolute paths, ``root`` is where the collection is; those that do not exist are left out by name
    where they would be.
    """

    def __init__(self, places: Iterable[str] = (), root: str = "") -> None:
        self._root = os.fsencode(os.path.realpath(root)).rstrip(b"/") if root else b""
        self._folders: set[tuple[int, int]] = set()
        self._around: dict[tuple[int, int], Around] = {}
        # Of folders that are not there yet, by their place below the root, each name of it folded.
        self._awaited: dict[CollectionPath, Around] = {}
        self._paths: set[str] = set()
        places = tuple(places)
        self._links = OwnLinks(os.path.realpath(place) for place in places)
        for place in places:
            real = os.path.realpath(place)
            with suppress(OSError):
                status = os.stat(real)
                if stat_bits.S_ISDIR(status.st_mode):
                    self._folders.add((status.st_dev, status.st_ino))
                    self._paths.add(real)
            # A link to them is the agent's own as well: without it the agent does not find them.
            for spelling in {os.path.abspath(place), real}:
                self._note(os.fsencode(spelling))

    def _note(self, path: bytes) -> None:
        folder, name = os.path.split(path)
        if not name:
            return
        self._of(folder).names[fold_key(name)].add(name)
        while folder != (above := os.path.dirname(folder)):
            way = os.path.basename(folder)
            self._of(above).ways[fold_key(way)].add(way)
            folder = above

    def _of(self, folder: bytes) -> Around:
        try:
            status = os.stat(folder)
        except FileNotFoundError:
            if not folder.startswith(self._root + b"/"):
                return Around()
            place = folder[len(self._root) :].split(b"/")[1:]
            return self._awaited.setdefault(tuple(map(fold_key, place)), Around())
        except OSError:
            # Nowhere this account may come: then others do not come there either.
            return Around()
        return self._around.setdefault((status.st_dev, status.st_ino), Around())

    def __bool__(self) -> bool:
        return bool(self._around)

    def are_above(self, path: str) -> bool:
        """Whether a folder of the agent's own is, or holds, what is at a path."""
        real = os.path.realpath(path)
        return any(os.path.commonpath((real, own)) == own for own in self._paths)

    def entered(self, fd: int, where: Sequence[bytes], *, make: bool = False) -> Around | None:
        """As `around`. Raises FileNotFoundError, or with ``make`` `AgentsOwn`, if the open folder is one of them."""
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) in self._folders:
            raise AgentsOwn if make else os_error(errno.ENOENT)
        return self._known(status, where)

    def check_name(self, fd: int, where: Sequence[bytes], name: bytes) -> None:
        """Raise FileNotFoundError if a name in an open folder is one of them."""
        around = self.around(fd, where)
        if around is not None and around.conceals(fd, name):
            raise os_error(errno.ENOENT)

    def check_links(self, status: os.stat_result) -> None:
        """Raise FileNotFoundError if what has this status is one of them, found by another name. May block."""
        if self._links.hold(status):
            raise os_error(errno.ENOENT)

    def are(self, status: os.stat_result) -> bool:
        """Whether a file with several names is one of them, whatever it is called. May block."""
        return self._links.hold(status)

    def around(self, fd: int, where: Sequence[bytes]) -> Around | None:
        """What an open folder, which is ``where`` below the root, holds of them; None for nearly every one."""
        return self._known(os.fstat(fd), where)

    def _known(self, status: os.stat_result, where: Sequence[bytes]) -> Around | None:
        found = self._around.get((status.st_dev, status.st_ino))
        if found is None and self._awaited:
            found = self._awaited.get(tuple(map(fold_key, where)))
        return found
