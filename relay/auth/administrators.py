"""Who administers the relay itself, as against the collections on it."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from relay.store.sign_in_tables import administrators


def is_administrator(connection: Connection, identity_id: str) -> bool:
    """Whether an identity administers the relay itself."""
    query = select(administrators.c.created).where(administrators.c.identity_id == identity_id)
    return connection.execute(query).first() is not None


def has_administrator(connection: Connection) -> bool:
    """Whether anybody administers the relay."""
    return connection.execute(select(administrators.c.created).limit(1)).first() is not None


def make_administrator(connection: Connection, identity_id: str, now: float) -> None:
    """Let an identity administer the relay."""
    if not is_administrator(connection, identity_id):
        connection.execute(insert(administrators).values(identity_id=identity_id, created=now))
