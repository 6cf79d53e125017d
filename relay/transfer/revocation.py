"""Agents that the operator has revoked, because their machine was lost: nothing more comes from them or goes to them.

Revoking is one mark on the node, set by a process of its own. From then on links are refused and no ticket is signed
(`relay.transfer.nodes`, `relay.transfer.parties`); the running relay finds the mark when it looks, and ends the rest.
"""

from __future__ import annotations

from sqlalchemy import Connection, Select, select, update

from relay.store import transfer_tables as tables
from relay.transfer import collections, task_turns


def revoke(connection: Connection, node_id: str, now: float) -> bool:
    """Mark a node; False when it is unknown or was revoked before."""
    node = tables.nodes.c
    this = update(tables.nodes).where(node.id == node_id, node.revoked.is_(None)).values(revoked=now)
    return connection.execute(this).rowcount == 1


def changed(connection: Connection) -> bool:
    """Whether `follow` has anything to do."""
    return connection.execute(_served().limit(1)).first() is not None


def follow(connection: Connection, now: float) -> list[str]:
    """End the active tasks of revoked agents and take their collections off them, which wait for another machine then;
    returns the ids of those tasks, whose sessions are to be cut."""
    ended: list[str] = []
    for row in connection.execute(_served()).all():
        reason = f"The machine that offered “{row.display_name}” was revoked by the relay's operator."
        ended += task_turns.end_all_on(connection, row.id, reason, now)
        collections.change(connection, row.id, {"node_id": None, "endpoint_id": None, "available": False})
    return ended


def revoked(connection: Connection) -> set[str]:
    """The ids of all revoked nodes."""
    node = tables.nodes.c
    return set(connection.execute(select(node.id).where(node.revoked.is_not(None))).scalars())


def _served() -> Select[tuple[str, str]]:
    collection, node = tables.collections.c, tables.nodes.c
    return (
        select(collection.id, collection.display_name)
        .join(tables.nodes, node.id == collection.node_id)
        .where(node.revoked.is_not(None))
    )
