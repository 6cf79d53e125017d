"""Flags for opening files, and making names durable, where a system has them.

Only for files of the agent's own (its state, its logs). Folders that are offered to others are never opened without
them: `agent.storage.posix.open_root` refuses where they are missing.
"""

from __future__ import annotations

import os

# Close on exec; do not follow a link in the last place; only if it is a folder.
CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
# Windows would otherwise turn line ends of what is written into its own.
BINARY: int = getattr(os, "O_BINARY", 0)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make a folder's names (or a file) durable. Raises OSError if it cannot be opened.

    What cannot be synced says so; that is no reason to stop. Windows knows no such step for folders.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY | CLOEXEC)
    try:
        try:
            os.fsync(descriptor)
        except OSError:
            return
    finally:
        os.close(descriptor)
