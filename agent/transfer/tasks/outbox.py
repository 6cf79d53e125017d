"""Event lines for the relay: durable ones from the store, in order, and the latest progress of each task in between."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import trio

from agent.transfer.tasks.task_store import TaskStore
from protocol.control import AgentEvent

# A reader gets the progress of a task at most this often, in seconds.
PROGRESS_EVERY = 0.2
# What is asked of the relay waits for a reader for so many seconds: tasks begin before there is a link. All else that
# passes the relay is told with the link.
ASKING = frozenset({"session_wanted", "path_offer"})
UNREAD_LIFE = 10.0
MAX_UNREAD = 1000


class Outbox:
    """Several readers may follow; each gets every durable line after its number."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._readers: set[_Reader] = set()
        # What nobody was there to read, and since when.
        self._unread: dict[tuple[str, str], tuple[float, AgentEvent]] = {}

    def durable(self) -> None:
        """A line was stored."""
        for reader in self._readers:
            reader.call(urgent=True)

    def passing(self, event: AgentEvent) -> None:
        """A line that is not kept; a newer one of the same task and kind takes its place."""
        for reader in self._readers:
            reader.passing[event.task_id, event.kind] = event
            reader.call(urgent=event.kind != "progress")
        if not self._readers and event.kind in ASKING:
            self._keep(event)

    def _keep(self, event: AgentEvent) -> None:
        key = event.task_id, event.kind
        self._unread.pop(key, None)
        self._unread[key] = trio.current_time(), event
        if len(self._unread) > MAX_UNREAD:
            del self._unread[next(iter(self._unread))]

    @asynccontextmanager
    async def read(self, after: int) -> AsyncIterator[AsyncIterator[AgentEvent]]:
        """All kept lines after a number, then those to come, without end."""
        reader = _Reader()
        oldest = trio.current_time() - UNREAD_LIFE
        reader.passing.update({key: event for key, (since, event) in self._unread.items() if since >= oldest})
        self._unread.clear()
        self._readers.add(reader)
        lines = self._lines(reader, after)
        try:
            async with aclosing(lines):
                yield lines
        finally:
            self._readers.discard(reader)

    @property
    def readers(self) -> int:
        """How many follow now."""
        return len(self._readers)

    async def _lines(self, reader: _Reader, after: int) -> AsyncGenerator[AgentEvent, None]:
        progress_due = trio.current_time()
        while True:
            reader.begin_turn()
            while lines := await trio.to_thread.run_sync(self._store.events_after, after):
                for line in lines:
                    after = line.n
                    yield line
            # A path that is to be arranged does not wait behind the progress of something else.
            for line in reader.take(urgent=True):
                yield line
            if trio.current_time() >= progress_due and (progress := reader.take(urgent=False)):
                progress_due = trio.current_time() + PROGRESS_EVERY
                for line in progress:
                    yield line
            if reader.passing:
                with trio.move_on_at(progress_due):
                    await reader.urgent.wait()
            else:
                await reader.wake.wait()


class _Reader:
    def __init__(self) -> None:
        self.begin_turn()
        self.passing: dict[tuple[str, str], AgentEvent] = {}

    def begin_turn(self) -> None:
        """What comes from now on is news."""
        self.wake, self.urgent = trio.Event(), trio.Event()

    def call(self, *, urgent: bool) -> None:
        """There is something to read."""
        self.wake.set()
        if urgent:
            self.urgent.set()

    def take(self, *, urgent: bool) -> list[AgentEvent]:
        """Lines that are not kept: those of progress, or all others."""
        taken = [key for key in self.passing if (key[1] != "progress") == urgent]
        return [self.passing.pop(key) for key in taken]
