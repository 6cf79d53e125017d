"""Who somebody is when access is decided: all their identities and groups."""

from __future__ import annotations

from sqlalchemy import Connection

from relay.access.decisions import Subject


def subject_of(_connection: Connection, identity_id: str, now: float) -> Subject:
    """The person behind an identity at a moment (Unix seconds). There are no groups on this relay yet."""
    return Subject(frozenset({identity_id}), now=now)
