"""Tasks that an agent knows and this database does not, because it was restored from a backup older than they are.

The agent shows the order it was given, and the ticket in it says that this relay gave it: it is signed for this task,
these nodes, these folders, and for one owner. So no agent can invent a task, give one to somebody else, or widen it.
What the owner may do is decided by the rules of today, as for every other task.
"""

from __future__ import annotations

import contextlib
import hmac
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection

from protocol.control import FINAL_STATES, TaskObserved, TaskOrder
from protocol.errors import AccessDenied, ProtocolError
from protocol.ticket import Ticket, TicketVerifier, owner_digest
from relay import times
from relay.auth import identities
from relay.refusal import ApiError
from relay.transfer import event_log, task_reports, task_rows
from relay.transfer.collections import load_many
from relay.transfer.event_log import TaskEvent
from relay.transfer.submission import MAX_LABEL, changed_folders
from relay.transfer.task_rows import Scope, Task

RESTORED = "RELAY_RESTORED"
_SENTENCE = (
    "The relay was restored from a backup that is older than this task. It was taken over from the agent, which "
    "kept it running; settings that only the relay knew (notifications, base paths) are lost."
)


def differing(connection: Connection, shown: Mapping[str, TaskObserved]) -> tuple[list[str], list[str]]:
    """Of the tasks that an agent shows: those that this database has never heard of, and those of which it does not
    remember that their order has left, or thinks that they are over."""
    known = task_rows.load_many(connection, shown)
    unknown = [task_id for task_id in shown if task_id not in known]
    return unknown, [task_id for task_id, task in known.items() if _is_behind(task, shown[task_id])]


def _is_behind(task: Task, observed: TaskObserved) -> bool:
    return not task.attempted or (task.finished and observed.state not in FINAL_STATES and task.desired != "cancel")


def remember(connection: Connection, node_id: str, observed: TaskObserved) -> bool:
    """Note what an agent shows to be so of a task that it drives: it has the order. A task that is over here is stopped
    there. Whether anything had to be done."""
    task = task_rows.load(connection, observed.task_id)
    if task is None or not _is_behind(task, observed):
        return False
    worker = load_many(connection, [task.worker_id]).get(task.worker_id)
    if worker is None or worker.node_id != node_id:
        return False
    values: dict[str, object] = {"attempted": True}
    if task.finished:
        revision = max(task.revision, observed.revision) + 1
        values |= {"desired": "cancel", "revision": revision, "closed": False}
    task_rows.change(connection, task.id, **values)
    return True


def proof_untrusted(verifier: TicketVerifier, order: TaskOrder, task_id: str, node_id: str) -> Ticket:
    """The ticket that shows that this relay gave this order to this node. Raises only `ProtocolError`."""
    ticket = verifier.at_any_time_untrusted(order.ticket)
    right = (
        order.task_id == task_id == ticket.task_id
        and ticket.session_id == order.session_id
        and ticket.destination.node_id == node_id
        and (ticket.source is not None) == (order.type == "TRANSFER")
        and hmac.compare_digest(ticket.owner_digest, owner_digest(task_id, order.owner_id))
    )
    if not right:
        raise ProtocolError("The agent shows no ticket of this relay for the task it names.", subject=task_id)
    return ticket


def adopt(
    connection: Connection, node_id: str, ticket: Ticket, order: TaskOrder, observed: TaskObserved, now: float
) -> bool:
    """Take a task over as its agent has it; False when somebody has done so meanwhile.

    Raises `AccessDenied` when its owner or one of its collections is not known here.
    """
    if task_rows.load(connection, order.task_id) is not None:
        return False
    places = [grant.collection_id for grant in (ticket.source, ticket.destination) if grant is not None]
    known = load_many(connection, places)
    owner = identities.select_by_ids(connection, [order.owner_id]).get(order.owner_id)
    if len(known) < len(set(places)) or known[ticket.destination.collection_id].node_id != node_id or owner is None:
        raise AccessDenied("The task's owner or one of its collections is not known here.", subject=order.task_id)
    items = order.items or []
    scope = Scope(
        ticket.source.paths if ticket.source is not None else [],
        ticket.destination.paths,
        changed_folders(order.type, order.options, items),
    )
    try:
        packed = task_rows.pack_items(items)
    except ApiError as error:
        raise AccessDenied(error.message, subject=order.task_id) from error
    values = _row_of(ticket, order, observed, owner, places, now)
    task_rows.insert_task(connection, values, packed, scope)
    event_log.add(connection, order.task_id, TaskEvent(code=RESTORED, description=_SENTENCE, time=now))
    task = task_rows.load(connection, order.task_id)
    assert task is not None
    # Nobody knows here when it started: what its agent tells of it comes after.
    task_reports.store_observed(connection, task, observed, task.requested)
    if observed.state in FINAL_STATES:
        current = task_rows.load(connection, order.task_id)
        assert current is not None
        task_reports.conclude(connection, current, observed, now)
    return True


def _row_of(
    ticket: Ticket, order: TaskOrder, observed: TaskObserved, owner: identities.Identity, places: list[str], now: float
) -> dict[str, Any]:
    """The task as the database would have it, had it never been restored."""
    revision = max(order.revision, observed.revision)
    return {
        "id": order.task_id,
        "owner_id": owner.id,
        "owner": owner.username,
        # The one it was submitted with is not known any more.
        "submission_id": str(uuid.uuid4()),
        "type": order.type,
        "label": order.label[:MAX_LABEL] or None,
        "requested": min(ticket.issued, now),
        "deadline": _moment(order.deadline),
        "source_id": places[0],
        "destination_id": places[1] if ticket.source is not None else None,
        "status": "ACTIVE",
        "state": "QUEUED",
        "options": msgspec.json.encode(order.options).decode(),
        "submitted": "{}",
        "item_count": len(order.items or []),
        "hidden": False,
        "desired": order.desired,
        "revision": revision,
        "delivered": revision,
        "attempted": True,
        "cancel_time": now if order.desired == "cancel" else None,
        "last_seq": 0,
        "session_id": order.session_id,
        "session_open": ticket.source is not None,
        "ticket_issued": ticket.issued,
        "closed": False,
    }


def _moment(text: str | None) -> float | None:
    with contextlib.suppress(ValueError, TypeError):
        return None if text is None else times.parse(text)
    return None
