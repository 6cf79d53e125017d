"""What a client gets for what it shows: the grants of OAuth 2.0 that this relay knows.

Each function decides and writes in one transaction and returns the tokens; `token_document` gives them the form in
which clients read them. The interactive login will add the authorization code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, union, update

from relay.auth.clients import Client
from relay.auth.scopes import InvalidScope, group_by_server, object_ids, parse_untrusted
from relay.auth.tokens import IssuedToken, find, issue, open_session, token_digest
from relay.store.auth_tables import tokens
from relay.store.transfer_tables import collections, endpoints


class GrantRefused(Exception):
    """The grant is not given. ``code`` is the error word of RFC 6749, 5.2."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Lives:
    """How long tokens count, in seconds."""

    access: float
    refresh: float


def client_credentials(
    connection: Connection, client: Client, scope: str, *, now: float, lives: Lives
) -> list[IssuedToken]:
    """Tokens for the client's own identity, one for each service (RFC 6749, 4.4). Raises `GrantRefused`."""
    try:
        scopes = group_by_server(parse_untrusted(scope).values())
    except InvalidScope as error:
        raise GrantRefused("invalid_scope", str(error)) from error
    if not scopes:
        raise GrantRefused("invalid_scope", "The request names no scope.")
    unknown = object_ids(scopes) - _existing_objects(connection, object_ids(scopes))
    if unknown:
        raise GrantRefused("invalid_scope", f"There is no endpoint or collection {min(unknown)}.")
    session_id = open_session(connection, identity_id=client.id, client_id=client.id, now=now)
    return issue(
        connection,
        session_id=session_id,
        identity_id=client.id,
        client_id=client.id,
        scopes=scopes,
        now=now,
        access_life=lives.access,
    )


def refresh(
    connection: Connection, client_id: str, refresh_token: str, scope: str, *, now: float, lives: Lives
) -> IssuedToken:
    """A new access token for a refresh token of this client (RFC 6749, 6). Raises `GrantRefused`.

    The refresh token stays the same, because clients do not read it again, and its life starts anew.
    """
    record = find(connection, refresh_token, now)
    if record is None or record.kind != "refresh" or record.client_id != client_id:
        raise GrantRefused("invalid_grant", "The refresh token is unknown, expired or revoked; sign in again.")
    wanted: Sequence[str] = record.scopes
    if scope.strip():
        try:
            wanted = list(parse_untrusted(scope))
        except InvalidScope as error:
            raise GrantRefused("invalid_scope", str(error)) from error
        if not set(wanted) <= set(record.scopes):
            raise GrantRefused("invalid_scope", "A refresh cannot widen what the token allows.")
    (issued,) = issue(
        connection,
        session_id=record.session_id,
        identity_id=record.identity_id,
        client_id=client_id,
        scopes={record.resource_server: wanted},
        now=now,
        access_life=lives.access,
    )
    connection.execute(
        update(tokens).where(tokens.c.digest == token_digest(refresh_token)).values(expires=now + lives.refresh)
    )
    return IssuedToken(issued.access_token, refresh_token, issued.resource_server, issued.scope, issued.expires_in)


def token_document(issued: Sequence[IssuedToken]) -> dict[str, Any]:
    """The answer of the token endpoint: the first token at top level, the others beside it, perhaps none.

    `issue` puts the token of the Auth service first when there is one, where several clients expect it.
    """
    first, *others = [_document(token) for token in issued]
    return {**first, "other_tokens": others}


def _document(token: IssuedToken) -> dict[str, Any]:
    document: dict[str, Any] = {
        "access_token": token.access_token,
        "scope": token.scope,
        "expires_in": token.expires_in,
        "token_type": "Bearer",
        "resource_server": token.resource_server,
    }
    if token.refresh_token is not None:
        document["refresh_token"] = token.refresh_token
    return document


def _existing_objects(connection: Connection, ids: set[str]) -> set[str]:
    if not ids:
        return set()
    known = union(
        select(collections.c.id).where(collections.c.id.in_(ids), collections.c.deleted.is_(None)),
        select(endpoints.c.id).where(endpoints.c.id.in_(ids)),
    )
    return set(connection.execute(known).scalars())
