"""Which folders a folder lies in, also above its collection: who copies one of them into it comes to no end; and
whether it still lies where it was opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from agent.storage.base import Directory
from agent.storage.handles import LOOKUP
from protocol.names import CollectionPath

# How a way says that it leads nowhere any more.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def enclosing(handle: Directory) -> set[tuple[int, int]]:
    """Device and inode of an open folder, and of all folders above it, as far as this account may look. Raises OSError
    of the folder itself."""
    status = handle.status()
    last = (status.device, status.inode)
    found = {last}
    own = handle.fileno()
    if own is None:
        return found
    here = os.dup(own)
    try:
        while True:
            try:
                above = os.open("..", LOOKUP, dir_fd=here)
            except OSError:
                return found
            os.close(here)
            here = above
            there = os.fstat(here)
            if (there.st_dev, there.st_ino) == last:
                # The root of the file system lies in itself.
                return found
            last = (there.st_dev, there.st_ino)
            found.add(last)
    finally:
        os.close(here)


def components_in_place(handle: Directory, found_at: Callable[[CollectionPath], tuple[int, int]], probe: bytes) -> int:
    """`Directory.components_in_place` of an open folder; ``found_at`` tells device and inode of what is at a path now,
    or raises OSError."""
    path = handle.path
    try:
        status = handle.status()
        if found_at(path) == (status.device, status.inode) or _is_seen(handle, found_at, probe):
            return len(path)
    except OSError as error:
        if error.errno not in _GONE:
            return len(path)
    try:
        above = enclosing(handle)
    except OSError:
        return len(path) - 1
    for count in range(1, len(path)):
        try:
            found = found_at(path[:count])
        except OSError:
            return count - 1
        # A folder that was removed lies in none.
        if len(above) > 1 and found not in above:
            return count - 1
    return len(path) - 1


def _is_seen(handle: Directory, found_at: Callable[[CollectionPath], tuple[int, int]], probe: bytes) -> bool:
    """Whether what is made in an open folder appears where it was opened. Raises OSError, also where it does not."""
    os.close(handle.create_temporary(probe))
    try:
        found_at((*handle.path, probe))
    finally:
        handle.unlink(probe)
    return True
