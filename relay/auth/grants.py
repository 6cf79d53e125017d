"""What a client gets for what it shows: the grants of OAuth 2.0 that this relay knows.

Each function decides and writes in one transaction and returns the tokens; `token_document` gives them the form in
which clients read them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, update

from relay.auth.clients import Client
from relay.auth.codes import Redeemed
from relay.auth.consents import below
from relay.auth.device import Allowed
from relay.auth.known_scopes import NotForPerson, by_server, check_domains, expand, facts_of, lasting_servers
from relay.auth.linked import set_of
from relay.auth.public_clients import note_use
from relay.auth.scopes import InvalidScope, parse_untrusted
from relay.auth.session_rules import provider_wishes
from relay.auth.tokens import IssuedToken, find, issue, open_session, token_digest
from relay.store.auth_tables import tokens

# Seconds for which a replaced refresh token still counts: an answer was lost, or two commands ran at once.
ROTATION_GRACE = 60.0


class GrantRefused(Exception):
    """The grant is not given. ``code`` is the error word of RFC 6749, 5.2."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Replayed:
    """A replaced refresh token was shown. Returned, not raised: that its whole session was ended must stay so."""


@dataclass(frozen=True)
class Lives:
    """How long tokens count, in seconds."""

    access: float
    refresh: float


def client_credentials(
    connection: Connection, client: Client, scope: str, *, now: float, lives: Lives
) -> list[IssuedToken]:
    """Tokens for the client's own identity, one for each service (RFC 6749, 4.4). Raises `GrantRefused`."""
    if client.public or client.parent_id is not None:
        raise GrantRefused("unauthorized_client", "This client signs people in; it is nobody by itself.")
    session_id = open_session(connection, identity_id=client.id, client_id=client.id, now=now)
    return _issue(connection, session_id, client.id, client.id, scope, now=now, lives=lives, offline=False)


def authorization_code(
    connection: Connection, client: Client, redeemed: Redeemed | Allowed, *, now: float, lives: Lives
) -> list[IssuedToken]:
    """Tokens for a code that was redeemed or a device that was allowed. Raises `GrantRefused`."""
    note_use(connection, client.id, now)
    return _issue(
        connection,
        redeemed.session_id,
        redeemed.identity_id,
        client.id,
        redeemed.scope,
        now=now,
        lives=lives,
        offline=redeemed.offline,
    )


def _issue(
    connection: Connection,
    session_id: str,
    identity_id: str,
    client_id: str,
    scope: str,
    *,
    now: float,
    lives: Lives,
    offline: bool,
    lasting: Collection[str] | None = None,
) -> list[IssuedToken]:
    """``lasting`` names those scopes that the person has allowed for while they are away; None: all of them."""
    try:
        expanded = expand(connection, parse_untrusted(scope).values())
    except InvalidScope as error:
        raise GrantRefused("invalid_scope", str(error)) from error
    scopes = by_server(expanded)
    if not scopes:
        raise GrantRefused("invalid_scope", "The request names no scope.")
    try:
        check_domains((facts for _, facts in expanded.values()), set_of(connection, identity_id))
    except NotForPerson as error:
        raise GrantRefused("invalid_scope", str(error)) from error
    servers = lasting_servers(expanded)
    if lasting is not None:
        servers = {server for server in servers if set(scopes[server]) <= set(lasting)}
    return issue(
        connection,
        session_id=session_id,
        identity_id=identity_id,
        client_id=client_id,
        scopes=scopes,
        now=now,
        access_life=lives.access,
        refresh_life=lives.refresh if offline else None,
        lasting=servers,
    )


def dependent(
    connection: Connection, client: Client, shown: str, scope: str, *, offline: bool, now: float, lives: Lives
) -> list[IssuedToken]:
    """Tokens with which a service goes on in the name of whoever sent it a token (Globus's dependent tokens).

    The service gets what the person's consent puts below the scopes of that token, and no more; refresh tokens
    (``offline``) where the person was told that it goes on while they are away. Raises `GrantRefused`.
    """
    record = find(connection, shown, now)
    if record is None or record.kind != "access" or record.resource_server != client.id:
        raise GrantRefused("invalid_grant", "The token is unknown, expired, revoked, or was not meant for this client.")
    consented = below(connection, record.identity_id, record.client_id, record.scopes)
    allowed = list(consented)
    if scope.strip():
        try:
            wanted = list(parse_untrusted(scope))
        except InvalidScope as error:
            raise GrantRefused("invalid_scope", str(error)) from error
        if not set(wanted) <= set(allowed):
            raise GrantRefused("invalid_scope", "The person has not consented to all of these scopes.")
        allowed = wanted
    if not allowed:
        return []
    # In the session of the first token: whatever ends that one ends these.
    return _issue(
        connection,
        record.session_id,
        record.identity_id,
        client.id,
        " ".join(allowed),
        now=now,
        lives=lives,
        offline=offline,
        lasting=[name for name, kept in consented.items() if kept],
    )


def refresh(
    connection: Connection, client: Client, refresh_token: str, scope: str, *, now: float, lives: Lives
) -> IssuedToken | Replayed:
    """A new access token for a refresh token of this client (RFC 6749, 6). Raises `GrantRefused`.

    For most clients the refresh token stays the same, because they run several commands at once and do not read it
    again; its life starts anew. For clients that rotate it is replaced (RFC 9700, 4.14.2). Showing a replaced one soon
    after is taken for a lost answer; later it is a sign of theft and ends everything that came of the sign-in.
    """
    record = find(connection, refresh_token, now)
    if record is None or record.kind != "refresh" or record.client_id != client.id:
        raise GrantRefused("invalid_grant", "The refresh token is unknown, expired or revoked; sign in again.")
    if record.replaced is not None and now - record.replaced > ROTATION_GRACE:
        connection.execute(delete(tokens).where(tokens.c.session_id == record.session_id))
        return Replayed()
    person = set_of(connection, record.identity_id)
    required = provider_wishes(connection, client).required
    if required is not None and all(one.provider_id != required for one in person):
        raise GrantRefused("invalid_grant", "The application is for people of a provider that you have no identity of.")
    try:
        check_domains([facts for facts in (facts_of(connection, name) for name in record.scopes) if facts], person)
    except NotForPerson as error:
        raise GrantRefused("invalid_grant", str(error)) from error
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
        client_id=client.id,
        scopes={record.resource_server: wanted},
        now=now,
        access_life=lives.access,
        # A narrower access token must not narrow what the refresh token is for.
        refresh_life=lives.refresh if client.rotates and set(wanted) == set(record.scopes) else None,
    )
    note_use(connection, client.id, now)
    this = tokens.c.digest == token_digest(refresh_token)
    if issued.refresh_token is not None:
        connection.execute(update(tokens).where(this, tokens.c.replaced.is_(None)).values(replaced=now))
        return issued
    connection.execute(update(tokens).where(this).values(expires=now + lives.refresh))
    return IssuedToken(issued.access_token, refresh_token, issued.resource_server, issued.scope, issued.expires_in)


def token_document(issued: Sequence[IssuedToken]) -> dict[str, Any]:
    """The answer of the token endpoint: the first token at top level, the others beside it, perhaps none.

    `issue` puts the token of the Auth service first when there is one, where several clients expect it.
    """
    first, *others = [single_document(token) for token in issued]
    return {**first, "other_tokens": others}


def single_document(token: IssuedToken) -> dict[str, Any]:
    """One token as clients read it."""
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
