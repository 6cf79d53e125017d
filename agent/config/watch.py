"""Notices that the configuration has changed, without being told.

The kernel's notifications (watchdog) tell at once; where there are none (a change made on another machine of a
network file system, too many watches) a look every now and then finds out. Whole folders are watched, because editors
replace files.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import trio
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver

from agent.system import notifications

logger = logging.getLogger("towpath.config")

LOOK_EVERY = 10.0
# Seconds after a notification: an editor writes, renames and changes modes in several steps.
SETTLE = 0.2

Stamp = tuple[tuple[int, int, int], ...]


class _Handler(FileSystemEventHandler):
    def __init__(
        self, names: frozenset[str], wake: trio.MemorySendChannel[None], token: trio.lowlevel.TrioToken
    ) -> None:
        self._names = names
        self._wake = wake
        self._token = token

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called in watchdog's thread, also for files that were only read."""
        names = {Path(str(path)).name for path in (event.src_path, event.dest_path) if path}
        if event.event_type in ("opened", "closed_no_write") or not names & self._names:
            return
        try:
            self._token.run_sync_soon(self._knock, idempotent=True)
        except trio.RunFinishedError:
            pass

    def _knock(self) -> None:
        try:
            self._wake.send_nowait(None)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def changes(files: Sequence[Path]) -> AsyncGenerator[None, None]:
    """Yields each time one of the files has changed; ends only by cancellation.

    The first time comes at once: whoever read the files before may have missed a change until now.
    """
    wake, waken = trio.open_memory_channel[None](1)
    handler = _Handler(frozenset(file.name for file in files), wake, trio.lowlevel.current_trio_token())
    seen = await trio.to_thread.run_sync(_stamp, files)
    observer: BaseObserver | None = None
    try:
        observer = await trio.to_thread.run_sync(_observed, handler, {str(file.parent) for file in files})
        yield
        while True:
            with trio.move_on_after(LOOK_EVERY):
                await waken.receive()
                await trio.sleep(SETTLE)
            stamp = await trio.to_thread.run_sync(_stamp, files)
            if stamp != seen:
                seen = stamp
                yield
    finally:
        if observer is not None:
            notifications.stop(observer)
        wake.close()
        waken.close()


def _observed(handler: FileSystemEventHandler, folders: set[str]) -> BaseObserver | None:
    try:
        return notifications.observe(handler, folders)
    except OSError as error:
        logger.info("No notifications from the file system (%s); looking every %g seconds instead.", error, LOOK_EVERY)
        return None


def _stamp(files: Sequence[Path]) -> Stamp:
    return tuple(_stamp_of(file) for file in files)


def _stamp_of(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)
