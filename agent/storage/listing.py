"""``ls`` and ``stat`` as Globus shows them: symlinks with the type of their target, names of users and groups.

Both block and belong in a thread. They raise the errors of `agent.storage.faults` for operations on one collection.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator

from agent.storage.base import NOWHERE, Directory, Root
from agent.storage.faults import fault
from agent.storage.node import Node
from agent.storage.query import Query, Row, select
from agent.system import accounts
from protocol.control import Entry, Listing
from protocol.errors import ItemFailed
from protocol.names import CollectionPath, escape, format_path

# Rows held in memory for sorting and counting; about 400 bytes each.
MAX_ROWS = 1_000_000
MAX_ACCOUNTS = 4096
# Seconds after which whoever asked has given up; the thread is free for others then.
LONGEST = 60.0


class Accounts:
    """Names of users and groups by number, remembered: asking a directory service may take milliseconds each time.

    For threads; the number itself stands for an unknown account.
    """

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}
        self._lock = threading.Lock()

    def user(self, uid: int) -> str:
        """The login name of a user."""
        return self._name(self._users, uid, lambda: accounts.user_name(uid))

    def group(self, gid: int) -> str:
        """The name of a group."""
        return self._name(self._groups, gid, lambda: accounts.group_name(gid))

    def forget(self) -> None:
        """Ask again from now on: accounts may have been renamed."""
        with self._lock:
            self._users.clear()
            self._groups.clear()

    def _name(self, known: dict[int, str], number: int, ask: Callable[[], str]) -> str:
        name = known.get(number)
        if name is None:
            try:
                name = escape(ask().encode("utf-8", "surrogateescape"))
            except (KeyError, OverflowError):
                name = str(number)
            with self._lock:
                if len(known) >= MAX_ACCOUNTS:
                    known.clear()
                known[number] = name
        return name


def list_directory(
    root: Root, path: CollectionPath, query: Query, accounts: Accounts, clock: Callable[[], float] = time.monotonic
) -> Listing:
    """One page of a folder's entries, temporaries left out.

    Raises `ItemFailed` (NOT_FOUND, NOT_A_DIRECTORY, PERMISSION_DENIED, TOO_LARGE beyond `MAX_ROWS` entries or
    `LONGEST` seconds), `RetryLater`, `NeedsPerson`.
    """
    shown = format_path(path, directory=True)
    try:
        root.check_present()
        with root.open_directory(path) as directory:
            page, total = select(_rows(directory, query, shown, clock), query, accounts.user, accounts.group)
    except OSError as error:
        raise fault(error, "", path) from error
    entries = [_entry(row, accounts) for row in page]
    return Listing(
        path=shown, absolute_path=shown, entries=entries, total=total, offset=query.offset, limit=query.limit
    )


def stat_entry(root: Root, path: CollectionPath, accounts: Accounts) -> Entry:
    """One file or folder; the name of the root is empty. Raises as `list_directory`."""
    try:
        root.check_present()
        if not path:
            return _entry(Row(b"", "dir", root.stat(path)), accounts)
        directory, name = root.open_parent(path)
        with directory:
            row = _row(directory, directory.lstat(name))
    except OSError as error:
        raise fault(error, "", path) from error
    if row is None:
        raise fault(FileNotFoundError(errno.ENOENT, ""), "", path)
    return _entry(row, accounts)


def _rows(directory: Directory, query: Query, shown: str, clock: Callable[[], float]) -> Iterator[Row]:
    count, last = 0, clock() + LONGEST
    for node in directory.scan():
        if clock() > last:
            sentence = (
                f"{shown} could not be listed within {LONGEST:.0f} seconds; ask for less, or of a smaller folder."
            )
            raise ItemFailed(sentence, code="TOO_LARGE", subject=shown)
        if not query.show_hidden and node.name.startswith(b"."):
            continue
        row = _row(directory, node)
        if row is not None:
            yield row
        count += 1
        if count > MAX_ROWS:
            sentence = f"{shown} holds more than {MAX_ROWS} entries, too many to list; a transfer can still take them."
            raise ItemFailed(sentence, code="TOO_LARGE", subject=shown)


def _row(directory: Directory, node: Node) -> Row | None:
    """A node with what its link leads to; None if the link vanished meanwhile."""
    if node.kind != "symlink":
        return Row(node.name, node.kind, node)
    try:
        text = directory.readlink(node.name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            return None
        raise
    try:
        target = directory.stat(node.name)
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        return Row(node.name, "invalid_symlink", node, node, text)
    if target.kind == "symlink":
        return Row(node.name, "invalid_symlink", node, node, text)
    return Row(node.name, target.kind, target, node, text)


def _entry(row: Row, accounts: Accounts) -> Entry:
    node, link = row.node, row.link
    return Entry(
        name=escape(row.name),
        type=row.type,
        size=node.size,
        mtime_ns=node.mtime_ns,
        mode=node.mode,
        user=accounts.user(node.uid),
        group=accounts.group(node.gid),
        link_target=escape(row.link_target) if link is not None else None,
        link_size=link.size if link is not None else None,
        link_mtime_ns=link.mtime_ns if link is not None else None,
    )
