"""A second look at the source's folders when everything has arrived: whether names changed in one after it was listed.

A file that somebody moves from a folder that is still to be listed into one that was listed already is in neither list:
it would be missing here, and what a mirror has of it be deleted. So folders that changed since are listed once more,
for what is not here; what is here, is not brought again. Nothing is asked where the source says that no folder
had changed since the session began, nothing was missed there, and nothing is to be deleted: a file that was moved
leaves the folder behind changed. When they are not listed again any more, a mirror deletes nothing in folders that
changed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import trio

from agent.storage.faults import fault
from agent.storage.node import nearest_time
from agent.transfer.basis.journal_rows import DirectoryRow
from agent.transfer.course.run import Run
from protocol.errors import NeedsPerson, RetryLater, error_from_document_untrusted
from protocol.names import split_path
from protocol.session import DIRECTORY, Row, StatResult, join_path

# How often in the course of a task: whoever moves one file back and forth is not followed for ever.
LOOKS = 2
# Round trips that overlap.
_AT_ONCE = 8
_LOOKS = "second looks"

# Of the source's answers: it has no folder there, so that there is nothing to be missed either.
GONE = frozenset({"FILE_NOT_FOUND", "NOT_FOUND", "NOT_A_DIRECTORY"})


class SecondLook:
    """Of one run; all methods are called in the trio thread. ``on_kept`` is told of folders of the destination in which
    a mirror leaves what it was to delete, since the source's may have it by now."""

    def __init__(self, run: Run, on_kept: Callable[[bytes], None]) -> None:
        self._run = run
        self._on_kept = on_kept
        # An earlier run may have listed some folders long ago.
        self._wanted = run.resumed
        self._again: list[DirectoryRow] = []
        # Those of earlier runs, once they are known.
        self._before: int | None = None

    async def may_follow(self) -> bool:
        """Whether after this run folders may be listed again."""
        if self._before is None:
            value = await trio.to_thread.run_sync(self._run.context.journal.get, _LOOKS)
            self._before = int(value or b"0")
        return self._before < LOOKS

    def listed(self, *, recent: bool | None, changed: bool) -> None:
        """What the source says of a folder that it has listed."""
        # Of one that does not tell, deletions are worth the question.
        self._wanted |= changed or (self._run.options.delete_destination_extra if recent is None else recent)

    def list_again(self, directory: DirectoryRow) -> None:
        """Whatever the second look shows of this folder."""
        self._again.append(directory)

    async def look(self) -> bool:
        """Whether some folders are to be listed again, which the journal knows then. Raises `SessionLost`, and what may
        pass and keeps the source, or the destination, from telling."""
        # Before anything is deleted, always: what a folder lacked when it was listed may have been moved into it.
        deletes = self._run.options.delete_destination_extra and await trio.to_thread.run_sync(self._has_extras)
        if not (deletes or self._wanted or self._run.missed):
            return False
        may_follow = await self.may_follow()
        if not (deletes or may_follow):
            return False
        # First, since the look has what is newer of them.
        found = await trio.to_thread.run_sync(self._run.context.journal.list_again, self._again) > 0

        async def list_again(changed: list[DirectoryRow]) -> None:
            nonlocal found
            if await trio.to_thread.run_sync(self._run.context.journal.list_again, changed):
                found = True

        await self._look_at_all(list_again if may_follow else self._keep)
        if found:
            await trio.to_thread.run_sync(self._write_down)
        return found

    def _has_extras(self) -> bool:
        return next(self._run.context.journal.extras(), None) is not None

    async def _look_at_all(self, on_changed: Callable[[list[DirectoryRow]], Awaitable[None]]) -> None:
        """What is done about folders that changed."""
        batches, turn = self._run.context.journal.listed(), trio.Lock()

        async def take() -> None:
            while True:
                async with turn:
                    listed = await trio.to_thread.run_sync(next, batches, None)
                if listed is None:
                    return
                changed, unknown = await self._changed(listed)
                if changed:
                    await on_changed(changed)
                if unknown:
                    await self._keep(unknown)

        async with trio.open_nursery() as nursery:
            for _ in range(_AT_ONCE):
                nursery.start_soon(take)

    async def _changed(self, listed: list[DirectoryRow]) -> tuple[list[DirectoryRow], list[DirectoryRow]]:
        """Those that changed, as they are now; and those of which the source will never say. One that is gone is
        neither."""
        results = await self._run.session.stat([row.source for row in listed], follow=True)
        changed, unknown = [], []
        for row, result in zip(listed, results, strict=True):
            if result.row is None:
                if self._lasts(row.source, result):
                    unknown.append(row)
            elif result.row.kind == DIRECTORY and (now := _as_now(row, result.row)) != row:
                changed.append(now)
        return changed, unknown

    def _lasts(self, source: bytes, result: StatResult) -> bool:
        """Whether a folder cannot be looked at, and is not gone. Raises what kept the source from it, if that may pass:
        it has perhaps changed."""
        error = None if result.error is None else error_from_document_untrusted(result.error)
        may_pass = isinstance(error, RetryLater | NeedsPerson)
        if error and may_pass and not self._run.context.patience.lasts_at_source(source, error):
            raise error
        return error is None or error.code not in GONE

    async def _keep(self, changed: list[DirectoryRow]) -> None:
        """Delete nothing in these folders."""
        if not self._run.options.delete_destination_extra:
            return
        for row in changed:
            if await trio.to_thread.run_sync(self._drop_extras, row.destination):
                self._on_kept(row.destination)

    def _drop_extras(self, destination: bytes) -> bool:
        """Forget those of a folder; whether there were any. They are noted by where it is, by whatever links."""
        context = self._run.context
        places = {destination}
        try:
            with context.root.open_directory(split_path(destination)) as handle:
                places.add(join_path(handle.path))
        except OSError as error:
            problem = fault(error, "destination", destination)
            if context.patience.is_passing(destination, problem):
                raise problem from error
        return sum(map(context.journal.drop_extras, places)) > 0

    def _write_down(self) -> None:
        journal = self._run.context.journal
        with journal.together():
            journal.put(_LOOKS, b"%d" % ((self._before or 0) + 1))
            journal.commit()


def _as_now(row: DirectoryRow, found: Row) -> DirectoryRow:
    """A folder with what it is by now: another one, perhaps, that was moved into its place."""
    # Of an agent of before nothing is known but the time.
    ancestry = [*row.ancestry[:-1], (found.device, found.inode)] if row.ancestry else []
    return msgspec.structs.replace(row, mtime_ns=nearest_time(found.mtime_ns), ancestry=ancestry)
