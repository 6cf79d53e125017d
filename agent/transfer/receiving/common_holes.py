"""Blocks of a large file that are holes at both ends, and so are the same without being looked at."""

from __future__ import annotations

import trio

from agent.transfer.basis.holes import WORTH_ASKING, data_extents, mark_holes
from agent.transfer.basis.jobs import FileJob, empty_bitmap
from agent.transfer.course.run import Run
from protocol.session import EXTENTS


async def common_holes(run: Run, job: FileJob, descriptor: int, block: int) -> bytearray:
    """A bitmap of the blocks that hold no data at the source and in an open file here; empty where that cannot be told.
    Raises OSError, `TowpathError` (the source, `SessionLost` among them)."""
    ours = empty_bitmap(job.row.size, block)
    if job.row.size < WORTH_ASKING or EXTENTS not in run.session.abilities:
        return ours
    theirs = bytearray(ours)
    for bitmap, extents in (
        (theirs, await run.session.extents(job.source_path, job.row.version, follow=job.follow)),
        (ours, await trio.to_thread.run_sync(data_extents, descriptor, job.row.size)),
    ):
        if extents is not None:
            mark_holes(bitmap, extents, job.row.size, block)
    # As numbers, since the bitmaps may be very large.
    both = int.from_bytes(ours, "little") & int.from_bytes(theirs, "little")
    return bytearray(both.to_bytes(len(ours), "little"))
