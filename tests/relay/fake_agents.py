"""Agents in memory behind a registry that looks like the real one: they take orders, keep events, can be cut off."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from protocol.control import (
    AgentEvent,
    AgentHello,
    Candidate,
    CollectionReport,
    Counters,
    Entry,
    Listing,
    MissingCollections,
    Page,
    SessionAnswer,
    SessionOrder,
    TaskList,
    TaskObserved,
    TaskOrder,
    TaskState,
    encode,
)
from protocol.errors import ItemFailed, RetryLater, TowpathError
from protocol.identity import NodeKey
from protocol.reverse_http import DEFAULT_LIMITS
from protocol.reverse_http.headers import request_headers
from relay.rendezvous.registry import LinkDown, LinkUp, NodeOffline, _target


@dataclass
class FakeAgent:
    """One agent. ``refuse`` may raise for a call before it is done, ``forget`` after it was done (answer lost)."""

    node_id: str = ""
    endpoint_id: str = ""
    key: NodeKey = field(default_factory=NodeKey.generate)
    boot_id: str = "boot-1"
    collections: list[CollectionReport] = field(default_factory=list)
    orders: dict[str, list[TaskOrder]] = field(default_factory=dict)
    tasks: dict[str, TaskObserved] = field(default_factory=dict)
    sessions: dict[str, list[SessionOrder]] = field(default_factory=dict)
    session_answers: dict[str, list[SessionAnswer]] = field(default_factory=dict)
    withdrawn: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    lines: list[AgentEvent] = field(default_factory=list)
    missing: list[list[str]] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)
    asked_after: list[int] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    reaches: list[list[str]] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    made: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    pages: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refuse: Callable[[str, str], None] | None = None
    forget: Callable[[str, str], None] | None = None
    generation: int = 0
    # What a task is in the answer to its first order.
    begins: TaskState = "QUEUED"
    seq: int = 0
    # An older agent does not say how many tasks it has.
    is_older: bool = False
    abilities: list[str] = field(default_factory=list)
    # What it says at its link, and of what it answers when it is asked for a session.
    standing: list[Candidate] = field(default_factory=list)
    _readers: list[trio.MemorySendChannel[bytes]] = field(default_factory=list)

    def hello(self) -> AgentHello:
        last = max((line.n for line in self.lines), default=0)
        return AgentHello(
            node_id=self.node_id,
            endpoint_id=self.endpoint_id,
            signature="",
            certificate=self.key.certificate_pem,
            boot_id=self.boot_id,
            collections=self.collections,
            last_event=last,
            tasks=None if self.is_older else len(self.list_tasks().tasks),
            abilities=self.abilities,
            candidates=self.standing,
        )

    # --- what it says ---------------------------------------------------------------------------------

    def say(self, kind: str, task_id: str, *, durable: bool = True, **values: Any) -> AgentEvent:
        """A line on the event stream, kept when durable."""
        if durable:
            self.seq += 1
            values.setdefault("seq", self.seq)
        n = (max((line.n for line in self.lines), default=0) + 1) if durable else 0
        line = AgentEvent(
            n=n, kind=kind, time=values.pop("time", "2027-01-15T08:00:01.000000+00:00"), task_id=task_id, **values
        )
        if durable:
            self.lines.append(line)
        self.send(encode(line) + b"\n")
        return line

    @property
    def heard(self) -> bool:
        """Whether anybody reads its event stream: what it sends raw before that is lost."""
        return bool(self._readers)

    def send(self, data: bytes) -> None:
        """Raw bytes on every open event stream."""
        for reader in list(self._readers):
            try:
                reader.send_nowait(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._readers.remove(reader)

    def observe(self, task_id: str, state: str, *, durable: bool = True, **values: Any) -> TaskObserved:
        """Report a state (or, not durable, progress)."""
        observed: TaskObserved = msgspec.convert(
            {
                "task_id": task_id,
                "revision": self.tasks[task_id].revision if task_id in self.tasks else 1,
                "state": state,
                **{key: msgspec.to_builtins(value) for key, value in values.items()},
            },
            TaskObserved,
        )
        self.tasks[task_id] = observed
        self.say("state" if durable else "progress", task_id, durable=durable, observed=observed)
        return observed

    def succeed(self, task_id: str, **counts: int) -> None:
        self.observe(task_id, "SUCCEEDED", counters=Counters(scan_complete=True, **counts))

    # --- what it is asked -------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], document: Any) -> Any:
        self.calls.append((method, path))
        self.reaches.append(query.get("reach", []))
        if self.refuse is not None:
            self.refuse(method, path)
        for pattern, name in _ROUTES:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match is not None:
                result = getattr(self, name)(*match.groups(), query=query, document=document)
                if self.forget is not None:
                    self.forget(method, path)
                return result
        raise ItemFailed(f"There is no {method} {path}.", code="NOT_FOUND")

    def put_task(self, task_id: str, *, document: TaskOrder, **_: Any) -> TaskObserved:
        self.orders.setdefault(task_id, []).append(document)
        known = self.tasks.get(task_id)
        if known is not None and document.revision < known.revision:
            return known
        if known is None and document.items is None and document.desired != "cancel":
            raise ItemFailed("This task is not known here.", code="NOT_FOUND")
        state = self.begins if known is None else known.state
        status = "QUEUED" if known is None else known.status_code
        counters = Counters() if known is None else known.counters
        observed = TaskObserved(
            task_id=task_id, revision=document.revision, state=state, status_code=status, counters=counters
        )
        self.tasks[task_id] = observed
        return observed

    def get_task(self, task_id: str, **_: Any) -> TaskObserved:
        if task_id not in self.tasks:
            raise ItemFailed("This task is not known here.", code="NOT_FOUND")
        return self.tasks[task_id]

    def list_tasks(self, **_: Any) -> TaskList:
        return TaskList(tasks=[task for task in self.tasks.values() if task.task_id not in self.closed])

    def get_order(self, task_id: str, **_: Any) -> TaskOrder:
        orders = self.orders[task_id]
        return msgspec.structs.replace(orders[-1], items=orders[0].items, session=None)

    def put_session_answer(self, task_id: str, *, document: SessionAnswer, **_: Any) -> None:
        self.session_answers.setdefault(task_id, []).append(document)

    def put_session(self, session_id: str, *, document: SessionOrder, **_: Any) -> SessionAnswer:
        self.sessions.setdefault(session_id, []).append(document)
        self.generation += 1
        return SessionAnswer(
            session_id=session_id,
            generation=self.generation,
            candidates=[Candidate(kind="host", host="192.0.2.1", port=4000)],
            certificate=self.key.certificate_pem,
            instance="this start",
        )

    def withdraw(self, session_id: str, **_: Any) -> None:
        self.withdrawn.append(session_id)

    def close_task(self, task_id: str, **_: Any) -> None:
        self.closed.append(task_id)

    def acknowledge(self, *, document: dict[str, int], **_: Any) -> None:
        self.acknowledged.append(document["n"])

    def note_missing(self, *, document: MissingCollections, **_: Any) -> None:
        self.missing.append(document.ids)

    def ls(self, collection_id: str, *, query: dict[str, list[str]], **_: Any) -> Listing:
        path = query["path"][0]
        if path.rstrip("/").endswith("missing"):
            raise ItemFailed(f"There is no {path}.", code="NOT_FOUND")
        if path.rstrip("/").endswith("file"):
            raise ItemFailed(f"{path} is a file.", code="NOT_A_DIRECTORY")
        entries = list(self.entries.values())
        return Listing(path=path, absolute_path="/home/" + path.strip("/~"), entries=entries, total=len(entries))

    def stat(self, collection_id: str, *, query: dict[str, list[str]], **_: Any) -> Entry:
        name = query["path"][0].rstrip("/").rpartition("/")[2]
        if name not in self.entries:
            raise ItemFailed(f"There is no {name}.", code="NOT_FOUND")
        return self.entries[name]

    def write(self, collection_id: str, verb: str, *, document: dict[str, Any], **_: Any) -> None:
        if document.get("path") == "/exists/":
            raise ItemFailed("It is there already.", code="EXISTS")
        if document.get("path") == "/forbidden/":
            raise ItemFailed("You may not write here.", code="PERMISSION_DENIED")
        self.made.append((verb, document))

    def page(self, task_id: str, kind: str, *, query: dict[str, list[str]], **_: Any) -> Page:
        rows = self.pages.get(kind, [])
        start, limit = int(query.get("marker", ["0"])[0]), int(query["limit"][0])
        end = start + limit
        return Page(rows=rows[start:end], next_marker=str(end) if end < len(rows) else None)


_ROUTES = (
    (r"PUT /link/tasks/([^/]+)", "put_task"),
    (r"GET /link/task-list", "list_tasks"),
    (r"GET /link/tasks/([^/]+)", "get_task"),
    (r"GET /link/tasks/([^/]+)/order", "get_order"),
    (r"PUT /link/tasks/([^/]+)/session", "put_session_answer"),
    (r"GET /link/tasks/([^/]+)/(successful|skipped)", "page"),
    (r"DELETE /link/tasks/([^/]+)", "close_task"),
    (r"PUT /link/sessions/([^/]+)", "put_session"),
    (r"DELETE /link/sessions/([^/]+)", "withdraw"),
    (r"POST /link/events/acknowledge", "acknowledge"),
    (r"POST /link/collections/missing", "note_missing"),
    (r"GET /link/collections/([^/]+)/ls", "ls"),
    (r"GET /link/collections/([^/]+)/stat", "stat"),
    (r"POST /link/collections/([^/]+)/(mkdir|rename|symlink)", "write"),
)


class FakeRegistry:
    """Stands where the real registry stands; `up` and `down` are the links coming and going."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}
        # Seconds before the first line of a stream comes.
        self.hold_streams = 0.0
        self._subscribers: list[trio.MemorySendChannel[LinkUp | LinkDown]] = []

    def up(self, agent: FakeAgent) -> None:
        self.agents[agent.node_id] = agent
        self._announce(LinkUp(agent.node_id, agent.hello()))

    def down(self, agent: FakeAgent) -> None:
        if self.agents.pop(agent.node_id, None) is not None:
            self.cut_streams(agent)
            self._announce(LinkDown(agent.node_id))

    def cut_streams(self, agent: FakeAgent) -> None:
        """End the agent's event streams, and only those."""
        for reader in agent._readers:
            reader.close()
        agent._readers.clear()

    def _announce(self, change: LinkUp | LinkDown) -> None:
        for subscriber in self._subscribers:
            subscriber.send_nowait(change)

    def address(self, node_id: str) -> str:
        return "192.0.2.1" if self.is_connected(node_id) else ""

    def round_trip(self, node_id: str) -> float | None:
        return 0.03 if self.is_connected(node_id) else None

    def is_connected(self, node_id: str) -> bool:
        return node_id in self.agents

    def hello(self, node_id: str) -> AgentHello | None:
        return self.agents[node_id].hello() if node_id in self.agents else None

    def connected(self) -> dict[str, AgentHello]:
        return {node_id: agent.hello() for node_id, agent in self.agents.items()}

    def _agent(self, node_id: str) -> FakeAgent:
        if node_id not in self.agents:
            raise NodeOffline("The endpoint's agent is not connected to the relay right now.")
        return self.agents[node_id]

    async def call(
        self,
        node_id: str,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        document: object | None = None,
        timeout: float = 30.0,
        decide_again: Callable[[], Awaitable[object]] | None = None,
        caller: str = "",
    ) -> bytes:
        await trio.lowlevel.checkpoint()
        # As long as a request of the real link may be.
        request_headers(method, _target(path, query), [], None, DEFAULT_LIMITS.max_header_list)
        values: dict[str, list[str]] = {}
        for key, value in query:
            values.setdefault(key, []).append(value)
        # What travels is what the real link would carry.
        sent = document
        if document is not None:
            sent = msgspec.json.decode(encode(document), type=type(document))
        answer = self._agent(node_id).answer(method, path, values, sent)
        await trio.lowlevel.checkpoint()
        return b"" if answer is None else encode(answer)

    @asynccontextmanager
    async def stream(
        self, node_id: str, path: str, *, query: Sequence[tuple[str, str]] = (), timeout: float = 30.0
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        agent = self._agent(node_id)
        after = int(dict(query)["after"])
        agent.asked_after.append(after)
        await trio.sleep(self.hold_streams)
        send, receive = trio.open_memory_channel[bytes](10_000)
        agent._readers.append(send)
        for line in agent.lines:
            if line.n > after:
                send.send_nowait(encode(line) + b"\n")

        class Chunks:
            def __aiter__(self) -> Chunks:
                return self

            async def __anext__(self) -> bytes:
                try:
                    return await receive.receive()
                except trio.EndOfChannel:
                    raise NodeOffline("The link ended.") from None

        yield Chunks()

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[trio.MemoryReceiveChannel[LinkUp | LinkDown]]:
        send, receive = trio.open_memory_channel[LinkUp | LinkDown](1000)
        for node_id, agent in self.agents.items():
            send.send_nowait(LinkUp(node_id, agent.hello()))
        self._subscribers.append(send)
        try:
            yield receive
        finally:
            self._subscribers.remove(send)


def once(error: TowpathError, wanted: str) -> Callable[[str, str], None]:
    """A hook that raises for the first call whose "METHOD path" contains ``wanted``."""
    fired: list[bool] = []

    def hook(method: str, path: str) -> None:
        if wanted in f"{method} {path}" and not fired:
            fired.append(True)
            raise error

    return hook


def lost_answer() -> RetryLater:
    return RetryLater("The endpoint's agent did not answer in time.", code="TIMEOUT")
