"""Links that work once: the first administrator's, and those with which people choose a password.

The link holds 256 random bits; the database knows their SHA-256 alone. Using a link is one conditional delete in the
transaction that does what the link is for, so that of any number of uses at once exactly one counts.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, delete, insert, select

from relay.auth.administrators import has_administrator
from relay.auth.tokens import MAX_TOKEN, token_digest
from relay.store.sign_in_tables import one_time_links

Purpose = Literal["administrator", "password"]
LIFE = 7 * 86400.0


@dataclass(frozen=True)
class OneTimeLink:
    """What a link is for. ``identity_id`` is whose password it sets."""

    purpose: Purpose
    identity_id: str | None


def make(connection: Connection, purpose: Purpose, identity_id: str | None, now: float, life: float = LIFE) -> str:
    """A new link's secret. Earlier links for the same end stop working."""
    same = (one_time_links.c.purpose == purpose) & one_time_links.c.identity_id.is_not_distinct_from(identity_id)
    connection.execute(delete(one_time_links).where(same))
    secret = secrets.token_urlsafe(32)
    connection.execute(
        insert(one_time_links).values(
            digest=token_digest(secret), purpose=purpose, identity_id=identity_id, created=now, expires=now + life
        )
    )
    return secret


def look(connection: Connection, secret: str, now: float) -> OneTimeLink | None:
    """What a link is for, without using it up; None when it is unknown, used or too old, or makes a first administrator
    where there is one by now."""
    if not 1 <= len(secret) <= MAX_TOKEN:
        return None
    link = one_time_links.c
    row = connection.execute(
        select(link.purpose, link.identity_id).where(link.digest == token_digest(secret), link.expires > now)
    ).first()
    if row is None or (row.purpose == "administrator" and has_administrator(connection)):
        return None
    return OneTimeLink(row.purpose, row.identity_id)


def use(connection: Connection, secret: str, now: float) -> OneTimeLink | None:
    """Use a link up; None when there is nothing left to use."""
    found = look(connection, secret, now)
    if found is None:
        return None
    gone = connection.execute(delete(one_time_links).where(one_time_links.c.digest == token_digest(secret)))
    return found if gone.rowcount == 1 else None
