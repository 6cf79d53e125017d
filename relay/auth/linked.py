"""Linked identities: one person under several names, one of them the primary under which they act.

An identity without a row in the table stands alone and is its own primary. The primary has no row either.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from protocol.errors import ItemFailed
from relay.auth.identities import Identity, select_by_ids
from relay.store.sign_in_tables import linked_identities

MAX_LINKED = 20


class CannotLink(ItemFailed):
    """The identities cannot be linked or separated; the sentence says why."""

    default_code = "CANNOT_LINK"


def primary_of(connection: Connection, identity_id: str) -> str:
    """The identity under which the person acts."""
    query = select(linked_identities.c.primary_id).where(linked_identities.c.identity_id == identity_id)
    return connection.execute(query).scalar_one_or_none() or identity_id


def set_of(connection: Connection, identity_id: str) -> list[Identity]:
    """All identities of the person, the primary first, then by username. Closed ones are left out, beside the one that
    is asked about: they stand for nobody."""
    primary = primary_of(connection, identity_id)
    query = select(linked_identities.c.identity_id).where(linked_identities.c.primary_id == primary)
    others = connection.execute(query).scalars().all()
    known = select_by_ids(connection, [primary, *others]).values()
    counting = [identity for identity in known if identity.status != "closed" or identity.id == identity_id]
    return sorted(counting, key=lambda identity: (identity.id != primary, identity.username))


def link(connection: Connection, primary_id: str, identity_id: str, now: float) -> None:
    """Add an identity, which has just shown who it is, to a person. Raises `CannotLink`."""
    if primary_of(connection, primary_id) != primary_id:
        raise CannotLink("Identities are linked to a primary one.")
    if _is_closed(connection, identity_id):
        raise CannotLink("That identity is closed; ask the relay's operator.", subject=identity_id)
    present = set_of(connection, primary_id)
    if any(identity.id == identity_id for identity in present):
        return
    if len(present) >= MAX_LINKED:
        raise CannotLink(f"At most {MAX_LINKED} identities can be linked.")
    if primary_of(connection, identity_id) != identity_id or len(set_of(connection, identity_id)) > 1:
        raise CannotLink("That identity is linked to others already; unlink it there first.", subject=identity_id)
    # Closed ones that were linked to it stand alone should they be opened again: nobody has shown that they are theirs
    # under the new name, and a primary identity is never linked to another.
    connection.execute(delete(linked_identities).where(linked_identities.c.primary_id == identity_id))
    connection.execute(insert(linked_identities).values(identity_id=identity_id, primary_id=primary_id, created=now))


def unlink(connection: Connection, primary_id: str, identity_id: str) -> None:
    """Let an identity stand alone again. Raises `CannotLink`."""
    if identity_id == primary_id:
        raise CannotLink("The primary identity cannot be unlinked; make another one the primary first.")
    mine = (linked_identities.c.identity_id == identity_id) & (linked_identities.c.primary_id == primary_id)
    if connection.execute(delete(linked_identities).where(mine)).rowcount != 1:
        raise CannotLink("That identity is not linked to yours.", subject=identity_id)


def make_primary(connection: Connection, primary_id: str, identity_id: str) -> None:
    """Let the person act under another of their identities from the next sign-in on. Raises `CannotLink`.

    Collections, rules and roles name identities, so those of the former primary stay with it.
    """
    if identity_id == primary_id:
        return
    if _is_closed(connection, identity_id):
        raise CannotLink("That identity is closed; ask the relay's operator.", subject=identity_id)
    mine = (linked_identities.c.identity_id == identity_id) & (linked_identities.c.primary_id == primary_id)
    if connection.execute(update(linked_identities).where(mine).values(identity_id=primary_id)).rowcount != 1:
        raise CannotLink("That identity is not linked to yours.", subject=identity_id)
    connection.execute(
        update(linked_identities).where(linked_identities.c.primary_id == primary_id).values(primary_id=identity_id)
    )


def _is_closed(connection: Connection, identity_id: str) -> bool:
    found = select_by_ids(connection, [identity_id]).get(identity_id)
    return found is not None and found.status == "closed"
