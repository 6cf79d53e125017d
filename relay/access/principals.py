"""Who somebody is when access is decided: all their identities and groups."""

from __future__ import annotations

from sqlalchemy import Connection, or_, select

from relay.access.decisions import Subject
from relay.store.auth_tables import identities
from relay.store.sign_in_tables import linked_identities

_linked = linked_identities.c


def subject_of(connection: Connection, identity_id: str, now: float) -> Subject:
    """The person behind an identity at a moment (Unix seconds), with the identities linked to it.

    What a closed identity was granted counts for none of the others. There are no groups on this relay yet, so nobody
    is in any.
    """
    primary = connection.execute(
        select(_linked.primary_id).where(_linked.identity_id == identity_id)
    ).scalar_one_or_none()
    primary = primary or identity_id
    others = select(_linked.identity_id).where(_linked.primary_id == primary)
    open_ones = connection.execute(
        select(identities.c.id).where(
            or_(identities.c.id == primary, identities.c.id.in_(others)), identities.c.status != "closed"
        )
    ).scalars()
    return Subject(frozenset({identity_id, *open_ones}), now=now)
