"""Identities: who people and programs are, under an id that never changes and a username that people read."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, Connection, insert, select

from protocol.errors import ItemFailed
from relay.store.auth_tables import identities

CLIENT_DOMAIN = "clients.auth.globus.org"
# The provider of all client identities; fixed, so that it means the same on every relay.
CLIENT_PROVIDER_ID = str(uuid.uuid5(uuid.NAMESPACE_DNS, CLIENT_DOMAIN))

IdentityKind = Literal["login", "client_identity"]
_USERNAME = re.compile(r"[^\s@\x00-\x1f\x7f]{1,255}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# SQLite takes at most 32,766 bound values; this keeps every query far below that.
_BATCH = 500


@dataclass(frozen=True)
class Identity:
    """One identity. ``username`` is lower-case; ``status`` is Globus's used, unused, private or closed."""

    id: str
    username: str
    kind: IdentityKind
    status: str
    name: str | None
    email: str | None
    organization: str | None
    provider_id: str
    created: float


def provider_id_of(domain: str) -> str:
    """The id of the provider that vouches for the usernames of a domain."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, domain.lower()))


class UsernameTaken(ItemFailed):
    """Another identity has this username."""

    default_code = "EXISTS"


def normal_username(username: str) -> str:
    """The one form in which usernames are stored and compared. Raises ValueError for what is no username."""
    normal = username.strip().lower()
    if len(normal) > 320 or _USERNAME.fullmatch(normal) is None:
        raise ValueError(f"{username[:100]!r} is no username; it looks like name@domain.")
    return normal


def add_identity(
    connection: Connection,
    *,
    username: str,
    now: float,
    provider_id: str,
    identity_id: str | None = None,
    kind: IdentityKind = "login",
    status: str = "used",
    name: str | None = None,
    email: str | None = None,
    organization: str | None = None,
) -> Identity:
    """Store a new identity. Raises ValueError for a bad username and `UsernameTaken`."""
    identity = Identity(
        id=identity_id or str(uuid.uuid4()),
        username=normal_username(username),
        kind=kind,
        status=status,
        name=name,
        email=email,
        organization=organization,
        provider_id=provider_id,
        created=now,
    )
    if select_by_usernames(connection, [identity.username]):
        raise UsernameTaken(f"There is already a user {identity.username}.", subject=identity.username)
    connection.execute(insert(identities).values(**vars(identity)))
    return identity


def select_by_ids(connection: Connection, ids: Collection[str]) -> dict[str, Identity]:
    """The identities with these ids, by id; unknown ids are left out."""
    return {identity.id: identity for identity in _select(connection, identities.c.id, ids)}


def select_by_usernames(connection: Connection, usernames: Iterable[str]) -> dict[str, Identity]:
    """The identities with these usernames, by normal username; unknown ones are left out."""
    normal = [name.strip().lower() for name in usernames]
    return {identity.username: identity for identity in _select(connection, identities.c.username, normal)}


def _select(connection: Connection, column: ColumnElement[str], values: Collection[str]) -> list[Identity]:
    wanted = sorted(set(values))
    found: list[Identity] = []
    for start in range(0, len(wanted), _BATCH):
        rows = connection.execute(select(identities).where(column.in_(wanted[start : start + _BATCH])))
        found.extend(Identity(**row) for row in rows.mappings())
    return found
