"""Temporaries that nobody needs any more: what earlier runs of a task left, what could not be removed when it should
have been, and what dead tasks have left of whoever's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.transfer.basis.patience import Patience
from agent.transfer.books.journal import Journal
from protocol.control import TaskItem
from protocol.errors import ProtocolError
from protocol.names import CollectionPath, parse_path_untrusted, split_path
from protocol.session import join_path

# Seconds after which a temporary that nothing has changed is an orphan: longer than tasks are held up or kept.
ORPHAN_AGE = 30 * 86400


def sweep_temporaries(
    handle: Directory, prefix: bytes, keep: Collection[bytes] = (), *, own: bytes | None = None
) -> int:
    """Remove temporaries that an earlier run of this task left behind: all with its ``prefix`` but those to ``keep``
    and those of this run, which begin with ``own``, since another part of the task may be at work in the same folder.
    How many there were. In a folder that may be written to and not listed (a drop box) nobody can say, and they stay.
    """
    try:
        left = [name for name in handle.reserved_names() if name.startswith(prefix)]
    except PermissionError:
        return 0
    names = [name for name in left if name not in keep and not (own is not None and name.startswith(own))]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            handle.unlink(name)
    return len(names)


def collect_orphans(handle: Directory, now_ns: int) -> int:
    """Remove temporaries in a folder that nobody has touched for very long: their tasks are dead, whoever's they were.
    How many there were. What cannot be looked at or removed is left for the next time.

    Their change time counts, not the time of modification, which may be that of the source already.
    """
    removed = 0
    with contextlib.suppress(OSError):
        for name in handle.reserved_names():
            with contextlib.suppress(OSError):
                node = handle.lstat(name)
                if node.kind != "dir" and now_ns - node.ctime_ns > ORPHAN_AGE * 10**9:
                    handle.unlink(name)
                    removed += 1
    return removed


def unfinished_folders(journal: Journal, items: Iterable[TaskItem]) -> set[CollectionPath]:
    """Where a task that ends before it is done may have temporaries: folders that are not finished, and those that its
    items lie in."""
    return {split_path(path) for path in journal.unfinished_destinations()} | _parents_of(items)


def sweep_folders(root: Root, folders: Iterable[CollectionPath], prefix: bytes) -> None:
    """Remove the temporaries of a task in these folders, as far as those can be reached now."""
    for folder in folders:
        with contextlib.suppress(OSError), root.open_directory(folder) as handle:
            sweep_temporaries(handle, prefix)


def remove_left_behind(
    root: Root, journal: Journal, prefix: bytes, items: Iterable[TaskItem], patience: Patience
) -> None:
    """Remove temporaries that could not be removed when they should have been, at the end of a task, when it needs none
    of them any more. Raises `TowpathError`; to be called again then."""
    for folder, name in journal.left_behind():
        with _passing_over(folder, patience), root.open_directory(split_path(folder)) as handle:
            handle.unlink(name)
    if journal.left_behind_anywhere():
        for folder in _folders_of(journal, items):
            with _passing_over(folder, patience), root.open_directory(split_path(folder)) as handle:
                sweep_temporaries(handle, prefix)
    journal.forget_left_behind()


@contextlib.contextmanager
def _passing_over(folder: bytes, patience: Patience) -> Iterator[None]:
    """Pass over what is gone already, or not ours to remove any more: the collection of orphans looks at it again."""
    try:
        yield
    except OSError as error:
        problem = fault(error, "destination", folder)
        if patience.is_passing(folder, problem):
            raise problem from error


def _folders_of(journal: Journal, items: Iterable[TaskItem]) -> Iterator[bytes]:
    """All folders at the destination in which a task makes temporaries."""
    for destination, _, _ in journal.directories_deepest_first():
        yield destination
    for parent in _parents_of(items):
        yield join_path(parent)


def _parents_of(items: Iterable[TaskItem]) -> set[CollectionPath]:
    parents = set()
    for item in items:
        # One whose name cannot be has failed by itself.
        with contextlib.suppress(ProtocolError):
            parents.add(parse_path_untrusted(item.destination_path)[:-1])
    return parents
