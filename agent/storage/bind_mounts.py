"""Folders that are also somewhere else: bind mounts, and disks that are mounted twice.

The table of mounts says so (proc(5)): each line names a file system, the folder of it that is shown, and where. Names
are folded (`agent.storage.folding.fold_key`) and paths begin at the root of the file system. No disk is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from agent.storage import mounts
from agent.storage.folding import fold_key
from protocol.names import CollectionPath


@dataclass(frozen=True, slots=True)
class Shown:
    """A folder of a file system (its device as the table has it) and where it is mounted."""

    device: bytes
    folder: CollectionPath
    point: CollectionPath


class BindMounts:
    """What is in two places, for one table of mounts. Never changes."""

    def __init__(self, table: Iterable[Shown] = ()) -> None:
        rows = list(table)
        first: defaultdict[bytes, dict[CollectionPath, CollectionPath]] = defaultdict(dict)
        for row in rows:
            first[row.device].setdefault(row.folder, row.point)
        # Where a mount point is, too; the last mount in a place is the one that is seen.
        self._others: dict[CollectionPath, CollectionPath] = {}
        for row in rows:
            self._others.pop(row.point, None)
            other = _elsewhere(row, first[row.device])
            if other != row.point:
                self._others[row.point] = other
        self._below: defaultdict[CollectionPath, set[CollectionPath]] = defaultdict(set)
        for point in self._others:
            for depth in range(len(point)):
                self._below[point[:depth]].add(point)

    def __bool__(self) -> bool:
        return bool(self._others)

    def place(self, path: CollectionPath) -> CollectionPath:
        """The one name that a folded path has among all that lead to it. It takes no more steps than there are
        mounts."""
        if not self._others:
            return path
        for _ in range(len(self._others)):
            # The deepest mount is the one that shows it.
            for depth in range(len(path), 0, -1):
                other = self._others.get(path[:depth])
                if other is not None:
                    path = (*other, *path[depth:])
                    break
            else:
                break
        return path

    def points_below(self, path: CollectionPath) -> set[CollectionPath]:
        """Mount points below a folded path that show what is in another place, too."""
        return self._below.get(path, set())


def _elsewhere(row: Shown, points: dict[CollectionPath, CollectionPath]) -> CollectionPath:
    """Where the folder that a mount shows is, too: in the mount that shows most of the file system."""
    for depth in range(len(row.folder) + 1):
        point = points.get(row.folder[:depth])
        if point is not None:
            return (*point, *row.folder[depth:])
    return row.point


def read_table() -> BindMounts:
    """This moment's. Where the system has no such table there are none."""
    try:
        with open("/proc/self/mountinfo", "rb") as lines:
            return BindMounts([_shown(line) for line in lines])
    except OSError:
        return BindMounts()


def _shown(line: bytes) -> Shown:
    _, _, device, folder, point, _ = line.split(b" ", 5)
    return Shown(device, _folded(folder), _folded(point))


def _folded(field: bytes) -> CollectionPath:
    return tuple(fold_key(part) for part in mounts.unescaped(field).split(b"/") if part)
