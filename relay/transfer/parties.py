"""The two sides of a task: collections with the nodes that serve them, and the tickets that let them work together."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, select

from protocol.control import Party
from protocol.ticket import Grant, Ticket, TicketSigner, owner_digest
from relay.store import transfer_tables as tables
from relay.transfer.entitlement import Entitlement
from relay.transfer.task_rows import Scope, Task

# Raised when a whole policy changes at once; single permissions are withdrawn by ending their tasks.
POLICY_EPOCH = 0


@dataclass(frozen=True)
class Side:
    """One collection and the node behind it."""

    node_id: str
    fingerprint: str
    party: Party

    def grant(self, paths: list[str], access: Literal["r", "rw"], reach: list[str] | None) -> Grant:
        return Grant(
            node_id=self.node_id,
            fingerprint=self.fingerprint,
            collection_id=self.party.collection_id,
            paths=paths,
            access=access,
            reach=reach,
        )


@dataclass(frozen=True)
class Sides:
    """Who takes part in a task; None for a side that no agent serves yet. Deletes have no source."""

    source: Side | None
    worker: Side | None


def load_sides(connection: Connection, task: Task) -> Sides:
    """The sides of a task as they are now."""
    collection, nodes = tables.collections.c, tables.nodes.c
    # Without the rules on them, of which there may be a thousand.
    columns = collection.id, collection.node_id, collection.endpoint_id, collection.display_name
    rows = connection.execute(select(*columns).where(collection.id.in_([task.source_id, task.worker_id])))
    known = {row.id: row for row in rows}
    wanted = sorted({row.node_id for row in known.values() if row.node_id is not None})
    # A revoked one gets no ticket and is named in none, also where its collections were not taken off it yet.
    living = select(nodes.id, nodes.certificate, nodes.fingerprint).where(nodes.id.in_(wanted), nodes.revoked.is_(None))
    certificates = {row.id: (row.certificate, row.fingerprint) for row in connection.execute(living)}
    return Sides(
        source=None if task.destination_id is None else _side(known.get(task.source_id), certificates),
        worker=_side(known.get(task.worker_id), certificates),
    )


def _side(collection: Any, certificates: Mapping[str, tuple[str, str]]) -> Side | None:
    if collection is None or collection.node_id is None or collection.endpoint_id is None:
        return None
    if collection.node_id not in certificates:
        return None
    certificate, fingerprint = certificates[collection.node_id]
    party = Party(
        endpoint_id=collection.endpoint_id,
        node_id=collection.node_id,
        collection_id=collection.id,
        certificate=certificate,
        display_name=collection.display_name,
    )
    return Side(collection.node_id, fingerprint, party)


def sign_ticket(
    signer: TicketSigner,
    task: Task,
    worker: Side,
    source: Side | None,
    scope: Scope,
    entitlement: Entitlement,
    *,
    now: float,
    life: float,
) -> str:
    """A ticket for one task: these two nodes, read here and write there, these paths, until ``now + life``."""
    ticket = Ticket(
        relay_id=signer.relay_id,
        ticket_id=str(uuid.uuid4()),
        session_id=task.session_id,
        task_id=task.id,
        source=None if source is None else source.grant(scope.source, "r", entitlement.source_reach),
        destination=worker.grant(scope.destination, "rw", entitlement.destination_reach),
        policy_epoch=POLICY_EPOCH,
        issued=now,
        expires=now + life,
        owner_digest=owner_digest(task.id, task.owner_id),
    )
    return signer.sign(ticket)
