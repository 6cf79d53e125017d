"""Where collections really are on this machine, so that two of them over one folder are known to be one place."""

from __future__ import annotations

import os
from collections.abc import Iterable

import trio

from agent.config.keys import CollectionConfig
from protocol.names import CollectionPath

# A disk that does not answer holds nobody up longer than this (seconds): its collections count as configured then.
PATIENCE = 5.0


class Places:
    """Real folders of collections. `look` asks the disks; `of` answers at once with what was found last."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], CollectionPath] = {}

    def of(self, collection: CollectionConfig) -> CollectionPath:
        """The components of a collection's root from the root of the file system."""
        return self._found.get((collection.id, collection.root)) or _components(os.path.abspath(collection.root))

    async def look(self, collections: Iterable[CollectionConfig]) -> bool:
        """Find out where these collections are now; whether anything differs from what was known."""
        rows = list(collections)
        found: dict[tuple[str, str], CollectionPath] | None = None
        with trio.move_on_after(PATIENCE):
            found = await trio.to_thread.run_sync(_find, rows, abandon_on_cancel=True)
        if found is None or found == self._found:
            return False
        self._found = found
        return True


def _find(collections: list[CollectionConfig]) -> dict[tuple[str, str], CollectionPath]:
    # One folder may be mounted at several places; it is the same all the same.
    by_identity: dict[tuple[int, int], CollectionPath] = {}
    found = {}
    for collection in collections:
        path = _components(os.path.realpath(collection.root))
        try:
            status = os.stat(collection.root)
        except OSError:
            # It is not there now: its name is all there is to go by.
            found[collection.id, collection.root] = path
        else:
            found[collection.id, collection.root] = by_identity.setdefault((status.st_dev, status.st_ino), path)
    return found


def _components(path: str) -> CollectionPath:
    return tuple(part for part in os.fsencode(path).split(b"/") if part)
