"""The place where a task has begun, its root and the disks mounted below: whether it is another one than the journal
remembers, and whether it is still there."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from agent.storage.base import Root
from agent.storage.disks import DiskAway
from agent.transfer.books.journal import Journal
from protocol.errors import TowpathError
from protocol.names import format_path
from protocol.session import join_path

# How often (seconds) to look whether the root is still where it was.
LOOK_AT_ROOT = 2.0


def is_elsewhere(root: Root, journal: Journal) -> bool:
    """Whether the root, or a disk below it, is another one than the task began in, and its owner has accepted that. It
    is remembered from now on. Blocks.

    Raises `NeedsPerson` (ROOT_CHANGED) for one that was not accepted: what has arrived is on the other one.
    """
    token, known = root.token().encode(), journal.get("root")
    moved = bool(token) and known is not None and token != known
    if moved:
        root.check_original()
    if token and token != known:
        journal.put("root", token)
    # Of a disk below, only what was accepted is remembered, which may be that there is none any more.
    disks = {format_path(path): disk for path, disk in root.disk_tokens().items()}
    began = journal.get("disks")
    before = msgspec.json.decode(began, type=dict[str, str]) if began is not None else {}
    if disks != before:
        journal.put("disks", msgspec.json.encode(disks))
    return moved or any(disks.get(path) != disk for path, disk in before.items())


async def watch_root(root: Root, stop: Callable[[TowpathError], object]) -> None:
    """Call ``stop`` when the root's disk is taken away: what is opened would go on to be written where nobody sees it,
    perhaps with another disk in its place."""
    while True:
        await trio.sleep(LOOK_AT_ROOT)
        try:
            # A file server that hangs must not hold up the end of the run.
            await trio.to_thread.run_sync(root.check_present, abandon_on_cancel=True)
        except TowpathError as error:
            stop(error)
            return


def check_place(root: Root, journal: Journal, *, disks: bool) -> None:
    """Everything has arrived: the root, and with ``disks`` the disks below it that the task writes to, must be there
    still, or it is where nobody sees it. Blocks; raises `NeedsPerson`, OSError."""
    root.check_present()
    for path in root.disk_tokens() if disks else ():
        if journal.has_directory(join_path(path)):
            try:
                root.open_directory(path).close()
            except FileNotFoundError:
                raise DiskAway(path) from None
