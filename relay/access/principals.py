"""Who somebody is when access is decided: all their identities and groups."""

from __future__ import annotations

from sqlalchemy import Connection, or_, select

from relay.access.decisions import Subject
from relay.store.sign_in_tables import linked_identities

_linked = linked_identities.c


def subject_of(connection: Connection, identity_id: str, now: float) -> Subject:
    """The person behind an identity at a moment (Unix seconds), with the identities linked to it.

    There are no groups on this relay yet, so nobody is in any.
    """
    primary = connection.execute(
        select(_linked.primary_id).where(_linked.identity_id == identity_id)
    ).scalar_one_or_none()
    primary = primary or identity_id
    others = connection.execute(
        select(_linked.identity_id).where(or_(_linked.primary_id == primary, _linked.identity_id == identity_id))
    ).scalars()
    return Subject(frozenset({identity_id, primary, *others}), now=now)
