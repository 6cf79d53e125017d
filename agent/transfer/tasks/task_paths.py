"""The connections of one running task: finds them (`agent.connect.finder`), and asks the relay where the source is."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from agent.connect.finder import PathFinder, either
from agent.connect.running_race import Subject
from agent.connect.transport import Connection, Path
from agent.transfer.basis.times import now_iso
from agent.transfer.tasks.local_node import LocalNode
from protocol.candidates import Arrangement, PathAnswer, PathGo, PathOffer
from protocol.control import AgentEvent, SessionAnswer, TaskOrder
from protocol.errors import RetryLater

ANSWER_TIMEOUT = 20.0
# How soon, and then how often, what is known of a source that does not answer is tried again meanwhile (seconds): one
# that is being started again may be there at any moment.
DIAL_AGAIN_FIRST, DIAL_AGAIN = 0.1, 1.0
# The relay is asked for a newer answer once in so many of these tries; it may just have been away.
ASK_EVERY = 5

_SENTENCES = {
    "direct": "Data goes directly from the source to this machine.",
    "reversed": "Data goes directly; the source dialled this machine.",
    "punched": "Data goes directly, through both sides' firewalls or NATs.",
    "quic": "Data goes directly over QUIC (UDP).",
    "tunnel": "Data goes through the relay, which cannot read it.",
}


class TaskPaths:
    """See the module. `run` must be running while `connect` is called."""

    def __init__(
        self,
        node: LocalNode,
        order: TaskOrder,
        answer: SessionAnswer | None,
        on_better: Callable[[Path], None],
        arranged: Arrangement | None = None,
    ) -> None:
        source = order.source
        assert source is not None  # deletes need no paths
        self._node = node
        self._order = order
        self._certificate = source.certificate
        self._answer = answer
        self._answered = trio.Event()
        self._generation = 0
        # A direct path is what everybody expects; only another one is worth an event.
        self._shown = "direct"
        options = order.options
        self._finder = PathFinder(
            node.network,
            Subject(
                session_id=order.session_id,
                task_id=order.task_id,
                own=source.node_id == node.node_id,
                relay=options.relay_path,
                transport=options.transport,
                lanes=node.config.limits.lanes,
            ),
            send_offer=self._send_offer,
            on_better=on_better,
            generation=self._next_generation,
        )
        if answer is not None:
            self._finder.take_answer(answer)
        if arranged is not None:
            self._finder.take_arrangement(arranged)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. A race begins at once, while the worker is still starting."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._finder.run)
            task_status.started()
            self._finder.begin()

    def take_answer(self, answer: SessionAnswer) -> None:
        """Where the source is now."""
        self._answer = answer
        self._finder.take_answer(answer)
        self._answered.set()
        self._answered = trio.Event()

    def take_go(self, go: PathGo) -> None:
        """The relay's go for an offer of this task."""
        self._finder.take_go(go)

    def take_candidates(self, answer: PathAnswer) -> None:
        """More addresses of the source's, for an offer of this task."""
        self._finder.take_candidates(answer)

    async def connect(self, *, begins: bool = False) -> tuple[Connection, str]:
        """A connection to the source, and the certificate to expect there; ``begins``: for a session that begins.
        Raises `RetryLater`.

        A source that does not answer may have moved: the relay knows where to, and is asked. Or it is being started
        again where it was, and perhaps the relay with it: so what is known is tried again now and then meanwhile, and
        at once when there is a link to the relay again, which this agent may have begun without.
        """
        first = self._answer
        deadline = trio.current_time() + ANSWER_TIMEOUT
        turns = 0
        while True:
            tried, linked = self._answer, self._node.network.linked
            if tried is not None:
                try:
                    # The certificate that came with the order and matches the ticket, whatever the answer says.
                    return await self._finder.connect(begins=begins), self._certificate
                except RetryLater:
                    if tried is not first and tried is self._answer:
                        raise
            if trio.current_time() >= deadline:
                break
            if turns % ASK_EVERY == 0:
                self._ask_for_answer(tried)
            pause = min(DIAL_AGAIN_FIRST * 2.0 ** min(turns, 16), DIAL_AGAIN)
            turns += 1
            with trio.move_on_after(pause):
                if self._answer is tried:
                    await either(self._answered, linked)
            if linked.is_set() and self._answer is tried:
                # What it was asked before may never have reached it.
                self._ask_for_answer(tried)
        reason = f" So far: {self._finder.why}." if self._finder.why else ""
        raise RetryLater(
            "The source endpoint is not connected to its relay, or the relay cannot be reached; the task goes on "
            f"when it is.{reason}",
            code="GC_NOT_CONNECTED",
            who="source owner",
        )

    def _ask_for_answer(self, old: SessionAnswer | None) -> None:
        generation = -1 if old is None else old.generation
        self._node.outbox.passing(
            AgentEvent(n=0, kind="session_wanted", time=now_iso(), task_id=self._order.task_id, generation=generation)
        )

    def _send_offer(self, offer: PathOffer) -> None:
        line = AgentEvent(n=0, kind="path_offer", time=now_iso(), task_id=self._order.task_id, offer=offer)
        self._node.outbox.passing(line)

    def _next_generation(self) -> int:
        self._generation = max(self._generation + 1, int(time.time() * 1000))
        return self._generation

    # --- for people ----------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The path in use, as far as one is."""
        return self._finder.path

    @property
    def text(self) -> str:
        """The path in use in one line, empty while there is none."""
        path = self._finder.path
        if path is None:
            return f"none: {self._finder.why}" if self._finder.why else ""
        trip = f", {path.rtt * 1000:.0f} ms" if path.rtt is not None else ""
        reason = self._finder.why if path.kind == "tunnel" else ""
        why = f" (no direct path: {reason})" if reason else ""
        carried = "over WebSocket" if path.transport == "websocket" else path.transport
        return f"{path.kind} {carried} {path.remote}{trip}{why}"

    def news(self) -> AgentEvent | None:
        """A line for people when the kind of path is another than at the last call."""
        path = self._finder.path
        if path is None or path.kind == self._shown:
            return None
        self._shown = path.kind
        return AgentEvent(
            n=0,
            kind="event",
            time=now_iso(),
            task_id=self._order.task_id,
            code="PATH_CHANGED",
            description=_SENTENCES.get(path.kind, "The path has changed."),
            details=self.text,
        )
