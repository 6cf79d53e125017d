"""A source's directories as they travel: their entries as rows, a message of them at a time."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from itertools import islice

from agent.storage.attributes import mode_of_everybody
from agent.storage.base import NOWHERE, Directory, Root
from agent.storage.faults import fault
from agent.storage.node import Node
from protocol import session
from protocol.errors import ItemFailed
from protocol.names import CollectionPath

# Nanoseconds by which the time of a change may be behind our clock: a tick of the kernel's; file servers have theirs.
CLOCK_TICK, OTHER_CLOCKS = 20_000_000, 60 * 10**9
# And where it is told in whole seconds, or every other one.
COARSE_CLOCK = 2 * 10**9
_OWN_CLOCK = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "ramfs", "tmpfs", "xfs", "zfs"})
_KINDS = {"file": session.FILE, "dir": session.DIRECTORY, "symlink": session.SYMLINK}


def row_of(node: Node, target: bytes | None = None, mode: int | None = None) -> session.Row:
    """A directory entry as it travels, with a mode of its own or this one."""
    return session.Row(
        node.name,
        _KINDS.get(node.kind, session.OTHER),
        node.size,
        node.mtime_ns,
        node.ctime_ns,
        node.device,
        node.inode,
        node.mode if mode is None else mode,
        target,
        node.nlink,
    )


class SessionBegin:
    """When a session began, by the clock that gives changes their times: one that is set back later gives a change
    after it an earlier time than one before. Any thread may ask."""

    def __init__(self) -> None:
        self._began = time.monotonic_ns()
        self._ahead = time.time_ns() - self._began

    def earliest_ns(self) -> int:
        """The earliest time that a change since then may have, as far as the clock was looked at."""
        self._ahead = min(self._ahead, time.time_ns() - time.monotonic_ns())
        return self._began + self._ahead


class Listing:
    """One directory on its way to a destination, a message at a time."""

    def __init__(self, root: Root, path: CollectionPath, request: session.ListDirectory, began: SessionBegin) -> None:
        self._root = root
        self._path = path
        self._request = request
        self._handle: Directory | None = None
        self._rows: Iterator[session.Row] = iter(())
        # When its names were last changed, as it was opened.
        self._version = (0, 0)
        self._began = began
        self.ended = False

    def message(self) -> bytes:
        """The next rows, encoded. Blocks; raises OSError."""
        if self._handle is None:
            self._handle = self._root.open_directory(self._path)
            self._version = _names_of(self._handle)
            self._rows = _rows(self._handle, follow=self._request.follow)
        batch = list(islice(self._rows, session.ROWS_IN_MESSAGE))
        if len(batch) < session.ROWS_IN_MESSAGE:
            # What lies beyond a folder that went with its disk must not pass for what the source does not have.
            self._handle.check_disks()
            self.ended = True
            names = _names_of(self._handle)
            self.close()
            changed, mtime_ns = names != self._version, self._version[0]
            rows = session.Rows(self._request.r, batch, self.ended, changed, self._is_recent(max(names)), mtime_ns)
            return session.encode(rows)
        return session.encode(session.Rows(self._request.r, batch))

    def _is_recent(self, names_ns: int) -> bool:
        margin = CLOCK_TICK if self._root.features.file_system in _OWN_CLOCK else OTHER_CLOCKS
        if names_ns % 10**9 == 0:
            margin = max(margin, COARSE_CLOCK)
        return names_ns >= self._began.earliest_ns() - margin

    def close(self) -> None:
        """Safe to call twice."""
        if self._handle is not None:
            self._handle.close()


def _names_of(handle: Directory) -> tuple[int, int]:
    """What of a folder changes whenever a name in it does."""
    status = handle.status()
    return (status.mtime_ns, status.ctime_ns)


def narrowed_row(node: Node, error: OSError) -> session.Row:
    """A file whose access list could not be looked at: nobody gets more than everybody has."""
    # One that is gone says so when it is asked about alone.
    again = error.errno == errno.ENOENT or not isinstance(fault(error, "source", node.name), ItemFailed)
    return row_of(node, session.LOOK_AGAIN if again else session.NARROWED, mode_of_everybody(node.mode))


def looked_at(handle: Directory, node: Node, target: bytes | None = None, *, follow: bool) -> session.Row:
    """The row of an entry, or (``follow``) of what a link leads to."""
    try:
        return row_of(node, target, handle.mode_without_list(node, follow=follow))
    except OSError as error:
        return narrowed_row(node, error)


def _rows(handle: Directory, *, follow: bool) -> Iterator[session.Row]:
    for node in handle.scan():
        try:
            if node.kind != "symlink":
                yield row_of(node, mode=handle.mode_without_list(node))
            elif follow:
                yield looked_at(handle, handle.stat(node.name), follow=True)
            else:
                yield row_of(node, handle.readlink(node.name))
        except OSError as error:
            if node.kind != "symlink":
                yield narrowed_row(node, error)
                continue
            if not follow and error.errno == errno.ENOENT:
                # It vanished, as other entries do while they are listed.
                continue
            # A link that leads nowhere or out of the collection: reported as what it is. Any other trouble may pass,
            # and is asked about again.
            yield row_of(node, b"" if follow and error.errno in NOWHERE else None)
