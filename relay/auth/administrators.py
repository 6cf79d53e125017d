"""Who administers the relay itself, as against the collections on it."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from relay.store.auth_tables import identities
from relay.store.sign_in_tables import administrators


def is_administrator(connection: Connection, identity_id: str) -> bool:
    """Whether an identity administers the relay itself."""
    query = select(administrators.c.created).where(administrators.c.identity_id == identity_id)
    return connection.execute(query).first() is not None


def has_administrator(connection: Connection) -> bool:
    """Whether anybody administers the relay whose account is not closed."""
    open_ = select(identities.c.id).where(
        identities.c.id == administrators.c.identity_id, identities.c.status != "closed"
    )
    return connection.execute(select(administrators.c.created).where(open_.exists()).limit(1)).first() is not None


def all_administrators(connection: Connection) -> set[str]:
    """The ids of those who administer the relay."""
    return set(connection.execute(select(administrators.c.identity_id)).scalars())


def remove_administrator(connection: Connection, identity_id: str) -> bool:
    """Let an identity administer the relay no longer; whether it did."""
    gone = connection.execute(delete(administrators).where(administrators.c.identity_id == identity_id))
    return gone.rowcount == 1


def make_administrator(connection: Connection, identity_id: str, now: float) -> None:
    """Let an identity administer the relay."""
    if not is_administrator(connection, identity_id):
        connection.execute(insert(administrators).values(identity_id=identity_id, created=now))
