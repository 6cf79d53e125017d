"""Sessions served from here: finds the order for an incoming connection and hands the socket to its worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from functools import partial

import trio

from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.processes.channel import Channel, ChannelClosed, Incoming, Moved, ServeSession
from agent.transfer.stalls.worker_watch import until_lost
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.tasks.worker_connections import allow
from protocol.control import SessionOrder
from protocol.errors import RetryLater, TowpathError

logger = logging.getLogger("towpath.tasks")

MAX_SESSIONS = 256
# Seconds for which a session that was announced has its place kept, while its destination has not come yet.
PLACE_KEPT = 60.0
# The relay tells both sides of a task at once. A connection that comes before its session waits so long (seconds), and
# so many of them may.
EARLY_PATIENCE, MAX_EARLY = 2.0, 32


class _Served:
    """One session's worker; sockets wait here until the process is up."""

    def __init__(self, collection_id: str) -> None:
        self.collection_id = collection_id
        self.scope = trio.CancelScope()
        self.channel: Channel | None = None
        self.ready = trio.Event()


def _no_limit() -> int | None:
    """A task's own limit is kept by its destination."""
    return None


class ServedSessions:
    """Workers of sessions whose source is this node. A worker starts with the first connection and ends when idle."""

    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._served: dict[str, _Served] = {}
        # Sessions whose destination may come at any moment: their collection, and until when (trio's clock).
        self._expected: dict[str, tuple[str, float]] = {}
        # Connections that have come for a session before the relay has ordered it.
        self._early = 0
        self._announced = trio.Event()
        # How many sessions were withdrawn, whether or not they were served.
        self._cuts = 0
        self.nursery: trio.Nursery
        self.refused = 0

    @property
    def count(self) -> int:
        """How many workers serve now."""
        return len(self._served)

    async def deliver(self, session_id: str, kind: str, sock: trio.socket.SocketType) -> None:
        """Hand a connection to its session's worker; unknown and forbidden sessions are simply closed."""
        for _ in range(2):
            # Looked at anew each time: what ended the worker may have been that the session was withdrawn.
            served = await self._admitted(session_id)
            if served is None:
                return
            await served.ready.wait()
            if served.channel is None:
                continue
            try:
                await served.channel.send(Incoming(kind=kind, descriptors=1), (sock.fileno(),))
            except ChannelClosed:
                if self._served.get(session_id) is served:
                    del self._served[session_id]
                continue
            if kind == "lane":
                self._node.lane_begun.set()
            return

    async def _admitted(self, session_id: str) -> _Served | None:
        """The worker of a session that may be served now; None, counted as refused, for every other one."""
        while True:
            cuts = self._cuts
            try:
                order = await self._ordered(session_id)
            except StateTrouble as error:
                # Whoever has the session comes again.
                logger.warning("A connection could not be served: %s", error.sentence)
                order = None
            if order is None:
                self.refused += 1
                return None
            if cuts == self._cuts:
                break
            # Something was cut while a thread read the order, perhaps this session, and then it has none by now.
        try:
            # Checked anew for every connection: policy and ticket may have changed since the session was announced.
            self._node.policy.check_operation("sessions")
            ticket = self._node.check_session(order, time.time())
        except TowpathError:
            self.refused += 1
            return None
        return self._worker_of(order, ticket.source.collection_id if ticket.source else "")

    async def _ordered(self, session_id: str) -> SessionOrder | None:
        """The order of a session, which may be about to come."""
        waits = False
        try:
            with trio.move_on_after(EARLY_PATIENCE):
                while True:
                    announced = self._announced
                    order = await trio.to_thread.run_sync(self._node.store.session, session_id)
                    if order is not None or (not waits and self._early >= MAX_EARLY):
                        return order
                    if not waits:
                        waits, self._early = True, self._early + 1
                    await announced.wait()
        finally:
            self._early -= waits
        return None

    def announce(self) -> None:
        """The relay has ordered a session: who came early for it is served now."""
        self._announced.set()
        self._announced = trio.Event()

    def _worker_of(self, order: SessionOrder, collection_id: str) -> _Served | None:
        served = self._served.get(order.session_id)
        if served is None:
            # Looked at in the same step as the place is taken: of those that come at once, no more get in than may.
            if len(self._served) >= MAX_SESSIONS or not self._has_room(order.session_id, collection_id):
                self.refused += 1
                return None
            served = self._served[order.session_id] = _Served(collection_id)
            self.nursery.start_soon(self._serve, order, served)
        return served

    async def _serve(self, order: SessionOrder, served: _Served) -> None:
        allotment = self._node.allotment
        allowance = allotment.begin("send", _no_limit)
        start = ServeSession(
            common=self._node.common(),
            session_id=order.session_id,
            task_id=order.task_id,
            peer_certificate=order.peer.certificate,
            ticket=order.ticket,
            rate=allowance.rate,
            cpu=allowance.cpu,
        )
        try:
            with served.scope:
                async with self._node.workers.worker(start) as channel, trio.open_nursery() as nursery:
                    served.channel = channel
                    served.ready.set()
                    nursery.start_soon(self._look_after, order.session_id, channel)
                    with allotment.worker("send", _no_limit, allowance, partial(allow, channel)) as worker:
                        while True:
                            message, _ = await channel.receive()
                            if isinstance(message, Moved):
                                worker.note(message.content, message.waited)
        except* (ChannelClosed, OSError):
            # The worker ended, idle or by a crash; the next connection starts another.
            served.channel = None
        finally:
            served.channel = None
            served.ready.set()
            if self._served.get(order.session_id) is served:
                del self._served[order.session_id]
                self._expected.pop(order.session_id, None)

    async def _look_after(self, session_id: str, channel: Channel) -> None:
        """End a worker that stands still: what it read is read again by the next one. The destination notices that
        nothing answers, and comes again."""

        said = ""

        async def tell(error: TowpathError) -> None:
            nonlocal said
            if error.sentence != said:
                said = error.sentence
                logger.warning("Session %s: %s", session_id, said)

        await tell(await until_lost(channel, tell))
        self.cut(session_id)

    def check_room(self, session_id: str, collection_id: str) -> None:
        """Whether the owner's limit leaves room for one more session on a collection; it has a place for a while then.

        Raises `RetryLater`.
        """
        now = trio.current_time()
        self._expected = {key: row for key, row in self._expected.items() if row[1] > now}
        if self._has_room(session_id, collection_id, expected=True):
            self._expected[session_id] = (collection_id, now + PLACE_KEPT)
        else:
            raise RetryLater(
                "The source serves as many sessions on this collection as its owner allows; it goes on later.",
                code="SOURCE_BUSY",
                subject=collection_id,
            )

    def _has_room(self, session_id: str, collection_id: str, *, expected: bool = False) -> bool:
        others = {key for key, served in self._served.items() if served.collection_id == collection_id}
        if expected:
            others |= {key for key, (wanted, _) in self._expected.items() if wanted == collection_id}
        return self._node.policy.has_room(collection_id, len(others - {session_id}))

    def cut(self, session_id: str) -> None:
        """End a session's worker now, whatever it is doing. Its order is gone from the store, or its collection's owner
        has said no: whoever is about to be handed over is looked at again."""
        self._cuts += 1
        served = self._served.pop(session_id, None)
        self._expected.pop(session_id, None)
        if served is not None:
            served.scope.cancel()

    def cut_collections(self, collection_ids: Collection[str]) -> None:
        """End the workers of all sessions on these collections; each connection after that is checked anew."""
        for session_id, served in list(self._served.items()):
            if served.collection_id in collection_ids:
                self.cut(session_id)
