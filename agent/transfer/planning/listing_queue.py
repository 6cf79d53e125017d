"""Which of the tasks that list folders side by side takes which one next."""

from __future__ import annotations

from collections import deque

import trio

from agent.transfer.basis.journal_rows import DirectoryRow
from agent.transfer.books.journal import Journal


class ListingQueue:
    """Who lists which directory: several tasks take from the journal until nothing waits and nobody is listing.

    Directories are fetched from the journal a few at a time, by one task, and only when there may be any: each look
    costs a hop to another thread.
    """

    AT_ONCE = 16

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._taken: deque[DirectoryRow] = deque()
        # Whether the journal may have directories that wait.
        self._may_wait = True
        # Tasks that are listing or looking.
        self._busy = 0
        self._changed = trio.Event()

    async def take(self) -> DirectoryRow | None:
        """The next directory, or None when all are listed. Call `finished` for each one taken."""
        while True:
            if self._taken:
                self._busy += 1
                return self._taken.popleft()
            if self._may_wait:
                await self._look()
            elif not self._busy:
                return None
            else:
                await self._changed.wait()

    async def _look(self) -> None:
        self._may_wait = False
        self._busy += 1
        try:
            rows = await trio.to_thread.run_sync(self._fetch)
        finally:
            self._busy -= 1
        self._taken.extend(rows)
        self._may_wait = self._may_wait or len(rows) == self.AT_ONCE
        self._wake()

    def _fetch(self) -> list[DirectoryRow]:
        rows: list[DirectoryRow] = []
        while len(rows) < self.AT_ONCE and (row := self._journal.next_directory()) is not None:
            rows.append(row)
        return rows

    def added(self) -> None:
        """New directories wait."""
        self._may_wait = True
        self._wake()

    def finished(self) -> None:
        """One of those taken is listed."""
        self._busy -= 1
        if not self._busy:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
