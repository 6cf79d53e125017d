"""What remains of a task when all has arrived: what a mirror deletes, what dead runs left, and folders' times."""

from __future__ import annotations

from functools import partial

import trio

from agent.transfer.basis.stopping import run_in_thread
from agent.transfer.course.run import RunContext
from agent.transfer.deleting.mirror import Mirror
from agent.transfer.planning.left_behind import remove_left_behind
from agent.transfer.planning.plan import set_directory_times
from agent.transfer.stalls.storage_watch import watch_deletions
from protocol.beside import beside


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
        await trio.to_thread.run_sync(set_directory_times, context.root, rows, context.patience)
