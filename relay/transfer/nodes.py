"""Nodes: the agents that have enrolled, and what they said of themselves when they last connected."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, select, update

from protocol.control import AgentHello, CollectionReport
from protocol.errors import ProtocolError
from protocol.names import format_path, parse_path_untrusted
from relay.store import transfer_tables as tables
from relay.store.database import Store

MAX_REPORTS = 1000
MAX_DIRECTORY = 4096


class DatabaseNodeDirectory:
    """Where links look up who may connect: node id to certificate."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def certificate_of(self, node_id: str) -> str | None:
        """The certificate (PEM) a node enrolled with, or None for an unknown node. Raises the store's errors."""
        node = tables.nodes.c

        def work(connection: Connection) -> str | None:
            return connection.execute(select(node.certificate).where(node.id == node_id)).scalar_one_or_none()

        return await self._store.read(work)


def paused(connection: Connection, ids: Iterable[str]) -> set[str]:
    """Which of these nodes were paused by their owners when they last connected."""
    node = tables.nodes.c
    return set(connection.execute(select(node.id).where(node.id.in_(sorted(ids)), node.paused)).scalars())


def last_event(connection: Connection, node_id: str) -> int:
    """The number of the last event of a node that is stored here."""
    node = tables.nodes.c
    return int(connection.execute(select(node.last_event).where(node.id == node_id)).scalar_one())


def record_hello(connection: Connection, hello: AgentHello, now: float) -> bool:
    """Store what a node says at link-up, and from where its events are wanted; returns whether it is a new process.

    When the agent's numbering ends before what is stored here (its state was restored or lost), everything it keeps is
    wanted again: events have ids of their own, so a repetition changes nothing.
    """
    node = tables.nodes.c
    row = connection.execute(select(node.journal, node.last_event).where(node.id == hello.node_id)).one()
    journal = hello.boot_id[:128]
    regressed = hello.last_event < row.last_event
    connection.execute(
        update(tables.nodes)
        .where(node.id == hello.node_id)
        .values(
            last_seen=now,
            version=hello.version[:64],
            paused=hello.paused,
            journal=journal,
            last_event=0 if regressed else row.last_event,
        )
    )
    record_reports(connection, hello.node_id, hello.collections)
    return regressed or bool(row.journal != journal)


def checked_home(text: str) -> str:
    """A home as an agent reports it, from the root of its collection. One that cannot be is the root: the agent knows
    no other either."""
    try:
        return format_path(parse_path_untrusted(text))
    except ProtocolError:
        return "/"


def record_reports(connection: Connection, node_id: str, reports: list[CollectionReport]) -> None:
    """Store what the owner's configuration says of a node's collections.

    Only collections that the relay itself has given to this node are touched; those the agent no longer names are
    not available.
    """
    collection = tables.collections.c
    named = {report.id: report for report in reports[:MAX_REPORTS]}
    mine = connection.execute(select(collection.id).where(collection.node_id == node_id)).scalars().all()
    for collection_id in mine:
        report = named.get(collection_id)
        values = (
            {"available": False}
            if report is None
            else {
                "available": report.available,
                "read_only": report.read_only,
                "shareable": report.shareable,
                "reported_directory": report.default_directory[:MAX_DIRECTORY],
                "home": checked_home(report.home),
            }
        )
        connection.execute(update(tables.collections).where(collection.id == collection_id).values(**values))
