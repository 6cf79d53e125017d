"""The steward sees to it that every task gets where it should, whoever comes, goes, or is killed in between.

It watches links come and go, reads the event stream of every linked agent, visits tasks (`relay.transfer.delivery`)
when something has changed for them, and keeps the clock: deadlines, tickets to renew, cancels that nobody confirms.
Everything it must not forget is in the database before it is acknowledged; what is only in memory (progress of the last
second, who waits for a session) comes again by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from sqlalchemy import Connection

from protocol.candidates import PathAnswer, PathOffer
from protocol.control import AgentEvent, AgentHello, MissingCollections
from protocol.errors import TowpathError
from protocol.ticket import TicketSigner, TicketVerifier
from relay.rendezvous.registry import LinkUp
from relay.rendezvous.signalling import Signalling
from relay.settings import Settings
from relay.store.batch import Batch
from relay.store.database import Store
from relay.transfer import arrivals, task_reports
from relay.transfer.agents import AgentLinks
from relay.transfer.arrivals import Arrival
from relay.transfer.delivery import Courier
from relay.transfer.duties import Duties
from relay.transfer.event_stream import LineReader
from relay.transfer.latest_progress import LatestProgress
from relay.transfer.take_over import TakeOver

logger = logging.getLogger("relay.steward")

CLOCK_INTERVAL, CLOCK_PAUSE = 60.0, 0.2
# Links that come back this soon are not worth an event in every task.
AWAY_BEFORE_NOTICE = 15.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
MAX_VISITS = 16


@dataclass(frozen=True)
class StewardStatistics:
    """What the steward does and has done since the start."""

    attended: int
    due: int
    visiting: int
    visits: int
    orders: int
    sessions: int
    lines: int
    dropped_lines: int
    stream_failures: int
    visit_failures: int


class Steward:
    """One for each relay. ``clock`` gives Unix seconds. All methods belong to one trio run.

    ``verifier`` knows the relay's own tickets again; without one no tasks are taken over from agents. ``cut_tunnel``
    ends all tunnels of a session.
    """

    def __init__(
        self,
        store: Store,
        registry: AgentLinks,
        signer: TicketSigner,
        settings: Settings,
        clock: Callable[[], float],
        signalling: Signalling | None = None,
        verifier: TicketVerifier | None = None,
        cut_tunnel: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._links = registry
        self._clock = clock
        self._signalling = signalling or Signalling(registry)
        self._nursery: trio.Nursery | None = None
        self._keep = float(settings.tasks.retention)
        ticket_life = float(settings.tickets.life)
        self._duties = Duties(ticket_life)
        self._courier = Courier(
            store,
            registry,
            signer,
            self._signalling,
            ticket_life=ticket_life,
            keep=self._keep,
            timeout=float(settings.limits.call_timeout),
            since=clock(),
            cut_tunnel=cut_tunnel,
        )
        self._take_over = None
        if verifier is not None:
            timeout = float(settings.limits.call_timeout)
            self._take_over = TakeOver(store, registry, verifier, timeout=timeout)
        self._due: dict[str, None] = {}
        self._due_event = trio.Event()
        self._visiting: dict[str, bool] = {}
        self._limiter = trio.Semaphore(MAX_VISITS)
        self._greeted: Batch[AgentHello, Arrival | None] = Batch(store.write, self._greet)
        self._pauses: dict[str, float] = {}
        self._retries: dict[str, float] = {}
        self._clock_event = trio.Event()
        self._clock_set = False
        self._attended: dict[str, trio.CancelScope] = {}
        self._progress = LatestProgress(store, clock)
        self._finished: dict[str, trio.Event] = {}
        # Node → the number that it is being told of, or will be next.
        self._acknowledging: dict[str, int] = {}
        self._visits = self._lines = self._dropped = self._stream_failures = self._visit_failures = 0

    def statistics(self) -> StewardStatistics:
        """Counts of this moment and since the start."""
        return StewardStatistics(
            attended=len(self._attended),
            due=len(self._due),
            visiting=len(self._visiting),
            visits=self._visits,
            orders=self._courier.orders,
            sessions=self._courier.sessions,
            lines=self._lines,
            dropped_lines=self._dropped,
            stream_failures=self._stream_failures,
            visit_failures=self._visit_failures,
        )

    # --- for the rest of the relay --------------------------------------------------------------------------

    def wake(self, task_id: str) -> None:
        """Look at a task soon: it is new, or something about it has changed. Returns at once."""
        self._due[task_id] = None
        self._due_event.set()
        # Its deadline may be the next one.
        self._clock_event.set()

    def cut(self, task_id: str) -> None:
        """A task has lost its permission: close its source at once, then let both agents know. Returns at once.

        This goes past the queue of visits, so that agents which answer slowly, or not at all, hold nothing open.
        """
        if self._nursery is not None:
            self._nursery.start_soon(self._cut, task_id)
        self.wake(task_id)

    async def _cut(self, task_id: str) -> None:
        try:
            await self._courier.cut(task_id)
        except TowpathError as error:
            logger.info("The session of task %s is withdrawn again later: %s", task_id, error.sentence)
        except Exception:
            logger.exception("The session of task %s could not be withdrawn at once; a visit does it.", task_id)

    def tell_missing(self, node_id: str, ids: Sequence[str]) -> None:
        """Have an agent say to its owner that these collections are not this relay's any more, or not the agent's.
        Returns at once; an agent that is away hears of it at its next link."""
        if ids and self._nursery is not None:
            self._nursery.start_soon(self._tell_missing, node_id, MissingCollections(ids=list(ids)))

    async def _tell_missing(self, node_id: str, missing: MissingCollections) -> None:
        try:
            await self._links.call(node_id, "POST", "/link/collections/missing", document=missing)
        except TowpathError as error:
            # Older agents have no such route.
            logger.info("Node %s was not told of collections that are gone: %s", node_id, error.sentence)
        except Exception:
            logger.exception("Telling node %s of collections that are gone failed.", node_id)

    async def wait_finished(self, task_id: str, seconds: float) -> None:
        """Return when a task has ended, or after that time. The caller looks at the task itself."""
        event = self._finished.setdefault(task_id, trio.Event())
        with trio.move_on_after(seconds):
            await event.wait()
        if not event.is_set() and not event.statistics().tasks_waiting:
            self._finished.pop(task_id, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled. A fault in one task or agent is logged and tried again; it never ends the others."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._visit_due)
            nursery.start_soon(self._keep_clock)
            nursery.start_soon(self._progress.run)
            task_status.started()
            while True:
                async with self._links.changes() as changes:
                    async for change in changes:
                        self._leave(change.node_id)
                        if isinstance(change, LinkUp):
                            scope = self._attended[change.node_id] = trio.CancelScope()
                            nursery.start_soon(self._attend, change.hello, scope)
                        else:
                            nursery.start_soon(self._notice_absence, change.node_id)
                # We lagged behind: everybody who is there is announced again.
                for node_id in list(self._attended):
                    self._leave(node_id)

    # --- visits ----------------------------------------------------------------------------------------------

    async def _visit_due(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._due_event.wait()
                self._due_event = trio.Event()
                while self._due:
                    await self._limiter.acquire()
                    task_id = next(iter(self._due))
                    del self._due[task_id]
                    nursery.start_soon(self._visit, task_id)

    async def _visit(self, task_id: str) -> None:
        """One visit, holding one permit of the limiter, which is given back at the end."""
        if task_id in self._visiting:
            # One visit at a time; look again when that one is over.
            self._visiting[task_id] = True
            self._limiter.release()
            return
        self._visiting[task_id] = False
        failed = True
        try:
            self._visits += 1
            visit = await self._courier.visit(task_id, self._clock())
            failed = visit.failed is not None
            if visit.finished:
                self._announce_finished(task_id)
            if visit.failed is not None:
                logger.info("Task %s waits: %s (%s)", task_id, visit.failed.sentence, visit.failed.code)
        except TowpathError as error:
            logger.warning("Task %s cannot be delivered now: %s", task_id, error.sentence)
        except Exception:
            self._visit_failures += 1
            logger.exception("A visit to task %s failed; it is tried again.", task_id)
        finally:
            self._limiter.release()
            if self._visiting.pop(task_id):
                self.wake(task_id)
        if not failed:
            self._pauses.pop(task_id, None)
            self._retries.pop(task_id, None)
        else:
            pause = self._pauses.get(task_id, FIRST_PAUSE)
            self._pauses[task_id] = min(pause * 2, LONGEST_PAUSE)
            self._retries[task_id] = self._clock() + pause
            self._clock_event.set()

    def _announce_finished(self, task_id: str) -> None:
        event = self._finished.pop(task_id, None)
        if event is not None:
            event.set()

    # --- agents ----------------------------------------------------------------------------------------------

    def _leave(self, node_id: str) -> None:
        scope = self._attended.pop(node_id, None)
        if scope is not None:
            scope.cancel()

    async def _attend(self, hello: AgentHello, scope: trio.CancelScope) -> None:
        """Everything for one agent, from the moment its link is up until it is down, when ``scope`` is cancelled."""
        node_id = hello.node_id
        arrival: Arrival | None = None
        with scope:
            pause, rebooted = FIRST_PAUSE, False
            while True:
                started = self._clock()
                try:
                    arrival = await (self._greeted.ask(hello) if arrival is None else self._look_up(node_id))
                    if arrival is None:
                        logger.warning("Node %s is linked and was removed meanwhile.", node_id)
                        return
                    rebooted = rebooted or arrival.rebooted
                    arrival = await self._welcome(hello, arrival, rebooted=rebooted)
                    rebooted = False
                    await self._read_events(node_id, arrival.last_event)
                except TowpathError as error:
                    logger.info("The events of node %s: %s (%s)", node_id, error.sentence, error.code)
                except Exception:
                    logger.exception("Attending node %s failed; it is tried again.", node_id)
                self._stream_failures += 1
                if self._clock() - started > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                await trio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _greet(self, connection: Connection, hellos: Sequence[AgentHello]) -> list[Arrival | None]:
        now = self._clock()
        return arrivals.record(connection, hellos, now, now - self._keep)

    async def _look_up(self, node_id: str) -> Arrival | None:
        forgettable = self._clock() - self._keep
        found = await self._store.read(lambda connection: arrivals.look_up(connection, [node_id], forgettable))
        return found.get(node_id)

    async def _welcome(self, hello: AgentHello, arrival: Arrival, *, rebooted: bool) -> Arrival:
        """Stops first, before anything else is asked of the agent; then all that concerns it is looked at.

        What it runs and this relay does not know is taken over before its events are read.

        A new process is asked for each of its tasks: one that lost its state gets them again. Returns
        what holds for the agent after that.
        """
        node_id = hello.node_id
        self.tell_missing(node_id, arrival.missing)
        await self._stop(arrival)
        take_over = self._take_over if hello.tasks != 0 else None
        if take_over is not None and await take_over.look(node_id, self._clock()):
            arrival = await self._look_up(node_id) or arrival
            await self._stop(arrival)
        for destination, offer in self._signalling.missed(node_id):
            if self._nursery is not None:
                self._nursery.start_soon(self._introduce, destination, offer)
        for task_id, is_source in arrival.others:
            if is_source:
                self._courier.want_session(task_id)
            if rebooted:
                await self._courier.compare(task_id, node_id, self._clock())
            self.wake(task_id)
        return arrival

    async def _stop(self, arrival: Arrival) -> None:
        """Visit what an agent must stop."""
        for task_id in arrival.stopping:
            await self._limiter.acquire()
            await self._visit(task_id)

    async def _notice_absence(self, node_id: str) -> None:
        await trio.sleep(AWAY_BEFORE_NOTICE)
        if self._links.is_connected(node_id):
            return
        arrival = await self._look_up(node_id)
        for task_id, is_source in arrival.others if arrival is not None else ():
            if not is_source:
                self.wake(task_id)

    async def _read_events(self, node_id: str, after: int) -> None:
        if after:
            # What was stored but not acknowledged before a restart.
            await self._acknowledge(node_id, after)
        reader = LineReader()
        async with self._links.stream(node_id, "/link/events", query=[("after", str(after))]) as chunks:
            async for chunk in chunks:
                lines = reader.feed_untrusted(chunk)
                if lines:
                    await self._take_lines(node_id, lines)

    async def _take_lines(self, node_id: str, lines: list[AgentEvent]) -> None:
        self._lines += len(lines)
        kept = []
        for line in lines:
            if line.kind == "progress" and line.n == 0 and line.observed is not None:
                self._progress.take(node_id, line.task_id, line.observed)
            elif line.kind == "path_candidates" and line.n == 0:
                self._add_candidates_soon(node_id, line)
            else:
                kept.append(line)
                if line.kind == "state":
                    # What was said before counts no more.
                    self._progress.forget(node_id, line.task_id)
        if not kept:
            return
        now = self._clock()
        applied = await self._store.write(lambda connection: task_reports.apply_lines(connection, node_id, kept, now))
        self._dropped += applied.dropped
        for offer in applied.offers:
            if self._nursery is not None and self._signalling.admit(offer):
                self._nursery.start_soon(self._introduce, node_id, offer)
        self.tell_missing(node_id, applied.missing)
        for task_id in applied.unshared:
            self._announce_finished(task_id)
            self.cut(task_id)
        for task_id in applied.finished:
            self._announce_finished(task_id)
            self.wake(task_id)
        for task_id, generation in applied.wants_session.items():
            self._courier.want_session(task_id, generation)
            self.wake(task_id)
        if applied.last_event:
            self._acknowledge_soon(node_id, applied.last_event)

    def _acknowledge_soon(self, node_id: str, n: int) -> None:
        """Have an agent know what is stored, while its next lines are read already."""
        if node_id not in self._acknowledging and self._nursery is not None:
            self._nursery.start_soon(self._acknowledge_newest, node_id)
        self._acknowledging[node_id] = n

    async def _acknowledge_newest(self, node_id: str) -> None:
        told = 0
        try:
            while self._acknowledging[node_id] != told:
                told = self._acknowledging[node_id]
                await self._acknowledge(node_id, told)
        except TowpathError as error:
            # It is told again at its next link, or with its next line.
            logger.info("Lines of node %s could not be acknowledged: %s", node_id, error.sentence)
        except Exception:
            logger.exception("Acknowledging lines of node %s failed.", node_id)
        finally:
            del self._acknowledging[node_id]

    def _add_candidates_soon(self, node_id: str, line: AgentEvent) -> None:
        answer = line.candidates
        if answer is None or self._nursery is None:
            return
        if self._signalling.admit_candidates(node_id, line.task_id, answer):
            self._nursery.start_soon(self._add_candidates, node_id, line.task_id, answer)

    async def _add_candidates(self, node_id: str, task_id: str, answer: PathAnswer) -> None:
        """Pass on where else the source of a task can be reached, if ``node_id`` is its source."""
        try:
            worker = await self._courier.worker_of(task_id, node_id, answer.session_id, self._clock())
            if worker is None:
                self._dropped += 1
            else:
                await self._signalling.add_candidates(task_id, answer, worker)
        except TowpathError as error:
            logger.info("More addresses for task %s came to nothing: %s (%s)", task_id, error.sentence, error.code)
        except Exception:
            logger.exception("Passing on more addresses for task %s failed.", task_id)
        finally:
            self._signalling.done_candidates(task_id)

    async def _introduce(self, node_id: str, offer: PathOffer) -> None:
        """Let the two nodes of a running task arrange a path. What fails is asked for again by the destination."""
        try:
            found = await self._courier.source_of(offer.task_id, node_id, self._clock(), ended=offer.probe)
            if found is not None:
                source, task = found
                await self._signalling.introduce(offer, node_id, source, owner_id=task.owner_id)
        except TowpathError as error:
            if error.code == "NOT_FOUND" and not offer.probe:
                # The source has lost the session: it is ordered anew.
                self._courier.want_session(offer.task_id)
                self.wake(offer.task_id)
            logger.info("No path could be arranged for task %s: %s (%s)", offer.task_id, error.sentence, error.code)
        except Exception:
            logger.exception("Arranging a path for task %s failed.", offer.task_id)
        finally:
            self._signalling.done(offer)

    async def _acknowledge(self, node_id: str, n: int) -> None:
        await self._links.call(node_id, "POST", "/link/events/acknowledge", document={"n": n})

    # --- the clock -------------------------------------------------------------------------------------------

    def clock_was_set(self) -> None:
        """The wall clock has jumped: running tasks get new tickets, and what was put off until a time is due now."""
        self._clock_set = True
        self._retries = dict.fromkeys(self._retries, -math.inf)
        self._clock_event.set()

    async def _keep_clock(self) -> None:
        while True:
            self._clock_event = trio.Event()
            try:
                upcoming = await self._do_what_is_due()
            except TowpathError as error:
                logger.warning("Deadlines could not be looked at: %s", error.sentence)
                upcoming = math.inf
            with trio.move_on_after(max(0.0, min(CLOCK_INTERVAL, upcoming - self._clock()))):
                await self._clock_event.wait()
            # Many wake-ups in a row are one look.
            await trio.sleep(CLOCK_PAUSE)

    async def _do_what_is_due(self) -> float:
        """All that is due now; returns when the next thing will be."""
        now = self._clock()
        for task_id in [task_id for task_id, when in self._retries.items() if when <= now]:
            del self._retries[task_id]
            self._due[task_id] = None
            self._due_event.set()
        upcoming = await self._store.read(lambda connection: self._duties.next(connection, now))
        if upcoming <= now or self._clock_set:
            all_tickets, self._clock_set = self._clock_set, False
            try:
                done = await self._store.write(lambda c: self._duties.do(c, now, all_tickets=all_tickets))
            except BaseException:
                self._clock_set = self._clock_set or all_tickets
                raise
            self._duties.note(done)
            for task_id in done.cut:
                self.cut(task_id)
            for task_id in done.cut + done.changed:
                self._announce_finished(task_id)
                self._due[task_id] = None
            self._due_event.set()
        return min([upcoming, *self._retries.values()])
