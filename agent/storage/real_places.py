"""Where paths of this machine really lead: through symlinks, to one of the places where the machine shows something
twice, and by folded names, since names that differ in case or Unicode form only may be one."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from agent.storage.base import MAX_LINKS
from agent.storage.bind_mounts import BindMounts, read_table
from agent.storage.folding import fold_key
from agent.storage.walk import components
from protocol.names import CollectionPath


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder on the way: its path, which has no links, that path folded, and whether there is anything to look at."""

    path: CollectionPath
    folded: CollectionPath
    there: bool

    def below(self, name: bytes, *, there: bool) -> _Folder:
        return _Folder((*self.path, name), (*self.folded, fold_key(name)), there)

    def target(self, name: bytes) -> bytes | None:
        """The text of a link in it; empty where a name is no link, None where nothing can be seen of it."""
        try:
            return os.readlink(b"/" + b"/".join((*self.path, name)))
        except OSError as error:
            return b"" if error.errno == errno.EINVAL else None


class Survey:
    """One look at some paths. What was looked at is not looked at again. Blocks, unless it ``looks`` at no links."""

    def __init__(self, mounts: BindMounts, *, looks: bool) -> None:
        self._mounts = mounts
        self._top = _Folder((), (), there=looks)
        self._reached: dict[CollectionPath, _Folder] = {(): self._top}
        # Folded: what is written to, and the links that lead there.
        self._paths: set[CollectionPath] = set()
        self._links: set[CollectionPath] = set()

    def add(self, path: CollectionPath, *, leads: bool) -> None:
        """Look at a path, which stands for all below it; and at what its last name ``leads`` to, where it is a link."""
        if not path:
            self._take(())
            return
        folder = self._folder(path[:-1])
        self._take((*folder.folded, fold_key(path[-1])))
        if leads and folder.there and folder.target(path[-1]):
            self._take(self._step(folder, path[-1]).folded)

    @property
    def paths(self) -> frozenset[CollectionPath]:
        """The places of all that was added, folded, with those that are shown below them."""
        return frozenset(self._paths)

    @property
    def above(self) -> frozenset[CollectionPath]:
        """The folders above them, and above the links that lead there, folded."""
        place = self._mounts.place
        folders = {path[:-1] for path in self._paths} | self._links | {place(link) for link in self._links}
        above: set[CollectionPath] = set()
        for path in folders:
            # Where one is known, so are all above it.
            while path not in above:
                above.add(path)
                path = path[:-1]
        return frozenset(above)

    def _take(self, folded: CollectionPath) -> None:
        self._paths.add(folded)
        if not self._mounts:
            return
        self._paths.add(self._mounts.place(folded))
        self._paths.update(map(self._mounts.place, self._mounts.points_below(folded)))

    def _folder(self, path: CollectionPath) -> _Folder:
        """The real folder of a path. The part of it that is known is not walked again."""
        depth = len(path)
        while path[:depth] not in self._reached:
            depth -= 1
        folder = self._reached[path[:depth]]
        for end in range(depth + 1, len(path) + 1):
            folder = self._reached[path[:end]] = self._step(folder, path[end - 1])
        return folder

    def _step(self, folder: _Folder, name: bytes) -> _Folder:
        """What a name leads to, through links; from where nothing can be seen, what it says."""
        pending = [name]
        links = 0
        while pending:
            name = pending.pop()
            if name == b"..":
                folder = _Folder(folder.path[:-1], folder.folded[:-1], folder.there)
                continue
            target = folder.target(name) if folder.there and links < MAX_LINKS else None
            if not target:
                folder = folder.below(name, there=target is not None)
                continue
            links += 1
            self._links.add((*folder.folded, fold_key(name)))
            pending.extend(reversed(components(target)))
            if target.startswith(b"/"):
                folder = self._top
        return folder


class Ways:
    """Under which folded paths places of a collection are known, of which the machine shows some twice. ``root`` is
    where the collection is. Blocks while it looks at links."""

    def __init__(self, root: CollectionPath) -> None:
        self._root = root
        self._mounts = read_table()

    def of_item(self, path: CollectionPath) -> frozenset[CollectionPath]:
        """Of what a path in the collection leads to, with the places that are shown below it."""
        survey = Survey(self._mounts, looks=True)
        survey.add((*self._root, *path), leads=True)
        return survey.paths

    def of_folder(self, path: CollectionPath) -> set[CollectionPath]:
        """Of a path of the collection in which no links are, alone."""
        own = tuple(map(fold_key, (*self._root, *path)))
        return {own, self._mounts.place(own)}

    def below(self, path: CollectionPath) -> set[CollectionPath]:
        """Of such a path, with the places that are shown below it."""
        own = tuple(map(fold_key, (*self._root, *path)))
        return {own, self._mounts.place(own), *map(self._mounts.place, self._mounts.points_below(own))}
