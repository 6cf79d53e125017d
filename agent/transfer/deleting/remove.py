"""Removing entries below a directory handle, never following a link on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice

from agent.storage.base import Directory
from agent.storage.node import Node
from agent.storage.own_files import HoldsOwn

# Open folders at once: trees may be deeper than a process may have files open.
MAX_OPEN = 64
# Entries of a folder that are listed before they are removed: folders may hold more than memory does.
AT_ONCE = 10_000
# Listings in a row of which nothing was there any more: somebody else removes the same, or a file server goes on giving
# an old one.
MOST_IN_VAIN = 100


class Stopped(Exception):
    """The task was cancelled or paused between two removals. Nothing that catches errors may take it for one."""


class Removal:
    """Removes entries and counts those that are gone. ``on_gone`` is called after each of them; what it raises ends the
    removal there, and comes out of `entry`. What ``spares`` says of an entry in a folder leaves it there, and with it
    the folders that lead to it; ``spared`` tells that there was one, ``missed`` that something was gone already, or all
    with its root."""

    def __init__(
        self, on_gone: Callable[[], None] = lambda: None, spares: Callable[[Node], bool] | None = None
    ) -> None:
        self._on_gone = on_gone
        self._spares = spares
        self._stays: HoldsOwn | None = None
        self.count = 0
        self.spared = False
        self.missed = False

    def entry(self, parent: Directory, node: Node, *, recursive: bool) -> None:
        """Remove one entry, with ``recursive`` a folder and all below it.

        Raises OSError (ENOTEMPTY for a folder that holds something without ``recursive``, or in which somebody goes on
        making files); `HoldsOwn` only when all else is gone. An entry that is gone already counts as none. Works for
        trees of any depth and width: without recursion, and with few handles.
        """
        self._stays = None
        if recursive and node.kind == "dir" and not self._empty(parent, node.name):
            self.spared = True
        else:
            self._remove(parent.rmdir if node.kind == "dir" else parent.unlink, node.name)
        if self._stays is not None:
            raise self._stays

    def _remove(self, how: Callable[[bytes], None], name: bytes) -> None:
        try:
            how(name)
        except FileNotFoundError:
            self.missed = True
            return
        except HoldsOwn as error:
            self._stays = error
            return
        self.count += 1
        self._on_gone()

    def _empty(self, parent: Directory, name: bytes) -> bool:
        """Remove everything below a folder; whether nothing was to be left there."""
        levels: list[_Level] = []
        spared = False
        try:
            if not self._descend(levels, parent, name):
                return True
            while levels:
                level = levels[-1]
                node = level.next(self.count)
                if node is None:
                    levels.pop().handle.close()
                    spared = level.spared
                    if not levels:
                        continue
                    if spared:
                        levels[-1].spared = True
                    else:
                        self._remove(levels[-1].handle.rmdir, level.name)
                elif node.kind != "dir":
                    self._remove(level.handle.unlink, node.name)
                elif len(levels) < MAX_OPEN:
                    self._descend(levels, level.handle, node.name)
                elif self._spares is not None:
                    # It cannot be told from here what is in it, and what is left stays where it is.
                    level.spared = True
                else:
                    # Deeper than handles reach: what lies there is lifted up to the first folder and emptied from it.
                    _lift(levels[0].handle, level.handle, node.name)
                    levels[0].look_again()
        finally:
            for level in levels:
                level.handle.close()
        return not spared

    def _descend(self, levels: list[_Level], above: Directory, name: bytes) -> bool:
        try:
            handle = above.open_directory(name)
        except FileNotFoundError:
            return False
        try:
            levels.append(_Level(handle, name, self._spares))
        except BaseException:
            handle.close()
            raise
        return True


class _Level:
    """A folder being emptied: its handle, its name in the one above, what is still to be looked at."""

    def __init__(self, handle: Directory, name: bytes, spares: Callable[[Node], bool] | None) -> None:
        self.handle = handle
        self.name = name
        # Whether something in it is to be left there.
        self.spared = False
        self._spares = spares
        self._waiting: Iterator[Node] = iter(())
        # Whether there may be more than waits; how many entries were gone when that was listed; and how many listings
        # since then were in vain.
        self._more = True
        self._gone = -1
        self._in_vain = 0

    def next(self, gone: int) -> Node | None:
        """The next entry, None when there are none; ``gone`` is how many were removed so far, anywhere."""
        node = next(self._waiting, None)
        if node is None and self._more:
            self._in_vain = 0 if gone > self._gone else self._in_vain + 1
            if self._in_vain > MOST_IN_VAIN:
                return None
            self._gone = gone
            # Temporaries of unfinished transfers go with the folder that was asked to go.
            found: list[Node] = []
            with suppress(FileNotFoundError):
                # The folder itself is gone when somebody else was faster.
                found.extend(islice(self._listed(), AT_ONCE))
            self._more = len(found) == AT_ONCE
            self._waiting = iter(found)
            node = next(self._waiting, None)
        return node

    def _listed(self) -> Iterator[Node]:
        for node in self.handle.scan(reserved=True):
            if self._spares is not None and self._spares(node):
                self.spared = True
            else:
                yield node

    def look_again(self) -> None:
        """There is something new in the folder."""
        self._more, self._gone, self._in_vain = True, -1, 0


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
