"""One task at its destination, seen from the daemon: its order, its worker, and what is known of it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from functools import partial

import msgspec
import trio

from agent.connect.transport import Path
from agent.system.processes import in_words
from agent.transfer.basis.times import now_iso
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.course.progress import merged
from agent.transfer.processes.channel import (
    BetterPath,
    Channel,
    ChannelClosed,
    Checkpointed,
    Connect,
    Desire,
    Event,
    EventStored,
    Finished,
    Moved,
    Progress,
    RunTask,
)
from agent.transfer.stalls.worker_watch import until_lost
from agent.transfer.tasks.crash_pauses import CrashPauses
from agent.transfer.tasks.held_up import why_held_up
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.tasks.observed_states import behind, canceled, held_up_by, standing_still
from agent.transfer.tasks.task_log import TaskLog
from agent.transfer.tasks.task_paths import TaskPaths
from agent.transfer.tasks.task_store import StoredTask
from agent.transfer.tasks.turns import Candidate
from agent.transfer.tasks.worker_connections import allow, give_connection
from protocol.candidates import Arrangement, PathAnswer, PathGo
from protocol.control import FINAL_STATES, AgentEvent, Counters, Desired, SessionAnswer, TaskObserved, TaskOrder
from protocol.errors import TowpathError

# How often to try again to write down what a task has told.
STATE_PAUSE = 2.0
# A path that the relay has arranged with an order is of no use later than this: the source does not wait for longer.
ARRANGED_LIFE = 15.0

logger = logging.getLogger("towpath.tasks")


class _Lost(ChannelClosed):
    """The worker stood still and was ended, which was said."""


class RunningTask:
    """See the module. All methods are called in the trio thread."""

    def __init__(self, node: LocalNode, stored: StoredTask) -> None:
        self._node = node
        self.order = stored.order
        self.observed = stored.observed
        # The owner holds this task up; and whether that may be since all were held up together.
        self.held, self.held_with_all = stored.held, stored.held_with_all
        self.running = False
        self._log = TaskLog(begun=stored.observed.state != "QUEUED")
        self.name_claim()
        self._answer = stored.answer or stored.order.session
        self._paths: TaskPaths | None = None
        self._channel: Channel | None = None
        self._stopping = False
        # Whether its place must be looked at again before another worker begins.
        self._moved = False
        # What the relay has arranged with the order, and when it came.
        self._arranged: tuple[float, Arrangement] | None = None

    @classmethod
    def fresh(cls, node: LocalNode, order: TaskOrder, observed: TaskObserved) -> RunningTask:
        return cls(node, StoredTask(order, observed, order.session, held=False))

    def name_claim(self) -> None:
        """Say anew which places this task writes to: its order is new, or its collection is somewhere else now."""
        self.claim = self._node.named_claim(self.order)
        self.placed = self._looking = False

    async def look_at_claim(self) -> None:
        """Find out which places those really are now; ``placed`` says that it has been done. Another look at the same
        time returns at once."""
        if self._looking:
            return
        named, self._looking = self.claim, True
        claim = await self._node.claim(self.order)
        # Unless it was said anew meanwhile.
        if self.claim is named:
            self.claim, self.placed, self._looking = claim, True, False
        self._node.turn_changed()

    @property
    def runnable(self) -> bool:
        """Whether a worker should be started."""
        if self.running or self.observed.state in FINAL_STATES:
            return False
        return self.order.desired == "cancel" or (self.order.desired == "run" and self.held_up() is None)

    @property
    def desired(self) -> Desired:
        if self.order.desired == "run" and (self._stopping or self.held_up() is not None):
            return "pause"
        return self.order.desired

    def candidate(self) -> Candidate:
        """This task as the choice of the next ones sees it."""
        return Candidate(
            id=self.order.task_id,
            owner_id=self.order.owner_id,
            claim=self.claim,
            running=self.running,
            waiting=self.observed.state == "WAITING",
            runnable=self.runnable,
            ending=self.order.desired == "cancel",
        )

    async def tell_waits_for(self, holder: RunningTask) -> None:
        """Report that another task has the place this one writes to."""
        if self.running or self.observed.state in FINAL_STATES:
            return
        now = behind(self.observed, self.order, holder.order)
        if (self.observed.status_code, self.observed.status_sentence) != (now.status_code, now.status_sentence):
            await self._observe(now, final=False)

    def held_up(self) -> TowpathError | None:
        """Why the owner of this machine does not let the task run now. The configuration may have changed since the
        order was taken, also while the agent was not running."""
        place = self.order.destination.collection_id
        seen = self.observed
        begun = self.running or seen.state != "QUEUED" or bool(seen.path) or seen.counters != Counters()
        return why_held_up(self._node.policy, place, held=self.held, holds_back=self._node.holds_back, begun=begun)

    @property
    def answer(self) -> SessionAnswer | None:
        """Where the source was last."""
        return self._answer

    @property
    def went_directly(self) -> bool:
        """Whether its source can be dialled where it is, as far as is known: then nobody's help is needed to go on."""
        return not self.observed.path or self.observed.path.startswith("direct ")

    @property
    def path(self) -> Path | None:
        """The path in use, as far as one is."""
        return None if self._paths is None else self._paths.path

    # --- orders ----------------------------------------------------------------------------------------

    def take_order(self, order: TaskOrder, observed: TaskObserved) -> None:
        """A newer order; `tell_order` must follow."""
        if order.arranged is not None:
            self._arranged = (trio.current_time(), order.arranged)
            order = msgspec.structs.replace(order, arranged=None)
        if self.running and order.desired == "run" and self._reach(order) != self._reach(self.order):
            # Links that it has followed may lead where they must not any more.
            self._moved = True
        changed = order.items is not self.order.items
        self.order = order
        if changed:
            self.name_claim()
        self.observed = msgspec.structs.replace(self.observed, revision=observed.revision)
        self._node.allotment.changed()
        if order.session is not None:
            self.take_answer(order.session)

    def _reach(self, order: TaskOrder) -> list[str] | None:
        """How far links may lead the task at its destination."""
        return self._node.verifier.at_any_time_untrusted(order.ticket).destination.reach

    async def tell_order(self) -> None:
        """Tell a running worker what is ordered now."""
        await self._tell_worker()

    async def hold(self, *, held: bool) -> None:
        """The owner holds the task up or lets it go on."""
        self.held, self.held_with_all = held, False
        await self.suspension_changed()

    async def suspension_changed(self) -> None:
        """This task, or all of this machine, wait from now on, or go on."""
        if self.running:
            await self._tell_worker()
        else:
            await self.tell_why_not()

    async def owner_changed(self, collection_ids: Collection[str]) -> None:
        """The owner has changed the configuration of these collections. A worker that runs on one of them stops, and
        another begins with what is configured now, if it is still allowed and when the place is free."""
        if self.order.destination.collection_id not in collection_ids or self.observed.state in FINAL_STATES:
            return
        if not self.running:
            self.name_claim()
            await self.tell_why_not()
            return
        self._moved = True
        await self._tell_worker()

    async def tell_why_not(self) -> None:
        """Report what holds up a task that no worker runs, and who can mend it, or that nothing does any more."""
        if self.order.desired != "run" or self.observed.state in FINAL_STATES:
            return
        before, now = self.observed, held_up_by(self.observed, self.held_up())
        if now == before:
            return
        if (before.state, now.state) == ("QUEUED", "QUEUED"):
            # Of these there may be very many; none has anything to lose.
            self.observed = now
            line = AgentEvent(n=0, kind="progress", time=now_iso(), task_id=self.order.task_id, observed=now)
            self._node.outbox.passing(line)
        else:
            await self._observe(now, final=False)

    async def checkpoint(self) -> None:
        """The daemon is about to end."""
        self._stopping = True
        await self._tell_worker()

    async def _tell_worker(self) -> None:
        """Say what is wanted now. A worker that is still being started is told when it is there."""
        # One whose collection is configured otherwise by now settles what has come, and ends.
        desired = "pause" if self._moved else self.desired
        if self._channel is not None:
            try:
                await self._channel.send(
                    Desire(desired=desired, ticket=self.order.ticket, deadline=self.order.deadline)
                )
            except ChannelClosed:
                # `run` notices by itself and starts another worker where one is wanted.
                self._channel = None

    def take_answer(self, answer: SessionAnswer) -> None:
        """Where the source is now."""
        if self._answer is None or answer.generation >= self._answer.generation:
            self._answer = answer
            if self._paths is not None:
                self._paths.take_answer(answer)

    def take_go(self, go: PathGo) -> None:
        """The relay's go for an offer of the running worker's."""
        if self._paths is not None:
            self._paths.take_go(go)

    def take_candidates(self, answer: PathAnswer) -> None:
        """More addresses of the source's, for an offer of the running worker's."""
        if self._paths is not None:
            self._paths.take_candidates(answer)

    # --- the worker ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run workers until the task is finished, held, or its collection another one; one that dies is followed by
        another."""
        pauses = CrashPauses()
        while self.desired != "pause" and not self._moved and self.observed.state not in FINAL_STATES:
            if self.order.desired == "cancel" and (
                await self._cancel_without_collection() or await self._cancel_untouched()
            ):
                return
            started, before = trio.current_time(), self.observed.counters
            try:
                await self._run_worker()
            except StateTrouble as error:
                logger.error("Task %s: %s", self.order.task_id, error.sentence)
                await trio.sleep(STATE_PAUSE)
            except (ChannelClosed, OSError) as error:
                self._channel = None
                details = f"The process that ran this task ended unexpectedly{error}; another one goes on."
                if not isinstance(error, ChannelClosed):
                    details = f"No process could be started for this task ({error.strerror}); it is tried again."
                pause = pauses.after(trio.current_time() - started, before, self.observed.counters)
                if not isinstance(error, _Lost):
                    await self._record(self._trouble("WORKER_DIED", details))
                await trio.sleep(pause)

        if self._moved:
            # Only now: it may have moved between the choice of this task and the first step here.
            self._moved = False
            self.name_claim()
        if not self._stopping:
            await self.tell_why_not()

    def _trouble(self, code: str, details: str) -> AgentEvent:
        description = code.replace("_", " ").lower()
        return self._line(
            Event(seq=0, time=now_iso(), code=code, description=description, details=details, is_error=True)
        )

    async def cancel_at_once(self) -> None:
        """End a cancelled task that no worker has begun, without waiting for its turn; any other one stays as it is."""
        if self.running or self.order.desired != "cancel" or self.observed.state in FINAL_STATES:
            return
        # So that nobody starts a worker meanwhile.
        self.running = True
        try:
            await self._cancel_untouched()
        finally:
            self.running = False

    async def _cancel_untouched(self) -> bool:
        """Cancel a task without a worker if none has begun it. A worker makes the task's folder before all else, and
        moves nothing without its daemon. One that deletes, of a daemon that died, might be about to begin: such a task
        is left to a worker, which waits until it is alone."""
        if self.order.type != "TRANSFER" or self.observed.state != "QUEUED":
            return False
        folder = self._node.directory / self.order.task_id
        if await trio.to_thread.run_sync(os.path.lexists, folder):
            return False
        await self._observe(canceled(self.observed), final=True)
        return True

    async def _cancel_without_collection(self) -> bool:
        """A task whose collection the owner has removed has nowhere left to tidy up: it is cancelled as it is."""
        try:
            self._node.policy.collection(self.order.destination.collection_id)
        except TowpathError:
            await self._observe(canceled(self.observed), final=True)
            return True
        return False

    async def _run_worker(self) -> None:
        node = self._node
        order = msgspec.structs.replace(self.order, session=None)
        allowance = node.allotment.begin("receive", self._own_limit)
        start = RunTask(
            common=node.common(),
            order=order,
            state_dir=str(node.directory / self.order.task_id),
            lanes=allowance.lanes,
            rate=allowance.rate,
            limited_by=allowance.source,
            cpu=allowance.cpu,
            memory=allowance.memory,
            last_event=await trio.to_thread.run_sync(node.store.last_worker_event, self.order.task_id),
        )
        lost: list[TowpathError] = []
        async with node.workers.worker(start) as channel, trio.open_nursery() as nursery:
            self._channel = channel
            share = node.allotment.worker("receive", self._own_limit, allowance, partial(allow, channel))
            if self._moved or self.desired != order.desired:
                await self._tell_worker()
            if order.source is not None and order.type == "TRANSFER":
                better = self._better(channel, nursery)
                self._paths = TaskPaths(node, self.order, self._answer, better, self._take_arranged())
                await nursery.start(self._paths.run)
            nursery.start_soon(self._look_after, channel, lost, nursery.cancel_scope)
            try:
                with share as worker:
                    while True:
                        message, _ = await channel.receive()
                        if isinstance(message, Connect):
                            nursery.start_soon(self._connect, channel, message)
                        elif isinstance(message, Moved):
                            worker.note(message.content, message.waited)
                        elif await self._handle(channel, message):
                            nursery.cancel_scope.cancel()
                            return
            except ChannelClosed:
                nursery.cancel_scope.cancel()
                self._channel = None
            finally:
                self._channel = self._paths = None
        if lost:
            raise _Lost
        raise ChannelClosed(f" ({in_words(channel.ended)})" if channel.ended else "")

    async def _look_after(self, channel: Channel, lost: list[TowpathError], scope: trio.CancelScope) -> None:
        """End a worker that stands still, and say so before: it may take long to be gone."""
        lost.append(await until_lost(channel, self._stands_still))
        await self._stands_still(lost[0])
        scope.cancel()

    async def _stands_still(self, error: TowpathError) -> None:
        if (self.observed.state, self.observed.status_sentence) == ("WAITING", error.sentence):
            return
        await self._record(self._trouble(error.code, error.sentence))
        await self._observe(standing_still(self.observed, error), final=False)

    def _take_arranged(self) -> Arrangement | None:
        """What the relay has arranged, once, and if it can still be of use."""
        arranged, self._arranged = self._arranged, None
        return arranged[1] if arranged is not None and trio.current_time() - arranged[0] < ARRANGED_LIFE else None

    def _own_limit(self) -> int | None:
        """What the task itself is limited to, as the relay last said."""
        return self.order.options.bandwidth_limit

    async def _handle(self, channel: Channel, message: object) -> bool:
        """Take a worker's message; whether it was its last."""
        if isinstance(message, Event):
            await self._record(self._line(message), worker_seq=message.seq)
            # A worker that has said its last word does not listen any more; what it said still waits to be read.
            with contextlib.suppress(ChannelClosed):
                await channel.send(EventStored(seq=message.seq))
        elif isinstance(message, Progress):
            await self._observe(message.observed, final=False)
        elif isinstance(message, Finished | Checkpointed):
            final = isinstance(message, Finished)
            why = not final and not self._stopping and self.order.desired == "run"
            await self._observe(held_up_by(message.observed, self.held_up()) if why else message.observed, final=final)
            return True
        return False

    def _line(self, event: Event) -> AgentEvent:
        return AgentEvent(
            n=0,
            kind="event",
            time=event.time,
            task_id=self.order.task_id,
            code=event.code,
            description=event.description,
            details=event.details,
            is_error=event.is_error,
        )

    async def _record(
        self, line: AgentEvent, *, worker_seq: int | None = None, observed: TaskObserved | None = None
    ) -> None:
        """Keep a line, and where the task is with it. While the state directory cannot be written the worker's word
        waits, and with it the task."""
        store, kept = self._node.store, line.observed or observed
        while True:
            try:
                await trio.to_thread.run_sync(lambda: store.add_event(line, worker_seq=worker_seq, observed=kept))
            except StateTrouble as error:
                logger.error("Task %s: %s", self.order.task_id, error.sentence)
                await trio.sleep(STATE_PAUSE)
            else:
                self._node.outbox.durable()
                return

    async def _observe(self, observed: TaskObserved, *, final: bool) -> None:
        before = self.observed
        self.observed = msgspec.structs.replace(
            observed,
            revision=self.order.revision,
            counters=merged(before.counters, observed.counters),
            path=(self._paths.text if self._paths is not None else "") or before.path,
        )
        said = self._log.line(self.observed)
        if said is not None:
            logger.log(said[0], "Task %s %s", self.order.task_id, said[1])
        line = AgentEvent(n=0, kind="progress", time=now_iso(), task_id=self.order.task_id, observed=self.observed)
        if final or (before.state, before.status_code) != (observed.state, observed.status_code):
            await self._record(msgspec.structs.replace(line, kind="state"))
        else:
            self._node.outbox.passing(line)
        if (before.state == "WAITING") != (observed.state == "WAITING"):
            self._node.turn_changed()

    # --- connections -----------------------------------------------------------------------------------

    async def _connect(self, channel: Channel, message: Connect) -> None:
        """Answer a worker's wish. One that has ended meanwhile is noticed by whoever listens to it."""
        with contextlib.suppress(ChannelClosed):
            if await give_connection(channel, message, self._paths, self._tell_path) and message.kind == "lane":
                self._node.lane_begun.set()

    async def _tell_path(self, paths: TaskPaths) -> None:
        """Tell people when the kind of path has changed, and keep it: a start wants to know it."""
        line = paths.news()
        if line is not None:
            self.observed = msgspec.structs.replace(self.observed, path=paths.text)
            await self._record(line, observed=self.observed)

    def _better(self, channel: Channel, nursery: trio.Nursery) -> Callable[[Path], None]:
        """Tell the worker and the user that lanes may move to a better path."""

        async def tell() -> None:
            if self._paths is not None:
                await self._tell_path(self._paths)
            with contextlib.suppress(ChannelClosed):
                await channel.send(BetterPath())

        return lambda _path: nursery.start_soon(tell)
