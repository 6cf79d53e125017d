"""Notices that storage does not answer: threads that wait for it can say nothing themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from agent.storage.base import Directory, Root
from agent.transfer.stalls.lane_watch import TellStandstill, storage_silent
from agent.transfer.stalls.storage_probe import StorageProbe
from protocol.names import CollectionPath
from protocol.standstill import HANGS_FOR, LOOK_EVERY


async def watch_silence(
    progress: Callable[[], object], answers: Callable[[], Awaitable[bool | None]], tell: TellStandstill
) -> None:
    """While ``progress`` gives the same for long, ask whether storage ``answers`` (None: it cannot be asked now). Until
    cancelled; what was told last then still holds."""
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
        answered = await answers()
        if answered:
            # It is something else that is waited for.
            still = 0.0
            tell(None)
        elif answered is not None:
            tell(storage_silent())


async def watch_storage(
    progress: Callable[[], object], folders: Callable[[], list[Directory]], names: bytes, tell: TellStandstill
) -> None:
    """Of the storage that is written to: whether a file can be made in one of ``folders``. ``names`` begins the names
    of such files."""
    probe = StorageProbe(names)

    async def answers() -> bool | None:
        # The one that has waited for longest.
        folder = next((handle for each in folders() if (handle := each.fileno()) is not None), None)
        return None if folder is None else await probe.answers(folder)

    await watch_silence(progress, answers, tell)


class Deletes(Protocol):
    """Somebody who deletes in a thread."""

    @property
    def folder(self) -> Directory | None:
        """The folder in which something is deleted now, while it is open; it stays."""

    @property
    def path(self) -> CollectionPath:
        """What is looked at or deleted."""

    @property
    def steps(self) -> int:
        """Another number whenever something is gone."""


async def watch_deletions(work: Deletes, root: Root, names: bytes, tell: TellStandstill) -> None:
    """Of the storage in which something is deleted. ``names`` as of `watch_storage`."""
    probe = StorageProbe(names)

    async def answers() -> bool | None:
        folder = work.folder
        handle = None if folder is None else folder.fileno()
        return await probe.looks(root, work.path) if handle is None else await probe.answers(handle)

    await watch_silence(lambda: work.steps, answers, tell)


async def watch_opening(tell: TellStandstill) -> None:
    """Of a root that is being opened, which takes moments where storage answers."""

    async def answers() -> bool:
        await trio.lowlevel.checkpoint()
        return False

    await watch_silence(lambda: None, answers, tell)
