"""Removing entries below a directory handle, never following a link on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from agent.storage.base import Directory, Node
from agent.storage.own_files import HoldsOwn

# Open folders at once: trees may be deeper than a process may have files open.
MAX_OPEN = 64
# Entries of a folder that are listed before they are removed: folders may hold more than memory does.
AT_ONCE = 10_000


class Stopped(Exception):
    """The task was cancelled or paused between two removals. Nothing that catches errors may take it for one."""


class Removal:
    """Removes entries and counts those that are gone. ``on_gone`` is called after each of them; what it raises ends the
    removal there, and comes out of `entry`."""

    def __init__(self, on_gone: Callable[[], None] = lambda: None) -> None:
        self._on_gone = on_gone
        self._stays: HoldsOwn | None = None
        self.count = 0

    def entry(self, parent: Directory, node: Node, *, recursive: bool) -> None:
        """Remove one entry, with ``recursive`` a folder and all below it.

        Raises OSError (ENOTEMPTY for a folder that holds something without ``recursive``); `HoldsOwn` only when all
        else is gone. An entry that is gone already counts as none. Works for trees of any depth and width: without
        recursion, and with few handles.
        """
        self._stays = None
        if recursive and node.kind == "dir":
            self._empty(parent, node.name)
        self._remove(parent.rmdir if node.kind == "dir" else parent.unlink, node.name)
        if self._stays is not None:
            raise self._stays

    def _remove(self, how: Callable[[bytes], None], name: bytes) -> None:
        try:
            how(name)
        except FileNotFoundError:
            return
        except HoldsOwn as error:
            self._stays = error
            return
        self.count += 1
        self._on_gone()

    def _empty(self, parent: Directory, name: bytes) -> None:
        """Remove everything below a folder."""
        levels: list[_Level] = []
        try:
            if not _descend(levels, parent, name):
                return
            while levels:
                level = levels[-1]
                node = level.next(self.count)
                if node is None:
                    levels.pop().handle.close()
                    if levels:
                        self._remove(levels[-1].handle.rmdir, level.name)
                elif node.kind != "dir":
                    self._remove(level.handle.unlink, node.name)
                elif len(levels) < MAX_OPEN:
                    _descend(levels, level.handle, node.name)
                else:
                    # Deeper than handles reach: what lies there is lifted up to the first folder and emptied from it.
                    _lift(levels[0].handle, level.handle, node.name)
                    levels[0].look_again()
        finally:
            for level in levels:
                level.handle.close()


class _Level:
    """A folder being emptied: its handle, its name in the one above, what is still to be looked at."""

    def __init__(self, handle: Directory, name: bytes) -> None:
        self.handle = handle
        self.name = name
        self._waiting: Iterator[Node] = iter(())
        # Whether there may be more than waits, and how many entries were gone when that was listed.
        self._more = True
        self._gone = -1

    def next(self, gone: int) -> Node | None:
        """The next entry, None when there are none; ``gone`` is how many were removed so far, anywhere."""
        node = next(self._waiting, None)
        # A listing of which nothing could be removed is an old one, which some file servers give for a while.
        if node is None and self._more and gone > self._gone:
            self._gone = gone
            # Temporaries of unfinished transfers go with the folder that was asked to go.
            found = list(islice(self.handle.scan(reserved=True), AT_ONCE))
            self._more = len(found) == AT_ONCE
            self._waiting = iter(found)
            node = next(self._waiting, None)
        return node

    def look_again(self) -> None:
        """There is something new in the folder."""
        self._more, self._gone = True, -1


def _descend(levels: list[_Level], above: Directory, name: bytes) -> bool:
    try:
        handle = above.open_directory(name)
    except FileNotFoundError:
        return False
    try:
        levels.append(_Level(handle, name))
    except BaseException:
        handle.close()
        raise
    return True


def _lift(top: Directory, folder: Directory, name: bytes) -> None:
    """Move a folder that is to be removed to the top of what is being removed, under a name that is free there."""
    number = 0
    while True:
        try:
            folder.rename_no_replace(name, b".towpath.lifted.%d" % number, top)
        except FileExistsError:
            number += 1
        else:
            return
