"""Where tasks really write on this machine, so that two ways to one place are known to be one.

A place is a path from the root of the file system: symlinks on the way are followed, of what is mounted in several
places one counts, and names that differ in case or Unicode form only are one. Whether they are, only their folder
knows, and asking it means writing to it; a name too many is only a task that waits for another one. A task's places are
looked at when it is its turn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio

from agent.config.keys import CollectionConfig
from agent.storage import rules
from agent.storage.bind_mounts import BindMounts, read_table
from agent.storage.real_places import Survey
from agent.storage.walk import components
from agent.transfer.tasks.turns import Claim
from protocol.control import TaskOrder
from protocol.errors import ProtocolError
from protocol.names import CollectionPath, parse_path_untrusted

# A disk that does not answer holds nobody up longer than this (seconds): paths count as they are named then.
PATIENCE = 5.0
# Threads that look at once. They are no others' threads, or disks that do not answer would take them all.
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Wishes:
    """The paths of a task in its collection, whose root this is; and whether what the last name leads to is written to,
    too, where it is a link."""

    collection_id: str
    root: CollectionPath
    paths: tuple[tuple[CollectionPath, bool], ...]


class Places:
    """Finds out what tasks claim. `named` answers at once, `look` asks the disks. Created outside of any thread."""

    def __init__(self) -> None:
        self._mounts = read_table()
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    def named(self, order: TaskOrder, collection: CollectionConfig | None) -> Claim:
        """The places of a task as it names them, without a look at any disk."""
        return _claim(_wishes(order, collection), self._mounts, looks=False)

    async def look(self, order: TaskOrder, collection: CollectionConfig | None) -> Claim:
        """The places of a task as they are now. A disk that does not answer in time is no reason to fail."""
        wishes = _wishes(order, collection)
        with trio.move_on_after(PATIENCE):
            self._mounts, claim = await trio.to_thread.run_sync(
                _look, wishes, abandon_on_cancel=True, limiter=self._limiter
            )
            return claim
        return _claim(wishes, self._mounts, looks=False)


def _wishes(order: TaskOrder, collection: CollectionConfig | None) -> _Wishes:
    """What an order asks for. Items whose names cannot be claim nothing: they fail by themselves."""
    delete = order.type == "DELETE"
    paths = []
    for item in order.items or []:
        try:
            path = parse_path_untrusted(item.source_path if delete else item.destination_path)
        except ProtocolError:
            continue
        # Any name in the folder may be meant.
        pattern = delete and order.options.interpret_globs and bool(path) and rules.has_wildcards(path[-1])
        paths.append((path[:-1], True) if pattern else (path, not delete))
    collection_id = order.destination.collection_id
    # One that is not known is a place of its own.
    root = (b"", collection_id.encode()) if collection is None else _components(collection.root)
    return _Wishes(collection_id, root, tuple(paths))


def _components(path: str) -> CollectionPath:
    return tuple(components(os.fsencode(os.path.abspath(path))))


def _look(wishes: _Wishes) -> tuple[BindMounts, Claim]:
    mounts = read_table()
    return mounts, _claim(wishes, mounts, looks=True)


def _claim(wishes: _Wishes, mounts: BindMounts, *, looks: bool) -> Claim:
    survey = Survey(mounts, looks=looks)
    for path, leads in wishes.paths:
        survey.add((*wishes.root, *path), leads=leads)
    return Claim(wishes.collection_id, survey.paths, survey.above)
