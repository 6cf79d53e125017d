"""Access and refresh tokens: made, found again, ended. All functions work on an open database connection.

A token is 256 random bits that mean nothing by themselves; the database knows it by its SHA-256 alone, so a stolen
copy of the database signs nobody in.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, delete, insert, select, union

from relay.store.auth_tables import identities, sessions, tokens
from relay.store.sign_in_tables import authorization_codes, device_codes

# Longer strings cannot be tokens of ours; they are refused before anything is computed over them.
MAX_TOKEN = 512
# For so long after its end a second use of a code is still noticed.
_CODE_MEMORY = 3600.0
TokenKind = Literal["access", "refresh"]


@dataclass(frozen=True)
class TokenRecord:
    """What a live token stands for. Times are Unix seconds."""

    kind: TokenKind
    session_id: str
    identity_id: str
    username: str
    name: str | None
    email: str | None
    provider_id: str
    client_id: str
    resource_server: str
    scopes: tuple[str, ...]
    issued: float
    expires: float
    authenticated: float
    replaced: float | None = None


@dataclass(frozen=True)
class IssuedToken:
    """A token at the only moment it exists in the clear."""

    access_token: str
    refresh_token: str | None
    resource_server: str
    scope: str
    expires_in: int


def token_digest(token: str) -> str:
    """The form in which the database knows a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def open_session(
    connection: Connection,
    *,
    identity_id: str,
    client_id: str,
    now: float,
    authenticated: float | None = None,
    name: str | None = None,
) -> str:
    """Record that an identity signed in with a client; returns the session's id."""
    session_id = str(uuid.uuid4())
    connection.execute(
        insert(sessions).values(
            id=session_id,
            identity_id=identity_id,
            client_id=client_id,
            authenticated=now if authenticated is None else authenticated,
            created=now,
            name=name,
        )
    )
    return session_id


def issue(
    connection: Connection,
    *,
    session_id: str,
    identity_id: str,
    client_id: str,
    scopes: Mapping[str, Sequence[str]],
    now: float,
    access_life: float,
    refresh_life: float | None = None,
    lasting: Collection[str] | None = None,
) -> list[IssuedToken]:
    """One access token for each resource server of ``scopes``; with ``refresh_life``, a refresh token beside each, or
    (``lasting``) beside those for some of the servers.

    Lives are in seconds. The tokens count once the transaction is committed.
    """
    issued, rows = [], []
    for server, names in scopes.items():
        access, refresh = secrets.token_urlsafe(32), None
        common = {
            "session_id": session_id,
            "identity_id": identity_id,
            "client_id": client_id,
            "resource_server": server,
            "scope": " ".join(names),
            "issued": now,
        }
        rows.append({"digest": token_digest(access), "kind": "access", "expires": now + access_life, **common})
        if refresh_life is not None and (lasting is None or server in lasting):
            refresh = secrets.token_urlsafe(32)
            rows.append({"digest": token_digest(refresh), "kind": "refresh", "expires": now + refresh_life, **common})
        issued.append(IssuedToken(access, refresh, server, " ".join(names), int(access_life)))
    if rows:
        connection.execute(insert(tokens), rows)
    return issued


def find(connection: Connection, token: str, now: float) -> TokenRecord | None:
    """The record of a live token, or None when it is unknown, expired, revoked, or its identity was closed."""
    if not 1 <= len(token) <= MAX_TOKEN:
        return None
    row = (
        connection.execute(_FIND.where(tokens.c.digest == token_digest(token), tokens.c.expires > now))
        .mappings()
        .first()
    )
    return None if row is None else _record(row)


_FIND = (
    select(
        tokens.c.kind,
        tokens.c.session_id,
        tokens.c.identity_id,
        identities.c.username,
        identities.c.name,
        identities.c.email,
        identities.c.provider_id,
        tokens.c.client_id,
        tokens.c.resource_server,
        tokens.c.scope,
        tokens.c.issued,
        tokens.c.expires,
        tokens.c.replaced,
        sessions.c.authenticated,
    )
    .join(identities, identities.c.id == tokens.c.identity_id)
    .join(sessions, sessions.c.id == tokens.c.session_id)
    .where(identities.c.status != "closed")
)


def _record(row: RowMapping) -> TokenRecord:
    values: dict[str, Any] = dict(row)
    scopes = tuple(values.pop("scope").split())
    return TokenRecord(scopes=scopes, **values)


def revoke(connection: Connection, token: str) -> str | None:
    """End a token at once; a refresh token takes the access tokens made from it along (RFC 7009, 2.1).

    Whoever holds a token may end it: a found token is then harmless, and clients that sign out without their secret
    are served. Returns whose it was, by the id of the identity; None when there was no such token.
    """
    if not 1 <= len(token) <= MAX_TOKEN:
        return None
    this = tokens.c.digest == token_digest(token)
    wanted = select(tokens.c.kind, tokens.c.session_id, tokens.c.resource_server, tokens.c.identity_id)
    row = connection.execute(wanted.where(this)).first()
    if row is None:
        return None
    if row.kind == "refresh":
        this = (tokens.c.session_id == row.session_id) & (tokens.c.resource_server == row.resource_server)
    connection.execute(delete(tokens).where(this))
    identity_id: str = row.identity_id
    return identity_id


def remove_expired(connection: Connection, now: float) -> int:
    """Forget tokens past their life, and sessions that nothing names any more. Returns how many tokens went."""
    gone = connection.execute(delete(tokens).where(tokens.c.expires <= now)).rowcount
    for table in (authorization_codes, device_codes):
        connection.execute(delete(table).where(table.c.expires <= now - _CODE_MEMORY))
    waiting = select(device_codes.c.session_id).where(device_codes.c.session_id.is_not(None))
    named = union(select(tokens.c.session_id), select(authorization_codes.c.session_id), waiting)
    connection.execute(delete(sessions).where(sessions.c.id.not_in(named)))
    return gone
