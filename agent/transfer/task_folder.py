"""What a task keeps in its folder of the state directory: the lock of its worker, the journal, what goes with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import trio

from agent.state_files import make_folder
from agent.system.file_lock import try_lock
from agent.transfer.books.journal import Journal, open_or_rebuild
from agent.transfer.books.manifest import SKIPPED_LIST, TRANSFERRED_LIST, ManifestWriter
from agent.transfer.books.state_trouble import StateTrouble, of_system
from agent.transfer.course.received import ReceivedCounter
from protocol.folder_sync import sync_names

# How long (seconds) an earlier worker of the task may take to end before people hear of it.
LOCK_PATIENCE = 5.0

# What a task's folder holds.
JOURNAL, RECEIVED = "journal.sqlite", "received"
FILES = (RECEIVED, TRANSFERRED_LIST, SKIPPED_LIST)


@dataclass(frozen=True)
class Books:
    """What is written while a task runs. ``rebuilt``: the journal was damaged, and is begun anew."""

    journal: Journal
    # Of what was transferred, and of what was skipped.
    manifests: tuple[ManifestWriter, ManifestWriter]
    received: ReceivedCounter
    rebuilt: bool


async def lock_folder(directory: Path) -> int:
    """Make a task's folder where it is not there, and take its lock: a descriptor, to be closed by the caller. Raises
    `StateTrouble`, also when the lock is not given up in time."""
    try:
        if not (directory / JOURNAL).exists():
            # An earlier worker has come that far only after it had made the folder's name durable.
            await trio.to_thread.run_sync(make_folder, directory)
        return await _alone(directory)
    except OSError as error:
        raise of_system(error, directory) from error


async def _alone(directory: Path) -> int:
    """Wait until no worker of an earlier daemon works on this task any more; it ends when its daemon does. Raises
    OSError, and `StateTrouble` when that takes long."""
    patience = trio.current_time() + LOCK_PATIENCE
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            taken = try_lock(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        # Where the file system has no locks, workers end with their daemon's channel all the same.
        if taken is not False:
            return descriptor
        if trio.current_time() > patience:
            os.close(descriptor)
            raise StateTrouble(
                "An earlier process of this task has not ended yet, perhaps because its disk or file server does "
                "not answer, or because it was stopped; the task goes on when it has.",
                code="STATE_BUSY",
                who="destination owner",
            )
        await trio.sleep(0.05)


@asynccontextmanager
async def opened_books(directory: Path) -> AsyncIterator[Books]:
    """The books in a task's folder, which must be locked; closed afterwards. Raises `StateTrouble`."""
    journal, rebuilt = await trio.to_thread.run_sync(open_or_rebuild, directory / JOURNAL)
    try:
        with contextlib.ExitStack() as stack:
            yield await _beside_journal(directory, journal, stack, rebuilt=rebuilt)
    except StateTrouble:
        journal.abandon()
        raise
    except BaseException:
        with contextlib.suppress(StateTrouble):
            journal.close()
        raise
    journal.close()


async def _beside_journal(directory: Path, journal: Journal, stack: contextlib.ExitStack, *, rebuilt: bool) -> Books:
    transferred, skipped = journal.lengths()
    # That the task has begun is written down after the names of its files were made durable.
    durable = journal.get("begun") is not None and all((directory / name).exists() for name in FILES)
    manifests = (
        stack.enter_context(closing(ManifestWriter(directory / TRANSFERRED_LIST, transferred))),
        stack.enter_context(closing(ManifestWriter(directory / SKIPPED_LIST, skipped))),
    )
    try:
        received = stack.enter_context(closing(ReceivedCounter(directory / RECEIVED)))
        if rebuilt:
            received.reset()
        # What is synced in these files from now on must not go with their names.
        if not durable:
            await trio.to_thread.run_sync(sync_names, directory)
    except OSError as error:
        raise of_system(error, directory) from error
    return Books(journal, manifests, received, rebuilt)
