"""How far somebody comes in a collection: nobody leaves its root, and some may come to certain folders only."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.names import CollectionPath, is_within


class LeavesCollection(OSError):
    """A symlink leads out of the collection's root, or a name would."""

    def __init__(self, sentence: str = "leads out of the collection") -> None:
        super().__init__(errno.EXDEV, sentence)


class LeavesReach(PermissionError):
    """A symlink leads to a folder of the collection that is not open to whoever came this way."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "is reached through a symlink that leads to where you have no permission")


@dataclass(frozen=True)
class Reach:
    """The folders of a collection that somebody may come to, whatever symlinks say."""

    folders: tuple[CollectionPath, ...]

    def check_way(self, place: Sequence[bytes]) -> None:
        """Raise `LeavesReach` unless the place lies in one of the folders, or on the way to one."""
        if not any(_begin_alike(place, folder) for folder in self.folders):
            raise LeavesReach

    def check_end(self, place: Sequence[bytes]) -> None:
        """Raise `LeavesReach` unless the place lies in one of the folders."""
        if not any(is_within(tuple(place), folder) for folder in self.folders):
            raise LeavesReach


def _begin_alike(one: Sequence[bytes], other: Sequence[bytes]) -> bool:
    return all(left == right for left, right in zip(one, other, strict=False))
