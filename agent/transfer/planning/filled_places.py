"""What a mirror must not delete although the folder it looks at lacks it at the source: what other items of the same
task put there. Pure."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from agent.storage.folding import fold_key
from protocol.control import TaskItem
from protocol.errors import ProtocolError
from protocol.names import CollectionPath, parse_path_untrusted

# What is said of a folder that gets something of several items.
SEVERAL = (
    "Several items of the task lead to {place}, so that none of their sources alone says what belongs there: nothing "
    "is deleted in such folders. Mirror them in tasks of their own, or from one folder."
)


def folded(path: CollectionPath) -> CollectionPath:
    """A path of which no other spelling is another one."""
    return tuple(map(fold_key, path))


def items_into(items: Iterable[TaskItem], folder: CollectionPath) -> list[int]:
    """The indices of items that are put into a folder, or one below it."""
    found = []
    for index, item in enumerate(items):
        # One whose name cannot be fails by itself.
        with contextlib.suppress(ProtocolError):
            if parse_path_untrusted(item.destination_path)[:-1][: len(folder)] == folder:
                found.append(index)
    return found


class FilledPlaces:
    """Where the items of a task lead to. Names that differ in case or Unicode form only count as one name: whether they
    are, the destination knows, and a name too many is only one that is not deleted. ``ways``: under which folded paths
    a place is known, where that is more than its own."""

    def __init__(
        self,
        items: Iterable[TaskItem],
        ways: Callable[[CollectionPath], Iterable[CollectionPath]] = lambda path: (folded(path),),
    ) -> None:
        paths: set[CollectionPath] = set()
        folders: Counter[CollectionPath] = Counter()
        for item in items:
            try:
                path = parse_path_untrusted(item.destination_path)
            except ProtocolError:
                # One whose name cannot be fails by itself.
                continue
            for way in set(ways(path)):
                paths.add(way)
                folders[way] += item.recursive is not False
        self._below: defaultdict[CollectionPath, set[bytes]] = defaultdict(set)
        for path in paths:
            for depth in range(len(path)):
                self._below[path[:depth]].add(path[depth])
        # Folders of items that lie in another one's, or are another one's.
        self._shared = {
            path
            for path, count in folders.items()
            if count > 1 or (count and any(folders.get(path[:depth]) for depth in range(len(path))))
        }

    def names(self, folder: CollectionPath) -> set[bytes]:
        """The folded names in a folder of the destination that items lead to or through."""
        return self._below.get(folded(folder), set())

    def several(self, folder: CollectionPath) -> bool:
        """Whether a folder of the destination may get something of several items: none of their sources alone says what
        belongs in it."""
        if not self._shared:
            return False
        path = folded(folder)
        return any(path[:depth] in self._shared for depth in range(len(path) + 1))
