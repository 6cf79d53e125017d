"""A second look at the source's folders when everything has arrived: whether names changed in one after it was listed.

A file that somebody moves from a folder that is still to be listed into one that was listed already is in neither list:
it would be missing here, and what a mirror has of it be deleted. So folders that changed since are listed once more,
for what is not here; what is here, is not brought again. Nothing is asked where the source says that no folder
had changed since the session began: a file that was moved leaves the folder behind changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from agent.storage.node import nearest_time
from agent.transfer.course.run import Run
from protocol.errors import NeedsPerson, RetryLater, error_from_document_untrusted
from protocol.session import DIRECTORY, StatResult

# How often in the course of a task: whoever moves one file back and forth is not followed for ever.
LOOKS = 2
# Round trips that overlap.
_AT_ONCE = 8
_LOOKS = "second looks"

_Listed = list[tuple[int, bytes, int]]


class SecondLook:
    """Of one run; all methods are called in the trio thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        # An earlier run may have listed some folders long ago.
        self._wanted = run.resumed
        self._again: list[tuple[int, int]] = []

    @property
    def left(self) -> bool:
        """Whether there may be another one."""
        return int(self._run.context.journal.get(_LOOKS) or b"0") < LOOKS

    def listed(self, *, recent: bool | None, changed: bool) -> None:
        """What the source says of a folder that it has listed."""
        # Of one that does not tell, deletions are worth the question.
        self._wanted |= changed or (self._run.options.delete_destination_extra if recent is None else recent)

    def list_again(self, directory: int, mtime_ns: int) -> None:
        """Whatever the second look shows of this folder."""
        self._again.append((directory, mtime_ns))

    async def look(self) -> bool:
        """Whether some folders are to be listed again, which the journal knows then. Raises `SessionLost`, and what may
        pass and keeps the source from telling."""
        if not (self._wanted and await trio.to_thread.run_sync(lambda: self.left)):
            return False
        journal = self._run.context.journal
        batches, turn, found = journal.listed(), trio.Lock(), bool(self._again)

        async def take() -> None:
            nonlocal found
            while True:
                async with turn:
                    listed = await trio.to_thread.run_sync(next, batches, None)
                if listed is None:
                    return
                changed = list(await self._changed(listed))
                if changed:
                    found = True
                    await trio.to_thread.run_sync(journal.list_again, changed)

        async with trio.open_nursery() as nursery:
            for _ in range(_AT_ONCE):
                nursery.start_soon(take)
        if found:
            await trio.to_thread.run_sync(self._write_down)
        return found

    async def _changed(self, listed: _Listed) -> Iterator[tuple[int, int]]:
        results = await self._run.session.stat([source for _, source, _ in listed], follow=True)
        for (_, source, _), result in zip(listed, results, strict=True):
            self._check(source, result)
        # One that is gone, or can never be looked at, is not listed again either.
        return (
            (directory, now)
            for (directory, _, mtime_ns), result in zip(listed, results, strict=True)
            if result.row is not None
            and result.row.kind == DIRECTORY
            and (now := nearest_time(result.row.mtime_ns)) != mtime_ns
        )

    def _check(self, source: bytes, result: StatResult) -> None:
        """Raise what kept the source from looking at a folder, if that may pass: it has perhaps changed."""
        error = None if result.error is None else error_from_document_untrusted(result.error)
        may_pass = isinstance(error, RetryLater | NeedsPerson)
        if error and may_pass and not self._run.context.patience.lasts_at_source(source, error):
            raise error

    def _write_down(self) -> None:
        journal = self._run.context.journal
        with journal.together():
            journal.list_again(self._again)
            journal.put(_LOOKS, b"%d" % (int(journal.get(_LOOKS) or b"0") + 1))
            journal.commit()
