"""Nodes: the agents that have enrolled, and what they said of themselves when they last connected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, select, update

from protocol.control import AgentHello, CollectionReport
from protocol.errors import ProtocolError
from protocol.names import format_path, parse_path_untrusted
from relay.store import transfer_tables as tables
from relay.store.batch import Batch
from relay.store.database import Store
from relay.transfer.fields import is_uuid

MAX_REPORTS = 1000
MAX_DIRECTORY = 4096


class DatabaseNodeDirectory:
    """Where links look up who may connect: node id to certificate."""

    def __init__(self, store: Store) -> None:
        self._certificates: Batch[str, str | None] = Batch(store.read, certificates)

    async def certificate_of(self, node_id: str) -> str | None:
        """The certificate (PEM) a node enrolled with, or None for a node that is unknown or revoked.

        Raises the store's errors."""
        return await self._certificates.ask(node_id)


def certificates(connection: Connection, node_ids: Sequence[str]) -> list[str | None]:
    """The certificates (PEM) of these nodes, None for unknown and revoked ones."""
    node = tables.nodes.c
    wanted = select(node.id, node.certificate).where(node.id.in_(node_ids), node.revoked.is_(None))
    found = {row.id: row.certificate for row in connection.execute(wanted)}
    return [found.get(node_id) for node_id in node_ids]


def paused(connection: Connection, ids: Iterable[str]) -> set[str]:
    """Which of these nodes were paused by their owners when they last connected."""
    node = tables.nodes.c
    return set(connection.execute(select(node.id).where(node.id.in_(sorted(ids)), node.paused)).scalars())


def record_hellos(connection: Connection, hellos: Iterable[AgentHello], now: float) -> tuple[dict[str, bool], Recorded]:
    """Store what nodes say at link-up, and from where their events are wanted; for each node that is known, whether it
    is a new process, and what came of its collections. Of several hellos of one node the last one counts.

    When an agent's numbering ends before what is stored here (its state was restored or lost), everything it keeps is
    wanted again: events have ids of their own, so a repetition changes nothing.
    """
    said = {hello.node_id: hello for hello in hellos}
    node = tables.nodes.c
    rows = connection.execute(select(node.id, node.journal, node.last_event).where(node.id.in_(said))).all()
    greeted: dict[str, bool] = {}
    changes = []
    for row in rows:
        hello = said[row.id]
        journal = hello.boot_id[:128]
        regressed = hello.last_event < row.last_event
        greeted[row.id] = regressed or row.journal != journal
        changes.append(
            {
                "node": row.id,
                "last_seen": now,
                "version": hello.version[:64],
                "paused": hello.paused,
                "journal": journal,
                "last_event": 0 if regressed else row.last_event,
            }
        )
    if changes:
        names = ("last_seen", "version", "paused", "journal", "last_event")
        statement = update(tables.nodes).where(node.id == bindparam("node"))
        connection.execute(statement.values({name: bindparam(name) for name in names}), changes)
    return greeted, record_reports(connection, {node_id: said[node_id].collections for node_id in greeted})


def of_collection(connection: Connection, collection_id: str) -> str | None:
    """The node that serves a collection, None as long as there is none."""
    column = tables.collections.c
    return connection.execute(select(column.node_id).where(column.id == collection_id)).scalar_one_or_none()


def has_lines_to_come(connection: Connection, hello: AgentHello) -> bool:
    """Whether the agent that came with this hello kept lines then which are not stored yet."""
    node = tables.nodes.c
    stored = connection.execute(select(node.last_event).where(node.id == hello.node_id)).scalar_one_or_none()
    return stored is not None and stored < hello.last_event


def checked_home(text: str) -> str:
    """A home as an agent reports it, from the root of its collection. One that cannot be is the root: the agent knows
    no other either."""
    try:
        return format_path(parse_path_untrusted(text))
    except ProtocolError:
        return "/"


@dataclass(frozen=True)
class Recorded:
    """What came of reports: ids of collections that are shared no longer, and of those that nodes have named and that
    are not theirs, or were deleted, by node."""

    unshared: list[str]
    missing: dict[str, list[str]]


def record_reports(connection: Connection, reports: Mapping[str, list[CollectionReport]]) -> Recorded:
    """Store what the owners' configurations say of the collections of some nodes, by node.

    Only collections that the relay itself has given to a node are touched; those its agent no longer names are not
    available.
    """
    unshared = []
    collection = tables.collections.c
    named = {node_id: {report.id: report for report in mine[:MAX_REPORTS]} for node_id, mine in reports.items()}
    missing = {node_id: set(filter(is_uuid, mine)) for node_id, mine in named.items()}
    stored = select(collection.id, collection.node_id, collection.deleted, *(collection[name] for name in _REPORTED))
    for row in connection.execute(stored.where(collection.node_id.in_(named))).all():
        if row.deleted is None:
            missing[row.node_id].discard(row.id)
        values = _reported(named[row.node_id].get(row.id))
        changed = {name: value for name, value in values.items() if row._mapping[name] != value}
        if changed:
            connection.execute(update(tables.collections).where(collection.id == row.id).values(**changed))
        if changed.get("shareable") is False:
            unshared.append(row.id)
    return Recorded(unshared, {node_id: sorted(mine) for node_id, mine in missing.items() if mine})


_REPORTED = ("available", "read_only", "shareable", "reported_directory", "home")


def _reported(report: CollectionReport | None) -> dict[str, object]:
    if report is None:
        return {"available": False}
    return {
        "available": report.available,
        "read_only": report.read_only,
        "shareable": report.shareable,
        "reported_directory": report.default_directory[:MAX_DIRECTORY],
        "home": checked_home(report.home),
    }
