"""Which folders a folder lies in, also above its collection: who copies one of them into it comes to no end."""

from __future__ import annotations

import os

from agent.storage.base import Directory
from agent.storage.handles import LOOKUP


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
