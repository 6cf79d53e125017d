"""What remains of a task when all has arrived: what a mirror deletes, what dead runs left, and folders' times."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import trio

from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.transfer.basis.patience import Patience
from agent.transfer.basis.stopping import run_in_thread
from agent.transfer.course.run import RunContext
from agent.transfer.deleting.mirror import Mirror
from agent.transfer.planning.left_behind import remove_left_behind
from agent.transfer.stalls.storage_watch import watch_deletions
from protocol.beside import beside
from protocol.names import CollectionPath, split_path


async def last_steps(context: RunContext, mirror: Mirror, probes: bytes) -> None:
    """Do all that. Files by which the storage is asked have names that begin with ``probes``. Raises `TowpathError`,
    OSError; cancelling ends deletions before the next file."""
    options = context.order.options
    if options.delete_destination_extra:
        tell = partial(context.on_standstill, "storage")
        async with beside(partial(watch_deletions, mirror, context.root, probes, tell)):
            await run_in_thread(mirror.run, mirror.stop)
    await trio.to_thread.run_sync(
        remove_left_behind,
        context.root,
        context.journal,
        context.temporary_prefix,
        context.order.items or [],
        context.patience,
    )
    # Last, because everything else changes them.
    if options.preserve_timestamp:
        rows = context.journal.directories_deepest_first()
        await trio.to_thread.run_sync(_set_directory_times, context.root, rows, context.patience)


def _set_directory_times(root: Root, rows: Iterator[tuple[bytes, int, int]], patience: Patience) -> None:
    """Give directories the times of their sources, children before parents. One that is gone, or is no folder of the
    collection any more, is left out.

    Raises `TowpathError`; to be called again then.
    """
    parent: Directory | None = None
    above: CollectionPath = ()
    try:
        for destination, mtime_ns, _ in rows:
            path = split_path(destination)
            if not path:
                continue
            try:
                if parent is None or path[:-1] != above:
                    # Folders of one folder mostly come one after the other.
                    if parent is not None:
                        parent.close()
                        parent = None
                    (parent, _name), above = root.open_parent(path), path[:-1]
                parent.set_times(path[-1], mtime_ns)
            except OSError as error:
                problem = fault(error, "destination", destination)
                if patience.is_passing(destination, problem):
                    raise problem from error
    finally:
        if parent is not None:
            parent.close()
