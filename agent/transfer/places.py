"""Where tasks really write on this machine, so that two ways to one place are known to be one.

A place is a path from the root of the file system: symlinks on the way are followed, of what is mounted in several
places one counts, and names that differ in case or Unicode form only are one. Whether they are, only their folder
knows, and asking it means writing to it; a name too many is only a task that waits for another one. A task's places are
looked at when it is its turn.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import trio

from agent.config.keys import CollectionConfig
from agent.storage import rules
from agent.storage.base import MAX_LINKS
from agent.storage.bind_mounts import BindMounts, read_table
from agent.storage.folding import fold_key
from agent.storage.walk import components
from agent.transfer.turns import Claim
from protocol.control import TaskOrder
from protocol.errors import ProtocolError
from protocol.names import CollectionPath, parse_path_untrusted

# A disk that does not answer holds nobody up longer than this (seconds): paths count as they are named then.
PATIENCE = 5.0
# Threads that look at once. They are no others' threads, or disks that do not answer would take them all.
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Wishes:
    """The paths of a task in its collection, whose root this is; and whether what the last name leads to is written to,
    too, where it is a link."""

    collection_id: str
    root: CollectionPath
    paths: tuple[tuple[CollectionPath, bool], ...]


class Places:
    """Finds out what tasks claim. `named` answers at once, `look` asks the disks. Created outside of any thread."""

    def __init__(self) -> None:
        self._mounts = read_table()
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    def named(self, order: TaskOrder, collection: CollectionConfig | None) -> Claim:
        """The places of a task as it names them, without a look at any disk."""
        return _claim(_wishes(order, collection), self._mounts, looks=False)

    async def look(self, order: TaskOrder, collection: CollectionConfig | None) -> Claim:
        """The places of a task as they are now. A disk that does not answer in time is no reason to fail."""
        wishes = _wishes(order, collection)
        with trio.move_on_after(PATIENCE):
            self._mounts, claim = await trio.to_thread.run_sync(
                _look, wishes, abandon_on_cancel=True, limiter=self._limiter
            )
            return claim
        return _claim(wishes, self._mounts, looks=False)


def _wishes(order: TaskOrder, collection: CollectionConfig | None) -> _Wishes:
    """What an order asks for. Items whose names cannot be claim nothing: they fail by themselves."""
    delete = order.type == "DELETE"
    paths = []
    for item in order.items or []:
        try:
            path = parse_path_untrusted(item.source_path if delete else item.destination_path)
        except ProtocolError:
            continue
        # Any name in the folder may be meant.
        pattern = delete and order.options.interpret_globs and bool(path) and rules.has_wildcards(path[-1])
        paths.append((path[:-1], True) if pattern else (path, not delete))
    collection_id = order.destination.collection_id
    # One that is not known is a place of its own.
    root = (b"", collection_id.encode()) if collection is None else _components(collection.root)
    return _Wishes(collection_id, root, tuple(paths))


class Ways:
    """Under which folded paths places of a collection are known, of which the machine shows some twice. ``root`` is
    where the collection is. Blocks while it looks at links."""

    def __init__(self, root: CollectionPath) -> None:
        self._root = root
        self._mounts = read_table()

    def of_item(self, path: CollectionPath) -> frozenset[CollectionPath]:
        """Of what a path in the collection leads to, with the places that are shown below it."""
        survey = _Survey(self._mounts, looks=True)
        survey.add((*self._root, *path), leads=True)
        return survey.claim("").paths

    def of_folder(self, path: CollectionPath) -> set[CollectionPath]:
        """Of a path of the collection in which no links are, alone."""
        own = tuple(map(fold_key, (*self._root, *path)))
        return {own, self._mounts.place(own)}

    def below(self, path: CollectionPath) -> set[CollectionPath]:
        """Of such a path, with the places that are shown below it."""
        own = tuple(map(fold_key, (*self._root, *path)))
        return {own, self._mounts.place(own), *map(self._mounts.place, self._mounts.points_below(own))}


def _components(path: str) -> CollectionPath:
    return tuple(components(os.fsencode(os.path.abspath(path))))


def _look(wishes: _Wishes) -> tuple[BindMounts, Claim]:
    mounts = read_table()
    return mounts, _claim(wishes, mounts, looks=True)


def _claim(wishes: _Wishes, mounts: BindMounts, *, looks: bool) -> Claim:
    survey = _Survey(mounts, looks=looks)
    for path, leads in wishes.paths:
        survey.add((*wishes.root, *path), leads=leads)
    return survey.claim(wishes.collection_id)


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


class _Survey:
    """One look at the paths of a task. What was looked at is not looked at again."""

    def __init__(self, mounts: BindMounts, *, looks: bool) -> None:
        self._mounts = mounts
        self._top = _Folder((), (), there=looks)
        self._reached: dict[CollectionPath, _Folder] = {(): self._top}
        # Folded: what is written to, and the links that lead there.
        self._paths: set[CollectionPath] = set()
        self._links: set[CollectionPath] = set()

    def add(self, path: CollectionPath, *, leads: bool) -> None:
        """Claim a path and all below it."""
        if not path:
            self._take(())
            return
        folder = self._folder(path[:-1])
        self._take((*folder.folded, fold_key(path[-1])))
        if leads and folder.there and folder.target(path[-1]):
            self._take(self._step(folder, path[-1]).folded)

    def claim(self, collection_id: str) -> Claim:
        """All that was added."""
        place = self._mounts.place
        folders = {path[:-1] for path in self._paths} | self._links | {place(link) for link in self._links}
        above: set[CollectionPath] = set()
        for path in folders:
            # Where one is known, so are all above it.
            while path not in above:
                above.add(path)
                path = path[:-1]
        return Claim(collection_id, frozenset(self._paths), frozenset(above))

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
