"""Asks an agent that has just linked up for tasks that this database does not know, and takes them over.

There are some when the relay was restored from a backup (`relay.transfer.adoption` says what is believed of them).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from sqlalchemy import Connection

from protocol.control import FINAL_STATES, TaskList, TaskObserved, TaskOrder, decode_untrusted
from protocol.errors import AccessDenied, ItemFailed, ProtocolError
from protocol.ticket import TicketVerifier
from relay.store.database import Store
from relay.transfer import adoption
from relay.transfer.agents import AgentLinks

logger = logging.getLogger("relay.steward")

# An order comes back from an agent with all its items, in this many seconds more than other answers.
LARGE_ORDER = 60.0
# Tasks that one agent may show; more than any has.
MAX_LISTED = 20_000


class TakeOver:
    """``verifier`` knows this relay's own tickets again."""

    def __init__(self, store: Store, links: AgentLinks, verifier: TicketVerifier, *, timeout: float) -> None:
        self._store = store
        self._links = links
        self._verifier = verifier
        self._timeout = timeout

    async def look(self, node_id: str, now: float) -> int:
        """Take over the tasks that an agent drives and this database does not know, and remember the orders of which it
        does not know that they have left; how many.

        What nobody can show to be this relay's is stopped, and forgotten once it has stopped. Raises the link's
        passing errors, and `ProtocolError` for an agent that does not answer as one.
        """
        try:
            answer = await self._links.call(node_id, "GET", "/link/task-list", timeout=self._timeout)
        except ItemFailed:
            # An older agent has no such route.
            return 0
        listed = {task.task_id: task for task in decode_untrusted(answer, TaskList).tasks[:MAX_LISTED]}
        if not listed:
            return 0
        missing, behind = await self._store.read(lambda connection: adoption.differing(connection, listed))
        changed = 0
        for task_id in behind:
            changed += await self._store.write(_remembering(node_id, listed[task_id]))
        for task_id in missing:
            changed += await self._one(node_id, listed[task_id], now)
        return changed

    async def _one(self, node_id: str, observed: TaskObserved, now: float) -> bool:
        task_id = observed.task_id
        path = f"/link/tasks/{task_id}"
        try:
            answer = await self._links.call(node_id, "GET", f"{path}/order", timeout=self._timeout + LARGE_ORDER)
        except ItemFailed as error:
            # It has been forgotten in between.
            logger.info("Task %s of node %s is gone: %s", task_id, node_id, error.sentence)
            return False
        order = decode_untrusted(answer, TaskOrder)
        try:
            ticket = adoption.proof_untrusted(self._verifier, order, task_id, node_id)
            new = await self._store.write(
                lambda connection: adoption.adopt(connection, node_id, ticket, order, observed, now)
            )
        except (AccessDenied, ProtocolError) as error:
            logger.warning(
                "Node %s has task %s, which this relay neither knows nor can take over; it is stopped there. %s",
                node_id,
                task_id,
                error.sentence,
            )
            await self._stop(node_id, path, order, observed)
            return False
        if not new:
            return False
        logger.warning("Task %s was taken over from node %s: it is newer than this database.", task_id, node_id)
        return True

    async def _stop(self, node_id: str, path: str, order: TaskOrder, observed: TaskObserved) -> None:
        if observed.state in FINAL_STATES:
            await self._links.call(node_id, "DELETE", path, timeout=self._timeout)
        elif order.desired != "cancel":
            revision = max(order.revision, observed.revision) + 1
            stop = msgspec.structs.replace(order, revision=revision, desired="cancel", items=None, session=None)
            await self._links.call(node_id, "PUT", path, document=stop, timeout=self._timeout)


def _remembering(node_id: str, observed: TaskObserved) -> Callable[[Connection], bool]:
    return lambda connection: adoption.remember(connection, node_id, observed)
