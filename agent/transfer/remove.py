"""Removing entries below a directory handle, never following a link on the way."""

from __future__ import annotations

from collections.abc import Iterator

from agent.storage.base import Directory, Node

# Open folders at once: trees may be deeper than a process may have files open.
MAX_OPEN = 64


def remove_entry(parent: Directory, node: Node, *, recursive: bool) -> int:
    """Remove one entry, with ``recursive`` a folder and all below it. How many entries are gone.

    Raises OSError (ENOTEMPTY for a folder that holds something without ``recursive``). An entry that is gone already
    counts as none. Works for trees of any depth: without recursion, and with few handles.
    """
    if node.kind != "dir":
        return _unlink(parent, node.name)
    removed = _empty(parent, node.name) if recursive else 0
    try:
        parent.rmdir(node.name)
    except FileNotFoundError:
        return removed
    return removed + 1


class _Level:
    """A folder being emptied: its handle, its name in the one above, what is still to be looked at."""

    def __init__(self, handle: Directory, name: bytes) -> None:
        self.handle = handle
        self.name = name
        # Temporaries of unfinished transfers go with the folder that was asked to go.
        self.waiting: Iterator[Node] = iter(list(handle.scan(reserved=True)))


def _empty(parent: Directory, name: bytes) -> int:
    """Remove everything below a folder."""
    removed = 0
    levels: list[_Level] = []
    try:
        if not _descend(levels, parent, name):
            return 0
        while levels:
            level = levels[-1]
            node = next(level.waiting, None)
            if node is None:
                levels.pop().handle.close()
                if levels:
                    removed += _rmdir(levels[-1].handle, level.name)
            elif node.kind != "dir":
                removed += _unlink(level.handle, node.name)
            elif len(levels) < MAX_OPEN:
                _descend(levels, level.handle, node.name)
            else:
                # Deeper than handles reach: what lies there is lifted up to the first folder and emptied from it.
                _lift(levels[0].handle, level.handle, node.name)
                levels[0].waiting = iter(list(levels[0].handle.scan(reserved=True)))
        return removed
    finally:
        for level in levels:
            level.handle.close()


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


def _unlink(folder: Directory, name: bytes) -> int:
    try:
        folder.unlink(name)
    except FileNotFoundError:
        return 0
    return 1


def _rmdir(folder: Directory, name: bytes) -> int:
    try:
        folder.rmdir(name)
    except FileNotFoundError:
        return 0
    return 1
