"""Tokens of long life for machines: made by a person on a page, named, listed and ended there.

Each is an access token for the Transfer service in a session of its own, so ending the session ends it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from protocol.errors import ItemFailed
from relay.auth.public_clients import TOWPATH_CLI, client_for, ensure_row
from relay.auth.scopes import TRANSFER_ALL, TRANSFER_SERVER
from relay.auth.tokens import open_session, token_digest
from relay.store.auth_tables import identities, sessions, tokens

MAX_TOKENS = 100
MAX_NAME = 100
# From here on before its end, in seconds, programs that use a token are told to have it renewed.
WARNING = 14 * 86400.0


@dataclass(frozen=True)
class ServiceToken:
    """A token without its secret. ``id`` is its session's. Times are Unix seconds."""

    id: str
    name: str
    created: float
    expires: float

    def is_ending(self, now: float) -> bool:
        """Whether it is time to make a new one."""
        return self.expires - now < WARNING


class CannotMakeToken(ItemFailed):
    """The token is not made; the sentence says why."""

    default_code = "CANNOT_MAKE_TOKEN"


def make(connection: Connection, identity_id: str, name: str, *, life: float, now: float) -> str:
    """A new token's secret, shown only now. Raises `CannotMakeToken`."""
    title = name.strip()
    if not title or len(title) > MAX_NAME or not title.isprintable():
        raise CannotMakeToken(f"A token's name is a text of at most {MAX_NAME} characters.")
    if len(tokens_of(connection, identity_id, now)) >= MAX_TOKENS:
        raise CannotMakeToken(f"You have {MAX_TOKENS} tokens; end one first.")
    client = client_for(connection, TOWPATH_CLI, unregistered=False)
    assert client is not None
    ensure_row(connection, client, now)
    session_id = open_session(connection, identity_id=identity_id, client_id=client.id, now=now, name=title)
    secret = secrets.token_urlsafe(32)
    connection.execute(
        insert(tokens).values(
            digest=token_digest(secret),
            kind="access",
            session_id=session_id,
            identity_id=identity_id,
            client_id=client.id,
            resource_server=TRANSFER_SERVER,
            scope=TRANSFER_ALL,
            issued=now,
            expires=now + life,
        )
    )
    return secret


def tokens_of(connection: Connection, identity_id: str, now: float) -> list[ServiceToken]:
    """A person's tokens, the one that ends first in front."""
    query = (
        select(sessions.c.id, sessions.c.name, tokens.c.issued, tokens.c.expires)
        .join(tokens, tokens.c.session_id == sessions.c.id)
        .where(sessions.c.identity_id == identity_id, sessions.c.name.is_not(None), tokens.c.expires > now)
        .order_by(tokens.c.expires)
    )
    return [ServiceToken(row.id, row.name, row.issued, row.expires) for row in connection.execute(query)]


@dataclass(frozen=True)
class OwnedToken:
    """A token and whose it is, for the operator."""

    token: ServiceToken
    username: str


def all_tokens(connection: Connection, now: float, identity_id: str | None = None) -> list[OwnedToken]:
    """The tokens of everybody, or of one person, the one that ends first in front."""
    query = (
        select(sessions.c.id, sessions.c.name, tokens.c.issued, tokens.c.expires, identities.c.username)
        .join(tokens, tokens.c.session_id == sessions.c.id)
        .join(identities, identities.c.id == sessions.c.identity_id)
        .where(sessions.c.name.is_not(None), tokens.c.expires > now)
        .order_by(tokens.c.expires)
    )
    if identity_id is not None:
        query = query.where(sessions.c.identity_id == identity_id)
    return [
        OwnedToken(ServiceToken(row.id, row.name, row.issued, row.expires), row.username)
        for row in connection.execute(query)
    ]


def withdraw(connection: Connection, token_id: str) -> bool:
    """End anybody's token; returns whether there was one."""
    this = (sessions.c.id == token_id) & sessions.c.name.is_not(None)
    return connection.execute(delete(sessions).where(this)).rowcount > 0


def end(connection: Connection, identity_id: str, token_id: str) -> bool:
    """End a token; returns whether there was one."""
    mine = (sessions.c.id == token_id) & (sessions.c.identity_id == identity_id) & sessions.c.name.is_not(None)
    return connection.execute(delete(sessions).where(mine)).rowcount > 0
