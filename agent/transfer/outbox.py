"""Event lines for the relay: durable ones from the store, in order, and the latest progress of each task in between."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import trio

from agent.transfer.task_store import TaskStore
from protocol.control import AgentEvent

# A reader gets the progress of a task at most this often, in seconds.
PROGRESS_EVERY = 0.2


class Outbox:
    """Several readers may follow; each gets every durable line after its number."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._readers: set[_Reader] = set()

    def durable(self) -> None:
        """A line was stored."""
        for reader in self._readers:
            reader.wake.set()

    def passing(self, event: AgentEvent) -> None:
        """A line that is not kept; a newer one of the same task and kind takes its place."""
        for reader in self._readers:
            reader.passing[event.task_id, event.kind] = event
            reader.wake.set()

    @asynccontextmanager
    async def read(self, after: int) -> AsyncIterator[AsyncIterator[AgentEvent]]:
        """All kept lines after a number, then those to come, without end."""
        reader = _Reader()
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
        while True:
            reader.wake = trio.Event()
            while lines := await trio.to_thread.run_sync(self._store.events_after, after):
                for line in lines:
                    after = line.n
                    yield line
            passing, reader.passing = reader.passing, {}
            for line in passing.values():
                yield line
            if passing:
                await trio.sleep(PROGRESS_EVERY)
            await reader.wake.wait()


class _Reader:
    def __init__(self) -> None:
        self.wake = trio.Event()
        self.passing: dict[tuple[str, str], AgentEvent] = {}
