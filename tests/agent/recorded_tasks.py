"""A transfer engine that only remembers what it was asked, for tests of the applications before it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from agent.connect.peers import PeerPath
from protocol.candidates import PathAnswer, PathGo, PathOffer
from protocol.control import (
    AgentEvent,
    CollectionReport,
    Page,
    SessionAnswer,
    SessionOrder,
    TaskObserved,
    TaskOrder,
)
from protocol.errors import ItemFailed


class RecordedTasks:
    """Fulfils `agent.services.TaskService`; ``calls`` holds the name and first argument of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.known: dict[str, TaskObserved] = {}
        self.orders: dict[str, TaskOrder] = {}
        self.announced: list[list[CollectionReport]] = []

    async def put_task(self, order: TaskOrder) -> TaskObserved:
        self.calls.append(("put_task", order.task_id))
        observed = TaskObserved(task_id=order.task_id, revision=order.revision, state="QUEUED")
        self.known[order.task_id] = observed
        self.orders[order.task_id] = order
        return observed

    def get_task(self, task_id: str) -> TaskObserved:
        self.calls.append(("get_task", task_id))
        if task_id not in self.known:
            raise ItemFailed("This agent has no such task.", code="NOT_FOUND")
        return self.known[task_id]

    def order(self, task_id: str) -> TaskOrder:
        self.calls.append(("order", task_id))
        if task_id not in self.orders:
            raise ItemFailed("This agent has no such task.", code="NOT_FOUND")
        return self.orders[task_id]

    async def put_session_answer(self, task_id: str, answer: SessionAnswer) -> None:
        self.calls.append(("put_session_answer", task_id))

    async def successful(self, task_id: str, marker: str | None, limit: int) -> Page:
        self.calls.append(("successful", (task_id, marker, limit)))
        return Page(rows=[{"size": 1}])

    async def skipped(self, task_id: str, marker: str | None, limit: int) -> Page:
        self.calls.append(("skipped", (task_id, marker, limit)))
        return Page(rows=[])

    async def close_task(self, task_id: str) -> None:
        self.calls.append(("close_task", task_id))

    async def put_session(self, order: SessionOrder) -> SessionAnswer:
        self.calls.append(("put_session", order.session_id))
        return SessionAnswer(session_id=order.session_id, generation=1, candidates=[], certificate="c")

    async def take_offer(self, offer: PathOffer) -> PathAnswer:
        self.calls.append(("take_offer", offer))
        return PathAnswer(session_id=offer.session_id, generation=offer.generation)

    def take_source_go(self, go: PathGo) -> None:
        self.calls.append(("take_source_go", go))

    def take_candidates(self, task_id: str, answer: PathAnswer) -> None:
        self.calls.append(("take_candidates", task_id))

    async def probe_peers(self) -> list[PeerPath]:
        self.calls.append(("probe_peers", None))
        return []

    def take_go(self, task_id: str, go: PathGo) -> None:
        self.calls.append(("take_go", task_id))

    async def withdraw_session(self, session_id: str) -> None:
        self.calls.append(("withdraw_session", session_id))

    @asynccontextmanager
    async def events(self, after: int) -> AsyncIterator[AsyncIterator[AgentEvent]]:
        self.calls.append(("events", after))

        async def lines() -> AsyncIterator[AgentEvent]:
            for n in range(after + 1, after + 4):
                yield AgentEvent(n=n, kind="event", time="2026-01-01T00:00:00.000000+00:00")

        yield lines()

    async def acknowledge(self, n: int) -> None:
        self.calls.append(("acknowledge", n))

    async def pause_task(self, task_id: str) -> None:
        self.calls.append(("pause_task", task_id))

    async def resume_task(self, task_id: str) -> None:
        self.calls.append(("resume_task", task_id))

    def tasks(self) -> list[TaskObserved]:
        return list(self.known.values())

    def last_event(self) -> int:
        return 0

    async def owner_changed(self, collection_ids: Collection[str]) -> None:
        self.calls.append(("owner_changed", collection_ids))

    def announce_collections(self, reports: Sequence[CollectionReport]) -> None:
        self.announced.append(list(reports))
