"""What agents last said of how far their tasks are: kept in memory, and stored once a second, the newest alone."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from sqlalchemy import Connection

from protocol.control import TaskObserved
from protocol.errors import TowpathError
from relay.store.database import Store
from relay.transfer import task_reports

logger = logging.getLogger("relay.steward")

# Seconds.
INTERVAL = 1.0
# Progress of more tasks than one agent can run is not remembered.
MAX_TASKS = 10_000


class LatestProgress:
    """For all agents. ``clock`` gives Unix seconds; all methods belong to one trio run."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._of_node: dict[str, dict[str, TaskObserved]] = {}
        self._news = trio.Event()

    def take(self, node_id: str, task_id: str, observed: TaskObserved) -> None:
        """An agent has said this of a task."""
        waiting = self._of_node.setdefault(node_id, {})
        if len(waiting) < MAX_TASKS or task_id in waiting:
            waiting[task_id] = observed
            self._news.set()

    def forget(self, node_id: str, task_id: str) -> None:
        """Something newer is stored: what was said before counts no more."""
        self._of_node.get(node_id, {}).pop(task_id, None)

    async def run(self) -> None:
        """Store until cancelled. What cannot be stored is dropped: the next report says more."""
        while True:
            await self._news.wait()
            await trio.sleep(INTERVAL)
            self._news = trio.Event()
            for node_id in list(self._of_node):
                reports = self._of_node.pop(node_id)
                if not reports:
                    continue
                try:
                    await self._store.write(_storing(node_id, reports, self._clock()))
                except TowpathError as error:
                    logger.warning("Progress could not be stored: %s", error.sentence)


def _storing(node_id: str, reports: dict[str, TaskObserved], now: float) -> Callable[[Connection], None]:
    return lambda connection: task_reports.apply_progress(connection, node_id, reports, now)
