"""Bringing one task to its agents: the calls that take the step which is due (`next_step`).

Every step may be repeated: orders carry a revision, sessions an id, and what agents must be told is written down before
they are told. So a relay that dies between any two lines here goes on where it was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import msgspec
import trio

from protocol.candidates import Arrangement, check_candidates_untrusted
from protocol.control import (
    SessionAnswer,
    SessionOrder,
    TaskItem,
    TaskObserved,
    TaskOrder,
    decode_untrusted,
)
from protocol.errors import ItemFailed, ProtocolError, RetryLater, TowpathError
from protocol.ticket import TicketSigner
from relay.store.database import Store, for_all
from relay.times import iso
from relay.transfer import closed_owners, delivery_notes, task_rows
from relay.transfer.agents import AgentLinks
from relay.transfer.ahead import Ahead, Arranges, told_ahead
from relay.transfer.delivery_notes import Loaded
from relay.transfer.entitlement import NOTHING
from relay.transfer.next_step import Situation, Step, next_step
from relay.transfer.parties import Side, Sides, sign_ticket
from relay.transfer.task_documents import OFFLINE
from relay.transfer.task_rows import Scope, Task

# Steps one visit may take; more would mean that two sides disagree for ever.
MAX_STEPS = 8
# Withdrawn tasks that are looked at in the database at a time.
CUT_LOOKS = 2
# Large orders take their time on a slow line, and on the agent's disk.
_SECONDS_PER_ITEM = 0.005
# Bytes of packed items that are not worth a thread.
_SMALL = 16 * 1024
# Of what a source says of itself; characters.
_LONGEST_INSTANCE = 64


# A source is asked for a new session of one task at most this often, in seconds.
OFFER_INTERVAL = 1.0
# So long after the relay's start an agent that runs a task may be away without a word about it, in seconds.
BACK_SOON = 15.0


@dataclass(frozen=True)
class Visit:
    """How a visit to a task ended: tasks may have finished, and it may want another try after an error."""

    finished: bool = False
    failed: TowpathError | None = None


class Courier:
    """Takes the steps of tasks. The caller sees to it that a task has one visit at a time."""

    def __init__(
        self,
        store: Store,
        links: AgentLinks,
        signer: TicketSigner,
        paths: Arranges,
        *,
        ticket_life: float,
        keep: float,
        timeout: float,
        since: float,
        cut_tunnel: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._links = links
        self._signer = signer
        self._paths = paths
        self._ticket_life = ticket_life
        self._keep = keep
        self._timeout = timeout
        # When this relay was started.
        self._since = since
        self._cut_tunnel = cut_tunnel
        # One withdrawal may concern thousands of tasks; requests find the database free meanwhile.
        self._cut_looks = trio.CapacityLimiter(CUT_LOOKS)
        # Tasks whose agent asked for a session, with the generation it has; after a restart all are offered anew.
        self._wanted: dict[str, int] = {}
        # When the source of a task was last asked; an agent that asks on and on does not reach it more often.
        self._asked: dict[str, float] = {}
        self.orders = 0
        self.sessions = 0

    def want_session(self, task_id: str, generation: int = -1) -> None:
        """Note that a task needs a session; the next visit offers it."""
        self._wanted[task_id] = max(generation, self._wanted.get(task_id, -1))

    async def visit(self, task_id: str, now: float) -> Visit:
        """Take all steps that can be taken now. Agents' refusals end the task, passing faults are returned."""
        source_failed: TowpathError | None = None
        for _ in range(MAX_STEPS):
            loaded = await self._store.read(lambda connection: delivery_notes.load(connection, task_id, now))
            if loaded is None:
                self._wanted.pop(task_id, None)
                return Visit()
            task, sides = loaded.task, loaded.sides
            if loaded.owner_closed and task.desired == "run" and not task.finished:
                await self._store.write(lambda connection: closed_owners.pause(connection, task_id, now))
                continue
            if not task.finished and not loaded.entitlement.runs:
                # No ticket is signed any more, whoever forgot to end the task when the permission went.
                await self._store.write(lambda connection: delivery_notes.end_unentitled(connection, task_id, now))
                continue
            situation = self._situation(task, sides)
            if source_failed is not None:
                situation = replace(situation, source_connected=False)
            step = next_step(task, situation, now)
            try:
                if step is Step.NOTHING:
                    if task.finished:
                        self._wanted.pop(task_id, None)
                        self._asked.pop(task_id, None)
                    elif task.held_by == "destination":
                        await self._change(task.id, held_by=None)
                    return Visit(finished=task.finished, failed=source_failed)
                if step is Step.WAIT_FOR_WORKER:
                    if task.attempted and now - self._since < BACK_SOON:
                        # The relay has just been started: whoever was there before it comes back in a moment.
                        return Visit(failed=RetryLater("The agent has not linked to this relay yet."))
                    await self._hold(task, "destination", now)
                    return Visit()
                if step is Step.OFFER_SESSION and now - self._asked.get(task_id, -OFFER_INTERVAL) < OFFER_INTERVAL:
                    return Visit(failed=RetryLater("The source was asked for this task a moment ago."))
                await self._take(step, loaded, now)
            except TowpathError as error:
                if await self._refused(task, step, error, now):
                    continue
                if step is Step.WITHDRAW_SESSION:
                    # One end that does not answer must not keep the other from being told.
                    source_failed = error
                    continue
                return Visit(failed=error)
        return Visit(failed=RetryLater("The agent does not say yet that it does what was ordered; it is asked again."))

    async def source_of(
        self, task_id: str, node_id: str, now: float, *, ended: bool = False
    ) -> tuple[str, Task] | None:
        """The node that is the source of a running task which ``node_id`` drives; with ``ended`` also of one that has
        ended, if its owner still may what it did."""
        running = await self._running(task_id, now, ended=ended)
        if running is None or running[1] != node_id:
            return None
        return running[0], running[2]

    async def worker_of(self, task_id: str, node_id: str, session_id: str, now: float) -> str | None:
        """The node that drives a running task whose source is ``node_id``, in this session."""
        running = await self._running(task_id, now)
        if running is None or running[0] != node_id or running[2].session_id != session_id:
            return None
        return running[1]

    async def _running(self, task_id: str, now: float, *, ended: bool = False) -> tuple[str, str, Task] | None:
        """The nodes of source and worker of a task that may run now."""
        loaded = await self._store.read(lambda connection: delivery_notes.load(connection, task_id, now))
        if loaded is None or (loaded.task.finished and not ended):
            return None
        if loaded.owner_closed or not loaded.entitlement.runs:
            return None
        if loaded.sides.source is None or loaded.sides.worker is None:
            return None
        return loaded.sides.source.node_id, loaded.sides.worker.node_id, loaded.task

    async def compare(self, task_id: str, node_id: str, now: float) -> None:
        """Ask an agent how a task that it was given stands, and give it again if the agent does not know it.

        Raises the link's passing errors.
        """
        loaded = await self._store.read(lambda connection: delivery_notes.load(connection, task_id, now))
        if loaded is None or loaded.task.finished or not loaded.task.delivered:
            return
        if loaded.sides.worker is None or loaded.sides.worker.node_id != node_id:
            return
        try:
            answer = await self._links.call(node_id, "GET", f"/link/tasks/{task_id}", timeout=self._timeout)
            observed = decode_untrusted(answer, TaskObserved)
        except ItemFailed as error:
            if error.code != "NOT_FOUND":
                raise
            await self._store.write(lambda connection: delivery_notes.give_again(connection, task_id))
            return
        hello = self._links.hello(node_id)
        await self._store.write(lambda connection: delivery_notes.compared(connection, task_id, observed, hello, now))

    async def cut(self, task_id: str) -> None:
        """Withdraw the session of a task at its source at once, beside any visit that is under way, and end what the
        relay's own tunnel moves of it, whether or not the source can be told.

        A visit repeats it, so that nothing is lost when this fails. Raises the link's errors.
        """
        async with self._cut_looks:
            # Not in the turn of whoever took the permission away, who may be asking for much else.
            with for_all():
                found = await self._store.read(lambda connection: delivery_notes.stopped(connection, task_id))
        if found is None:
            return
        task, source = found
        if self._cut_tunnel is not None:
            await self._cut_tunnel(task.session_id)
        if not task.session_open or source is None:
            return
        node_id = source.node_id
        if self._links.is_connected(node_id):
            path = f"/link/sessions/{task.session_id}"
            await self._links.call(node_id, "DELETE", path, timeout=self._timeout)

    def _situation(self, task: Task, sides: Sides) -> Situation:
        return Situation(
            worker_connected=sides.worker is not None and self._links.is_connected(sides.worker.node_id),
            source_connected=sides.source is not None and self._links.is_connected(sides.source.node_id),
            session_wanted=task.id in self._wanted,
            keep_until=(task.completed or 0.0) + self._keep,
        )

    async def _take(self, step: Step, loaded: Loaded, now: float) -> None:
        task, sides = loaded.task, loaded.sides
        if step is Step.SEND_ORDER:
            assert sides.worker is not None
            await self._send_order(loaded, sides.worker, now)
        elif step is Step.OFFER_SESSION:
            assert sides.worker is not None
            assert sides.source is not None
            ticket = self._sign(loaded, sides.worker, sides.source, now)
            await self._offer_session(task, sides.worker, sides.source, ticket, now)
        elif step is Step.WITHDRAW_SESSION:
            assert sides.source is not None
            await self._links.call(
                sides.source.node_id, "DELETE", f"/link/sessions/{task.session_id}", timeout=self._timeout
            )
            await self._change(task.id, session_open=False)
        else:
            assert sides.worker is not None
            await self._links.call(sides.worker.node_id, "DELETE", f"/link/tasks/{task.id}", timeout=self._timeout)
            await self._change(task.id, closed=True)

    def _sign(self, loaded: Loaded, worker: Side, source: Side | None, now: float) -> str:
        # An order to stop needs no permission to read or write anything.
        allowed = loaded.entitlement.runs and not loaded.task.finished and loaded.task.desired == "run"
        scope, may = (loaded.scope, loaded.entitlement) if allowed else (Scope([], []), NOTHING)
        return sign_ticket(self._signer, loaded.task, worker, source, scope, may, now=now, life=self._ticket_life)

    async def _send_order(self, loaded: Loaded, worker: Side, now: float) -> None:
        task, source = loaded.task, loaded.sides.source
        running = task.desired == "run"
        first = task.delivered == 0
        asks = running and source is not None and self._links.is_connected(source.node_id)
        ahead = told_ahead(self._links, self._paths, task, worker, source) if asks and source is not None else None
        # Written down first: whatever happens next, the ticket will be withdrawn when the task is over.
        mark = partial(delivery_notes.mark_attempted, task=task, session=asks)
        if not await self._store.write(mark):
            return
        items = await self._items(task) if first else None
        ticket = self._sign(loaded, worker, source, now)
        if source is None or not asks:
            await self._give_order(loaded, worker, ticket, items, None, now)
            if source is not None:
                self.want_session(task.id)
            return
        if ahead is not None:
            await self._tell_both(loaded, worker, source, ticket, items, ahead, now)
            return
        session: SessionAnswer | None = None
        try:
            session = await self._ask_source(task, worker, source, ticket, now)
        except TowpathError as error:
            # Without a session the agent can begin, and a later visit offers it one; a refusal ends the task.
            if error.disposition in ("permanent", "fatal"):
                raise
        await self._give_order(loaded, worker, ticket, items, session, now)
        self._note_session(task, given=session is not None)

    def _note_session(self, task: Task, *, given: bool) -> None:
        if given:
            self._wanted.pop(task.id, None)
        else:
            self.want_session(task.id)

    async def _items(self, task: Task) -> list[TaskItem]:
        packed = await self._store.read(lambda connection: task_rows.load_items(connection, task.id))
        if len(packed) < _SMALL:
            return task_rows.unpack_items(packed)
        return await trio.to_thread.run_sync(task_rows.unpack_items, packed)

    async def _tell_both(
        self,
        loaded: Loaded,
        worker: Side,
        source: Side,
        ticket: str,
        items: list[TaskItem] | None,
        ahead: Ahead,
        now: float,
    ) -> None:
        """Order the task and the session at the same time. What the source answers follows, where it says more."""
        task = loaded.task
        answers: list[SessionAnswer] = []
        not_given: list[TowpathError] = []
        refused: list[TowpathError] = []

        async def ask() -> None:
            try:
                answers.append(await self._ask_source(task, worker, source, ticket, now, ahead.source))
            except TowpathError as error:
                refused.append(error)

        async def give() -> None:
            try:
                await self._give_order(loaded, worker, ticket, items, ahead.answer, now, ahead.destination)
            except TowpathError as error:
                not_given.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(give)
        if not_given:
            raise not_given[0]
        if refused and refused[0].disposition in ("permanent", "fatal"):
            raise refused[0]
        # What else a source says is no reason not to begin; a later visit asks it again.
        self._note_session(task, given=bool(answers))
        if answers and answers[0].candidates != ahead.answer.candidates:
            self.want_session(task.id)
            await self._pass_on(task, worker, answers[0])
            self._note_session(task, given=True)

    async def _give_order(
        self,
        loaded: Loaded,
        worker: Side,
        ticket: str,
        items: list[TaskItem] | None,
        session: SessionAnswer | None,
        now: float,
        arranged: Arrangement | None = None,
    ) -> None:
        task, source = loaded.task, loaded.sides.source
        order = TaskOrder(
            task_id=task.id,
            revision=task.revision,
            desired=cast(Any, task.desired),
            type=cast(Any, task.type),
            ticket=ticket,
            session_id=task.session_id,
            destination=worker.party,
            source=None if source is None else source.party,
            owner_id=task.owner_id,
            owner=task.owner,
            label=task.label or "",
            deadline=iso(task.deadline),
            options=task.task_options,
            items=items,
            session=session,
            arranged=arranged,
        )
        patience = self._timeout + (len(items) * _SECONDS_PER_ITEM if items is not None else 0.0)
        answer = await self._links.call(
            worker.node_id, "PUT", f"/link/tasks/{task.id}", document=order, timeout=patience
        )
        self.orders += 1
        observed = decode_untrusted(answer, TaskObserved)
        running = task.desired == "run"
        held = "source" if running and source is not None and session is None else None
        hello = self._links.hello(worker.node_id)
        await self._store.write(
            lambda connection: delivery_notes.delivered(connection, task, observed, hello, held, now)
        )

    async def _ask_source(
        self,
        task: Task,
        worker: Side,
        source: Side,
        ticket: str,
        now: float,
        arranged: Arrangement | None = None,
    ) -> SessionAnswer:
        self._asked[task.id] = now
        seen = self._links.address(source.node_id), self._links.address(worker.node_id)
        order = SessionOrder(
            session_id=task.session_id,
            task_id=task.id,
            ticket=ticket,
            peer=worker.party,
            observed=seen[0],
            peer_observed=seen[1],
            relay_path=task.task_options.relay_path,
            arranged=arranged,
        )
        answer = await self._links.call(
            source.node_id, "PUT", f"/link/sessions/{task.session_id}", document=order, timeout=self._timeout
        )
        self.sessions += 1
        checked = check_session_answer_untrusted(answer, task.session_id, source.party.certificate)
        return msgspec.structs.replace(checked, observed=seen[1], peer_observed=seen[0])

    async def _offer_session(self, task: Task, worker: Side, source: Side, ticket: str, now: float) -> None:
        wanted = self._wanted.get(task.id)
        # Written down first, as with the order.
        await self._change(task.id, session_open=True)
        answer = await self._ask_source(task, worker, source, ticket, now)
        await self._pass_on(task, worker, answer)
        await self._change(task.id, held_by=None)
        if self._wanted.get(task.id) == wanted:
            self._wanted.pop(task.id, None)

    async def _pass_on(self, task: Task, worker: Side, answer: SessionAnswer) -> None:
        path = f"/link/tasks/{task.id}/session"
        await self._links.call(worker.node_id, "PUT", path, document=answer, timeout=self._timeout)

    async def _change(self, task_id: str, **values: Any) -> None:
        await self._store.write(lambda connection: task_rows.change(connection, task_id, **values))

    async def _hold(self, task: Task, side: str, now: float) -> None:
        if task.held_by != side:
            await self._store.write(lambda connection: delivery_notes.hold(connection, task.id, side, now))

    async def _refused(self, task: Task, step: Step, error: TowpathError, now: float) -> bool:
        """Deal with an error of a step; True when the task should be looked at again at once."""
        gone = error.disposition == "permanent" and error.code == "NOT_FOUND"
        if step is Step.WITHDRAW_SESSION and gone:
            await self._change(task.id, session_open=False)
            return True
        if step is Step.CLOSE and gone:
            await self._change(task.id, closed=True)
            return True
        if step is Step.SEND_ORDER and task.desired == "cancel" and error.disposition in ("permanent", "fatal"):
            # The agent has no such task (any more): there is nothing left to stop.
            await self._store.write(lambda connection: delivery_notes.nothing_to_stop(connection, task.id, now))
            return True
        if error.disposition in ("permanent", "fatal") and not task.finished:
            await self._store.write(lambda connection: delivery_notes.fail(connection, task.id, error, now))
            return True
        if error.code != OFFLINE and not task.finished:
            await self._store.write(lambda connection: delivery_notes.note_trouble(connection, task.id, error, now))
        return False


def check_session_answer_untrusted(data: bytes, session_id: str, certificate: str) -> SessionAnswer:
    """A source's answer, with its candidates counted and measured. Raises only `ProtocolError`.

    The certificate must be the one the source enrolled with: the destination pins it anyway.
    """
    answer = decode_untrusted(data, SessionAnswer)
    if answer.session_id != session_id or answer.certificate.strip() != certificate.strip():
        raise ProtocolError("The source answered for another session or with another certificate.")
    if len(answer.instance) > _LONGEST_INSTANCE:
        raise ProtocolError("The source says an impossible instance of itself.")
    check_candidates_untrusted(answer.candidates)
    return answer
