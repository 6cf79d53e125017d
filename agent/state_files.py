"""How files of the state directory may be used, depending on the file system they are on.

SQLite's write-ahead log needs memory shared by all users of a database, and Unix sockets need a kernel of their own:
neither works across the machines of a network file system (HPC home directories on NFS, Lustre, GPFS).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from agent.storage.mounts import is_local, mount_of
from agent.system.files import CLOEXEC, DIRECTORY
from protocol.folder_sync import sync_names


def file_system_of(directory: Path) -> str:
    """The type of the file system a folder is on; empty if it is not known."""
    if not DIRECTORY:
        # Windows: its state directory is the user's own, on this machine.
        return ""
    try:
        descriptor = os.open(directory, os.O_RDONLY | DIRECTORY | CLOEXEC)
    except OSError:
        return ""
    try:
        return mount_of(descriptor, str(directory)).file_system
    finally:
        os.close(descriptor)


def is_shared(directory: Path) -> bool:
    """Whether other machines may see the same folder. A file system of unknown type counts as local: that is macOS."""
    file_system = file_system_of(directory)
    return bool(file_system) and not is_local(file_system)


def pragmas(directory: Path) -> tuple[str, ...]:
    """How a SQLite database in this folder is opened: with a write-ahead log, on a shared file system with a rollback
    journal and locked for as long as it is open. Every database here has one process at a time either way."""
    if is_shared(directory):
        return ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = TRUNCATE", "PRAGMA synchronous = FULL")
    return ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")


def make_private(database: Path) -> None:
    """Before a SQLite database is opened: make its file, or what a version of before made, its owner's alone. SQLite
    gives its log the same mode. What cannot be done is left: the state directory keeps others out, too, and whoever
    opens the file says what is wrong with it."""
    with contextlib.suppress(OSError):
        # Never opened when it is there: closing it would end the locks that this process may have on it.
        if not database.exists():
            os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL | CLOEXEC, 0o600))
        elif database.stat().st_mode & 0o077 and DIRECTORY:
            database.chmod(0o600)


def make_folder(path: Path) -> None:
    """Make a folder for state, private and durable under its name: what is synced in it later is there after a power
    failure. One that is there already may be left from a moment ago, so its name is made durable again. Raises OSError.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    sync_names(path.parent)
