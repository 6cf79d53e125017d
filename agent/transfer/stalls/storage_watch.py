"""Notices that the destination's storage does not answer: threads that wait for it can say nothing themselves."""

from __future__ import annotations

from collections.abc import Callable

import trio

from agent.storage.base import Directory
from agent.transfer.stalls.lane_watch import TellStandstill, storage_silent
from agent.transfer.stalls.storage_probe import StorageProbe
from protocol.standstill import HANGS_FOR, LOOK_EVERY


async def watch_storage(
    progress: Callable[[], object], folders: Callable[[], list[Directory]], names: bytes, tell: TellStandstill
) -> None:
    """While ``progress`` gives the same for long, try whether a file can be made in one of ``folders``, which are
    written to now. Until cancelled; what was told last then still holds. ``names`` begins the names of such files."""
    probe = StorageProbe(names)
    before, looked, still = progress(), trio.current_time(), 0.0
    while True:
        await trio.sleep(LOOK_EVERY)
        # Time in which the whole machine slept does not count.
        passed, looked = min(trio.current_time() - looked, 2 * LOOK_EVERY), trio.current_time()
        if (now := progress()) != before:
            before, still = now, 0.0
            tell(None)
            continue
        still += passed
        if still < HANGS_FOR:
            continue
        # The one that has waited for longest.
        folder = next((handle for each in folders() if (handle := each.fileno()) is not None), None)
        if folder is None:
            continue
        if await probe.answers(folder):
            # It is something else that is waited for.
            still = 0.0
            tell(None)
        else:
            tell(storage_silent())
