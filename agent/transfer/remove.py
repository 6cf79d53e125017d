"""Removing entries below a directory handle, never following a link on the way."""

from __future__ import annotations

from agent.storage.base import Directory, Node


def remove_entry(parent: Directory, node: Node, *, recursive: bool) -> int:
    """Remove one entry, with ``recursive`` a folder and all below it. How many entries are gone.

    Raises OSError (ENOTEMPTY for a folder that holds something without ``recursive``). An entry that is gone already
    as none.
    """
    if node.kind != "dir":
        try:
            parent.unlink(node.name)
        except FileNotFoundError:
            return 0
        return 1
    removed = 0
    if recursive:
        try:
            folder = parent.open_directory(node.name)
        except FileNotFoundError:
            return 0
        with folder:
            # Temporaries of unfinished transfers go with the folder that was asked to go.
            for child in list(folder.scan(reserved=True)):
                removed += remove_entry(folder, child, recursive=True)
    try:
        parent.rmdir(node.name)
    except FileNotFoundError:
        return removed
    return removed + 1
