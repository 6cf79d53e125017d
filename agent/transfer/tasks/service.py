"""The transfer engine as the daemon sees it: tasks to run here, sessions to serve from here, events to report.

Takes orders (durable before they are answered), runs a worker process for each running task and each served session,
dials and listens for them, and turns what they say into numbered event lines. The relay may be away all the time.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager, closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio

from agent.connect import listener
from agent.connect.introductions import Introductions
from agent.connect.peers import PeerPath, PeerProbes
from agent.transfer.basis.times import now_iso
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.source.source_policy import reads_elsewhere
from agent.transfer.tasks.held_up import is_drained
from agent.transfer.tasks.known_sources import sources_of
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.tasks.observed_states import held_up_by
from agent.transfer.tasks.results import ReadPage, skipped_page, successful_page
from agent.transfer.tasks.running_task import RunningTask
from agent.transfer.tasks.served_session import ServedSessions
from agent.transfer.tasks.turns import Turns, next_turns
from protocol.candidates import PathAnswer, PathGo, PathOffer
from protocol.control import (
    FINAL_STATES,
    AgentEvent,
    CollectionReport,
    Page,
    SessionAnswer,
    SessionOrder,
    TaskObserved,
    TaskOrder,
)
from protocol.errors import ItemFailed, NeedsPerson, ProtocolError
from protocol.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

logger = logging.getLogger("towpath.tasks")

# Seconds that a start leaves the processor to tasks before all else is loaded; to sessions, whose destinations may need
# the relay to find us; and those from the moment when a lane's connection is handed to a worker until its handshake is
# done and the first content comes.
FIRST_MOMENTS, FIRST_SESSION, LANE_BEGINS = 0.8, 0.3, 0.1


@dataclass(frozen=True)
class TransferStatistics:
    """What the engine does now, and since the start: connections it refused, lines the relay may still ask for."""

    tasks: int
    running: int
    sessions: int
    refused: int
    # Content bytes that came and went.
    received: int
    sent: int
    event_readers: int
    last_event: int


class TransferService:
    """See the module. Create it, then run `run`; every other method may be called while it runs."""

    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._introductions = Introductions(node.network, self._tell_candidates)
        self._probes = PeerProbes(node.network, self._offer_probe, lambda: int(time.time() * 1000))
        self.sessions = ServedSessions(node)
        self._tasks = {stored.order.task_id: RunningTask(node, stored) for stored in node.store.load()}
        self._paused = False
        # Orders are looked at, written down and taken one after the other: one may overtake another on its way, and a
        # relay that heard nothing says the same again while the first is still being written.
        self._ordering = trio.Lock()
        self.port = 0

    def statistics(self) -> TransferStatistics:
        """Counts of this moment and since the start."""
        return TransferStatistics(
            tasks=len(self._tasks),
            running=sum(task.running for task in self._tasks.values()),
            sessions=self.sessions.count,
            refused=self.sessions.refused,
            received=self._node.allotment.moved["receive"],
            sent=self._node.allotment.moved["send"],
            event_readers=self._node.outbox.readers,
            last_event=self._node.store.last_event(),
        )

    @property
    def idle(self) -> bool:
        """Whether no task runs or is about to, and nobody reads from here."""
        return self.sessions.count == 0 and not any(task.running or task.runnable for task in self._tasks.values())

    @property
    def drained(self) -> bool:
        """Whether nothing more ends by itself, with nothing new: nobody reads from here, and no task runs or is about
        to but those that wait for a person, who may come in days."""
        return self.sessions.count == 0 and is_drained(self._tasks.values())

    # --- running ---------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, serve and schedule until cancelled; workers settle what arrived before this returns."""
        with closing(self._node.store):
            listening = await trio.to_thread.run_sync(self._bind)
            async with trio.open_nursery() as nursery:
                self.sessions.nursery = nursery
                data_port = self._node.network.data_port = listener.DataPort(listening, self.sessions.deliver)
                nursery.start_soon(data_port.serve)
                nursery.start_soon(self._node.network.watch)
                nursery.start_soon(self._node.workers.run)
                nursery.start_soon(self._node.allotment.run)
                await nursery.start(self._introductions.run)
                task_status.started()
                await self._schedule(nursery)

    def _bind(self) -> list[socket.socket]:
        """The data port: the configured one, else the one of last time, so that peers find us without the relay.
        Raises `NeedsPerson` when there is none to be had."""
        remembered = int(self._node.store.get("port") or 0)
        data = self._node.config.data
        try:
            try:
                sockets = listener.bind(data.listen, data.port or remembered)
            except OSError:
                if data.port or not remembered:
                    raise
                sockets = listener.bind(data.listen, 0)
        except OSError as error:
            place = f"{data.listen} port {data.port}" if data.port else data.listen
            raise NeedsPerson(
                f"The agent cannot listen on {place} for other agents ({error.strerror}): see `data.listen` and "
                "`data.port` in its configuration.",
                code="CANNOT_LISTEN",
            ) from error
        self.port = sockets[0].getsockname()[1]
        if self.port != remembered:
            self._node.store.put("port", str(self.port))
        return sockets

    async def _schedule(self, nursery: trio.Nursery) -> None:
        for task in self._tasks.values():
            # The configuration may have changed while the agent was not running.
            if task.held_up() is not None:
                await task.tell_why_not()
        while True:
            change = self._node.change
            turns = self._next_turns()
            chosen = [self._tasks[task_id] for task_id in turns.start]
            for task in self._tasks.values():
                # Until it is its turn again, others may change the way to its place.
                task.placed = task.placed and task in chosen
            # Collections whose earlier tasks are still being looked at: the place of a later one may be theirs.
            looking: set[str] = set()
            for task in chosen:
                collection = task.order.destination.collection_id
                if task.order.desired == "cancel" or (task.placed and collection not in looking):
                    task.running = True
                    nursery.start_soon(self._run_task, task)
                elif not task.placed:
                    # It has its turn then, unless its place turns out to be that of another one.
                    looking.add(collection)
                    nursery.start_soon(task.look_at_claim)
            for task_id, holder in turns.behind.items():
                later, earlier = self._tasks.get(task_id), self._tasks.get(holder)
                if later is not None and earlier is not None:
                    await later.tell_waits_for(earlier)
            await change.wait()

    def _next_turns(self) -> Turns:
        return next_turns(
            # Tasks that are over stay here until the relay closes them, days later: there may be very many.
            [
                task.candidate()
                for task in (self._tasks.values() if not self._paused else ())
                if task.running or task.observed.state not in FINAL_STATES
            ],
            self._node.config.limits.workers,
            self._node.policy.has_room,
        )

    async def _run_task(self, task: RunningTask) -> None:
        try:
            await task.run()
        finally:
            task.running = False
            self._node.turn_changed()

    async def first_moves(self) -> None:
        """After a start: wait until data moves again, but not for long, and not at all where there is nothing to go on
        with, or where the link to the relay is needed for it."""
        going = [task for task in self._tasks.values() if task.running or task.runnable]
        if not all(task.went_directly for task in going):
            return
        try:
            if not going and not await trio.to_thread.run_sync(self._node.store.serves_sessions, time.time()):
                return
        except StateTrouble:
            # Whoever needs the store finds out and says so.
            return
        with trio.move_on_after(FIRST_MOMENTS if going else FIRST_SESSION):
            await self._node.lane_begun.wait()
            await trio.sleep(LANE_BEGINS)

    # --- orders ----------------------------------------------------------------------------------------

    async def put_task(self, order: TaskOrder) -> TaskObserved:
        """Take an order; returns once it is on disk. Orders older than one already seen change nothing.

        Raises `TowpathError` when ticket, policy or the order itself forbid it.
        """
        async with self._ordering:
            known, is_news = await self._take_order(order)
        if is_news:
            await known.cancel_at_once()
            await known.tell_order()
            self._node.turn_changed()
        return known.observed

    async def _take_order(self, order: TaskOrder) -> tuple[RunningTask, bool]:
        """The task of an order, which is on disk, and whether the order is news."""
        known = self._tasks.get(order.task_id)
        if known is not None and order.revision <= known.order.revision:
            return known, False
        if known is not None and order.items is None:
            order = msgspec.structs.replace(order, items=known.order.items)
        if order.desired == "run":
            self._node.check_task(order, time.time())
        if known is None:
            observed = TaskObserved(task_id=order.task_id, revision=order.revision, state="QUEUED")
            known = RunningTask.fresh(self._node, msgspec.structs.replace(order, arranged=None), observed)
            if order.desired == "run":
                known.observed = observed = held_up_by(observed, known.held_up())
        else:
            observed = msgspec.structs.replace(known.observed, revision=order.revision)
        kept = msgspec.structs.replace(order, arranged=None)
        await trio.to_thread.run_sync(self._node.store.put_order, kept, observed, order.session)
        self._tasks[order.task_id] = known
        known.take_order(order, observed)
        return known, True

    def get_task(self, task_id: str) -> TaskObserved:
        """The task as observed. Raises `ItemFailed` NOT_FOUND."""
        return self._task(task_id).observed

    def _task(self, task_id: str) -> RunningTask:
        task = self._tasks.get(task_id)
        if task is None:
            raise ItemFailed("This agent has no such task.", code="NOT_FOUND", subject=task_id)
        return task

    def tasks(self) -> list[TaskObserved]:
        """All tasks that are not closed."""
        return [task.observed for task in self._tasks.values()]

    def order(self, task_id: str) -> TaskOrder:
        """The task as it was last ordered. Raises `ItemFailed` NOT_FOUND."""
        return msgspec.structs.replace(self._task(task_id).order, session=None)

    async def put_session_answer(self, task_id: str, answer: SessionAnswer) -> None:
        """Where this destination's task finds its source now."""
        task = self._task(task_id)
        await trio.to_thread.run_sync(self._node.store.put_answer, task_id, answer)
        task.take_answer(answer)

    async def close_task(self, task_id: str) -> None:
        """The relay holds everything of this task: forget it. A task that is not finished stays."""
        async with self._ordering:
            task = self._tasks.get(task_id)
            if task is None or task.observed.state not in FINAL_STATES or task.running:
                return
            del self._tasks[task_id]
            await trio.to_thread.run_sync(self._node.store.remove, task_id)
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self._node.directory / task_id, ignore_errors=True))

    async def pause_task(self, task_id: str) -> None:
        """The owner holds a task up; it stays so over restarts."""
        await self._hold(task_id, held=True)

    async def resume_task(self, task_id: str) -> None:
        """The owner lets a task go on."""
        await self._hold(task_id, held=False)

    async def _hold(self, task_id: str, *, held: bool) -> None:
        task = self._task(task_id)
        await trio.to_thread.run_sync(lambda: self._node.store.put_held(task_id, held=held))
        await task.hold(held=held)
        self._node.turn_changed()

    async def owner_changed(self, collection_ids: Collection[str]) -> None:
        """The owner has changed the configuration of these collections (or paused this machine): what runs on them
        stops within moments, and goes on with what is allowed and configured now."""
        self.sessions.cut_collections(collection_ids)
        for task in list(self._tasks.values()):
            await task.owner_changed(collection_ids)
        self._node.turn_changed()

    async def suspend(self, *, suspended: bool) -> None:
        """Have all tasks wait, settled, for the moment, or go on."""
        self._node.holds_back = suspended
        await self._suspension_changed()

    async def pause_changed(self) -> None:
        """The owner has paused this machine, or lets it go on (`Policy.paused`): tasks that were paused one by one stay
        so. Versions of before marked all tasks then, and nothing says which of them for which reason: they go on."""
        if not self._node.policy.paused:
            for task in [task for task in self._tasks.values() if task.held_with_all]:
                with suppress(ItemFailed):
                    await self._hold(task.order.task_id, held=False)
        await self._suspension_changed()

    async def _suspension_changed(self) -> None:
        for task in list(self._tasks.values()):
            await task.suspension_changed()
        self._node.turn_changed()

    async def checkpoint(self) -> None:
        """Hold up all tasks, settled, for a clean end; nothing of this is remembered."""
        self._paused = True
        for task in self._tasks.values():
            await task.checkpoint()
        with trio.move_on_after(4):
            while any(task.running for task in self._tasks.values()):
                await self._node.change.wait()

    # --- results ---------------------------------------------------------------------------------------

    async def successful(self, task_id: str, marker: str | None, limit: int) -> Page:
        """A page of what was transferred, of at most ``limit`` rows from ``marker`` on; live while the task runs.
        Raises `ItemFailed` NOT_FOUND, BAD_MARKER and LIST_DAMAGED."""
        return await self._page(successful_page, task_id, marker, limit)

    async def skipped(self, task_id: str, marker: str | None, limit: int) -> Page:
        """A page of what was left out, and why. Raises as `successful` does."""
        return await self._page(skipped_page, task_id, marker, limit)

    async def _page(self, read: ReadPage, task_id: str, marker: str | None, limit: int) -> Page:
        directory = self._node.directory / self._task(task_id).order.task_id
        return await trio.to_thread.run_sync(partial(read, directory, marker, limit, complete=self._is_over(task_id)))

    def _is_over(self, task_id: str) -> bool:
        task = self._task(task_id)
        return task.observed.state in FINAL_STATES and not task.running

    # --- events ----------------------------------------------------------------------------------------

    def events(self, after: int) -> AbstractAsyncContextManager[AsyncIterator[AgentEvent]]:
        """All kept lines after a number, then those to come, without end."""
        return self._node.outbox.read(after)

    async def acknowledge(self, n: int) -> None:
        """The relay has stored all lines up to ``n``; they are kept all the same until their task is closed."""
        await trio.to_thread.run_sync(self._node.store.put, "acknowledged", str(n))

    def last_event(self) -> int:
        """The highest number given to a line so far."""
        return self._node.store.last_event()

    def announce_collections(self, reports: Sequence[CollectionReport]) -> None:
        """Tell the relay what the owner offers now."""
        self._node.outbox.passing(AgentEvent(n=0, kind="collections", time=now_iso(), collections=list(reports)))

    # --- sessions --------------------------------------------------------------------------------------

    async def put_session(self, order: SessionOrder) -> SessionAnswer:
        """Serve as source of a session. Raises `TowpathError` when ticket or policy forbid it."""
        now = time.time()
        ticket = self._node.check_session(order, now)
        before = await trio.to_thread.run_sync(self._node.store.session, order.session_id)
        if before is None and self._node.policy.draining:
            self._node.policy.check_new_session()
        kept = msgspec.structs.replace(order, arranged=None)
        self.sessions.check_room(order.session_id, ticket.source.collection_id if ticket.source else "")
        await trio.to_thread.run_sync(self._node.store.put_session, kept, ticket.expires, now)
        if before is not None and before.ticket != order.ticket and self._narrows(before.ticket, ticket):
            # Whoever goes on with the ticket of before is shown out; the one that counts now is on its way to them.
            self.sessions.cut(order.session_id)
            self.sessions.check_room(order.session_id, ticket.source.collection_id if ticket.source else "")
        own = order.peer.node_id == self._node.node_id
        self.sessions.announce()
        if not own:
            self._introductions.arrange(order)
            self._introductions.prepare(order)
        return SessionAnswer(
            session_id=order.session_id,
            generation=int(now * 1000),
            candidates=await self._node.network.host_candidates(loopback=own),
            certificate=self._node.identity.certificate_pem,
            instance=self._node.network.instance,
        )

    def _narrows(self, before: str, now: Ticket) -> bool:
        """Whether a session may read other files, or links lead to others, than by its ticket of before."""
        try:
            former = self._node.verifier.at_any_time_untrusted(before)
        except ProtocolError:
            return True
        return reads_elsewhere(former.source, now.source)

    async def peer_certificate(self, session_id: str) -> str | None:
        """The certificate of the other node of a session, None for one that is not known here."""
        order = await trio.to_thread.run_sync(self._node.store.session, session_id)
        if order is not None:
            return order.peer.certificate
        sources = [task.order.source for task in self._tasks.values() if task.order.session_id == session_id]
        return sources[0].certificate if sources and sources[0] is not None else None

    async def withdraw_session(self, session_id: str) -> None:
        """Cut a session and refuse its ticket from now on."""
        await trio.to_thread.run_sync(self._node.store.remove_session, session_id)
        self.sessions.cut(session_id)
        self._introductions.cut(session_id)

    # --- paths -----------------------------------------------------------------------------------------

    async def take_offer(self, offer: PathOffer) -> PathAnswer:
        """A destination wants a path to this source arranged. Raises `TowpathError` when there is no such session."""
        self._node.policy.check_operation("sessions")
        order = await trio.to_thread.run_sync(self._node.store.session, offer.session_id)
        if offer.probe:
            # The relay vouches for it; whatever comes in for it says nothing, so nothing is served.
            return await self._introductions.offer(offer, own=False)
        if order is None:
            raise ItemFailed("This agent serves no such session.", code="NOT_FOUND", subject=offer.session_id)
        self._node.check_session(order, time.time())
        return await self._introductions.offer(offer, own=order.peer.node_id == self._node.node_id)

    def take_source_go(self, go: PathGo) -> None:
        """The relay's go for an offer that this source has answered."""
        self._introductions.go(go)

    def take_go(self, task_id: str, go: PathGo) -> None:
        """The relay's go for an offer of a task that runs here."""
        if not self._probes.take_go(task_id, go):
            self._task(task_id).take_go(go)

    def take_candidates(self, task_id: str, answer: PathAnswer) -> None:
        """More addresses of the source of a task that runs here."""
        if not self._probes.take_candidates(task_id, answer):
            self._task(task_id).take_candidates(answer)

    async def probe_peers(self) -> list[PeerPath]:
        """How the agents are reached that data came from lately: the paths of running tasks, and a race for one to each
        other agent, on which nothing is said. Raises `RetryLater` when asked too often."""
        known, unknown = sources_of(self._tasks.values(), self._node.node_id)
        return [*known, *(await self._probes.probe(unknown) if unknown else [])]

    def _offer_probe(self, offer: PathOffer) -> None:
        line = AgentEvent(n=0, kind="path_offer", time=now_iso(), task_id=offer.task_id, offer=offer)
        self._node.outbox.passing(line)

    def _tell_candidates(self, task_id: str, answer: PathAnswer) -> None:
        line = AgentEvent(n=0, kind="path_candidates", time=now_iso(), task_id=task_id, candidates=answer)
        self._node.outbox.passing(line)
