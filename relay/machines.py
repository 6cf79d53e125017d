"""What the operator does about machines: which agents and collections there are, revoking a lost one, putting
another in its place, and roles on collections. Used by the command line.

Each function returns work for a `Store`; nothing here is reachable over the network.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, select

from relay.accounts import Refused, find_identity, listing
from relay.auth.identities import select_by_ids
from relay.refusal import ApiError
from relay.settings import Settings
from relay.store import transfer_tables as tables
from relay.store.database import Store
from relay.times import iso
from relay.tls import ca_fingerprint
from relay.transfer import collections, revocation, roles, setup_keys, task_turns


@dataclass(frozen=True)
class Revoked:
    """An agent that was revoked, and the collections that wait for another machine now."""

    node_id: str
    hostname: str
    collections: tuple[tuple[str, str], ...]


def listing_agents(settings: Settings, who: str | None) -> Callable[[Store], Awaitable[list[dict[str, Any]]]]:
    """All agents, or those of one person, the one that was linked last in front."""
    return listing(settings, who, _agents)


def _agents(connection: Connection, owner_id: str | None) -> list[dict[str, Any]]:
    node, endpoint = tables.nodes.c, tables.endpoints.c
    query = (
        select(
            node.id,
            node.hostname,
            node.version,
            node.created,
            node.last_seen,
            node.paused,
            node.revoked,
            endpoint.id.label("endpoint_id"),
            endpoint.owner_id,
        )
        .join(tables.endpoints, endpoint.id == node.endpoint_id)
        .order_by(node.last_seen.desc().nulls_last(), node.id)
    )
    if owner_id is not None:
        query = query.where(endpoint.owner_id == owner_id)
    rows = connection.execute(query).all()
    owners = select_by_ids(connection, {row.owner_id for row in rows})
    offered: dict[str, list[str]] = {}
    collection = tables.collections.c
    served = select(collection.node_id, collection.display_name).where(
        collection.node_id.is_not(None), collection.deleted.is_(None)
    )
    for row in connection.execute(served):
        offered.setdefault(row.node_id, []).append(row.display_name)
    return [
        {
            "node_id": row.id,
            "endpoint_id": row.endpoint_id,
            "owner": owners[row.owner_id].username if row.owner_id in owners else None,
            "hostname": row.hostname,
            "version": row.version,
            "state": "revoked" if row.revoked is not None else "paused" if row.paused else "enrolled",
            "enrolled": iso(row.created),
            "last_linked": iso(row.last_seen),
            "collections": offered.get(row.id, []),
        }
        for row in rows
    ]


def revoking(wanted: str) -> Callable[[Store], Awaitable[Revoked]]:
    """Revoke an agent, named by its own id, its endpoint's or that of a collection it offers. The work raises `Refused`
    for one that is unknown or was revoked before."""
    now = time.time()

    def work(connection: Connection) -> Revoked:
        node, collection = tables.nodes.c, tables.collections.c
        by_collection = select(collection.node_id).where(collection.id == wanted)
        named = (node.id == wanted) | (node.endpoint_id == wanted) | node.id.in_(by_collection)
        rows = connection.execute(select(node.id, node.hostname).where(named)).all()
        if len(rows) != 1:
            raise Refused(f"There is no agent {wanted!r}; `towpath-relay agent list` shows all.")
        (row,) = rows
        if not revocation.revoke(connection, row.id, now):
            raise Refused(f"The agent {row.id} is revoked already.")
        offered = select(collection.id, collection.display_name).where(
            collection.node_id == row.id, collection.deleted.is_(None)
        )
        return Revoked(row.id, row.hostname, tuple((one.id, one.display_name) for one in connection.execute(offered)))

    return lambda store: store.write(work)


def listing_collections(settings: Settings, who: str | None) -> Callable[[Store], Awaitable[list[dict[str, Any]]]]:
    """The collections that were not deleted, all or those of one person, by name."""
    return listing(settings, who, _collections)


def _collections(connection: Connection, owner_id: str | None) -> list[dict[str, Any]]:
    collection = tables.collections.c
    wanted: ColumnElement[bool] = collection.deleted.is_(None)
    if owner_id is not None:
        wanted &= collection.owner_id == owner_id
    query = select(tables.collections).where(wanted).order_by(collection.display_name, collection.id)
    rows = connection.execute(query).all()
    owners = select_by_ids(connection, {row.owner_id for row in rows})
    return [
        {
            "collection_id": row.id,
            "name": row.display_name,
            "owner": owners[row.owner_id].username if row.owner_id in owners else None,
            "node_id": row.node_id,
            "read_only": row.read_only,
            "public": row.public,
            "created": iso(row.created),
        }
        for row in rows
    ]


def granting(wanted: str, who: str, role: str, settings: Settings) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Give somebody a role on a collection, as its owner could. The work raises `Refused` for what it does not know and
    for a role that was given before."""
    now = time.time()

    async def work(store: Store) -> dict[str, Any]:
        identity = await find_identity(store, settings, who)

        def give(connection: Connection) -> dict[str, Any]:
            row = _one_collection(connection, wanted)
            collection = collections.load(connection, row.id)
            assert collection is not None
            roles.grant(connection, collection, identity.id, role, now)
            return {"collection_id": row.id, "name": row.display_name, "username": identity.username, "role": role}

        try:
            return await store.write(give)
        except ApiError as error:
            raise Refused(error.message) from error

    return work


def removing(wanted: str) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Remove a collection that no agent serves: one that was made by mistake, or whose machine was revoked. What waits
    for it ends. The work raises `Refused` while an agent serves it."""
    now = time.time()

    def work(connection: Connection) -> dict[str, Any]:
        row = _one_unserved(connection, wanted, " Its owner removes it with `towpath endpoint delete`.")
        collections.mark_deleted(connection, row.id, now)
        reason = f"The collection “{row.display_name}” was removed by the relay's operator."
        ended = task_turns.end_all_on(connection, row.id, reason, now)
        return {"collection_id": row.id, "name": row.display_name, "tasks_ended": ended}

    return lambda store: store.write(work)


def namesakes(made: dict[str, Any]) -> Callable[[Store], Awaitable[list[str]]]:
    """Ids of the other collections that the owner of a new one gave the same name."""

    def work(connection: Connection) -> list[str]:
        collection = tables.collections.c
        same = (collection.owner_id == made["owner_id"]) & (collection.display_name == made["name"])
        other = collection.deleted.is_(None) & (collection.id != made["collection_id"])
        return list(connection.execute(select(collection.id).where(same & other)).scalars())

    return lambda store: store.read(work)


def _one_collection(connection: Connection, wanted: str) -> Row[Any]:
    """The collection of an id, or of a name that only one has. Raises `Refused`."""
    collection = tables.collections.c
    there = select(tables.collections).where(collection.deleted.is_(None))
    rows = connection.execute(there.where(collection.id == wanted)).all()
    rows = rows or connection.execute(there.where(collection.display_name == wanted).limit(20)).all()
    if not rows:
        raise Refused(f"There is no collection {wanted!r}; `towpath-relay collection list` shows all.")
    if len(rows) > 1:
        raise Refused(f"Several collections are called {wanted!r}: write the id, {', '.join(row.id for row in rows)}.")
    return rows[0]


def _one_unserved(connection: Connection, wanted: str, advice: str = "") -> Row[Any]:
    """The same, of a collection that no agent serves. Raises `Refused`; ``advice`` is told where one does."""
    row = _one_collection(connection, wanted)
    if row.node_id is not None and row.node_id in revocation.revoked(connection):
        # Not here: the relay that runs has to cut the sessions of its tasks as well.
        raise Refused(
            f"The agent {row.node_id} is revoked, and the running relay takes the collection off it within a minute: "
            "ask again then."
        )
    if row.node_id is not None:
        raise Refused(
            f"The agent {row.node_id} serves this collection.{advice} If its machine is lost, revoke it with "
            "`towpath-relay agent revoke`; the running relay takes the collection off it within a minute."
        )
    return row


def replacing(
    settings: Settings, wanted: str, *, now: float | None = None
) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """A new setup key for a collection that no agent serves: its first one got lost, or its machine was revoked. Roles,
    rules and bookmarks stay as they are. The work raises `Refused` while an agent serves it."""
    moment = time.time() if now is None else now
    key = setup_keys.make(settings.public_url, ca_fingerprint(settings))

    def work(connection: Connection) -> dict[str, Any]:
        row = _one_unserved(connection, wanted)
        unused = tables.setup_keys.c
        connection.execute(delete(tables.setup_keys).where(unused.collection_id == row.id, unused.redeemed.is_(None)))
        setup_keys.add(connection, key, row.id, now=moment, life=settings.enrolment.setup_key_life)
        return {"collection_id": row.id, "setup_key": key, "name": row.display_name, "owner_id": row.owner_id}

    return lambda store: store.write(work)
