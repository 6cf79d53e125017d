"""What the two applications of the agent stand on, as they see it; `agent.daemon` puts the real things in.

Only types live here, so that applications and their tests need none of the machinery behind them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from agent.connect.peers import PeerPath
from agent.policy import Pause
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


class TaskService(Protocol):
    """The transfer engine, seen from the link and from the owner. All methods may raise `TowpathError`."""

    async def put_task(self, order: TaskOrder) -> TaskObserved:
        """Take an order; returns once it is on disk."""

    def get_task(self, task_id: str) -> TaskObserved:
        """The task as observed. Raises ItemFailed NOT_FOUND."""

    def order(self, task_id: str) -> TaskOrder:
        """The task as it was last ordered. Raises ItemFailed NOT_FOUND."""

    async def put_session_answer(self, task_id: str, answer: SessionAnswer) -> None:
        """Where this destination's task finds its source now."""

    async def successful(self, task_id: str, marker: str | None, limit: int) -> Page:
        """A page of what was transferred."""

    async def skipped(self, task_id: str, marker: str | None, limit: int) -> Page:
        """A page of what was left out."""

    async def close_task(self, task_id: str) -> None:
        """The relay holds everything of this task."""

    async def put_session(self, order: SessionOrder) -> SessionAnswer:
        """Serve as source of a session."""

    async def take_offer(self, offer: PathOffer) -> PathAnswer:
        """A destination wants a path to this source arranged."""

    def take_source_go(self, go: PathGo) -> None:
        """The relay's go for an offer that this source has answered."""

    def take_go(self, task_id: str, go: PathGo) -> None:
        """The relay's go for an offer of a task that runs here."""

    def take_candidates(self, task_id: str, answer: PathAnswer) -> None:
        """More addresses of the source of a task that runs here."""

    async def withdraw_session(self, session_id: str) -> None:
        """Cut a session and refuse its ticket."""

    def events(self, after: int) -> AbstractAsyncContextManager[AsyncIterator[AgentEvent]]:
        """All kept events after a number, then those to come, without end."""

    async def acknowledge(self, n: int) -> None:
        """The relay has stored all events up to ``n``."""

    async def pause_task(self, task_id: str) -> None:
        """The owner holds a task up."""

    async def resume_task(self, task_id: str) -> None:
        """The owner lets it go on."""

    async def probe_peers(self) -> list[PeerPath]:
        """How the agents are reached that data came from lately."""

    def tasks(self) -> list[TaskObserved]:
        """All tasks that are not closed."""

    def last_event(self) -> int:
        """The highest number of a kept event."""

    async def owner_changed(self, collection_ids: Collection[str]) -> None:
        """The owner has changed these collections: what runs on them is checked anew."""

    def announce_collections(self, reports: Sequence[CollectionReport]) -> None:
        """Tell the relay what the owner offers now."""


class Owner(Protocol):
    """What only the owner may ask, through the local socket. Nothing of this is reachable from the link."""

    async def status(self) -> dict[str, Any]:
        """The document that `towpath status --format json` prints."""

    async def reload(self) -> str:
        """Read the configuration again; a sentence on what changed. Raises `ConfigError`."""

    async def set_pause(self, pause: Pause) -> None:
        """Hold up all transfers of this machine, or those that have not begun, or let them go on."""

    async def accept_root(self, collection_id: str) -> None:
        """The root of a collection, or a disk below it, has moved for good: take them as they are now."""

    def watch_status(self) -> list[dict[str, Any]]:
        """The watch rules and what they did."""

    def watch_now(self, name: str, *, retry: bool) -> bool:
        """Run a rule at once; False if there is no such rule."""

    def reconnect(self) -> None:
        """Connect to the relay at once."""

    def stop(self) -> None:
        """End the agent."""
