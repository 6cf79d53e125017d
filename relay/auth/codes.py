"""Authorization codes: single use, short-lived, bound to client, redirect address and PKCE challenge (RFC 9700, 2.1).

A second use of a code ends everything that came of the first, because one of the two users stole it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from relay.auth.authorization import AuthorizationRequest, is_verifier_untrusted
from relay.auth.browser_sessions import Authentication
from relay.auth.tokens import MAX_TOKEN, open_session, token_digest
from relay.store.auth_tables import sessions
from relay.store.sign_in_tables import authorization_codes, session_authentications

_WRONG = "The code is unknown, was used already or has expired; sign in again."


@dataclass(frozen=True)
class Redeemed:
    """What a code stands for."""

    session_id: str
    identity_id: str
    scope: str
    offline: bool
    nonce: str | None


@dataclass(frozen=True)
class NotRedeemed:
    """The code gives nothing. Returned, not raised: what was ended because of it must stay ended."""

    sentence: str = _WRONG


def open_signed_session(
    connection: Connection, identity_id: str, client_id: str, shown: Iterable[Authentication], now: float
) -> str:
    """A session for tokens, which remembers who had shown who they are; returns its id."""
    items = list(shown)
    session_id = open_session(
        connection,
        identity_id=identity_id,
        client_id=client_id,
        now=now,
        authenticated=max((item.authenticated for item in items), default=now),
    )
    if items:
        connection.execute(
            insert(session_authentications),
            [
                {
                    "session_id": session_id,
                    "identity_id": item.identity_id,
                    "provider_id": item.provider_id,
                    "authenticated": item.authenticated,
                    "methods": " ".join(item.methods),
                }
                for item in items
            ],
        )
    return session_id


def authentications_of(connection: Connection, session_id: str) -> dict[str, Authentication]:
    """Who had shown who they are when a session for tokens was opened, by identity id."""
    rows = connection.execute(select(session_authentications).where(session_authentications.c.session_id == session_id))
    return {
        row.identity_id: Authentication(row.identity_id, row.provider_id, row.authenticated, tuple(row.methods.split()))
        for row in rows
    }


def issue_code(
    connection: Connection,
    request: AuthorizationRequest,
    identity_id: str,
    shown: Iterable[Authentication],
    *,
    now: float,
    life: float,
) -> str:
    """A code for what the person has allowed. The client must have its row already."""
    code = secrets.token_urlsafe(32)
    session_id = open_signed_session(connection, identity_id, request.client.id, shown, now)
    connection.execute(
        insert(authorization_codes).values(
            digest=token_digest(code),
            client_id=request.client.id,
            identity_id=identity_id,
            session_id=session_id,
            redirect_uri=request.redirect_uri,
            challenge=request.challenge,
            scope=request.scope,
            offline=request.offline,
            nonce=request.nonce,
            created=now,
            expires=now + life,
        )
    )
    return code


def redeem_code(
    connection: Connection, client_id: str, code: str, redirect_uri: str, verifier: str | None, now: float
) -> Redeemed | NotRedeemed:
    """Use a code up. A failure uses it up, too: whoever shows a code with a wrong verifier has stolen it."""
    if not 1 <= len(code) <= MAX_TOKEN:
        return NotRedeemed()
    table = authorization_codes.c
    this = table.digest == token_digest(code)
    row = connection.execute(select(authorization_codes).where(this)).one_or_none()
    if row is None or row.client_id != client_id:
        return NotRedeemed()
    if row.used is not None:
        connection.execute(delete(sessions).where(sessions.c.id == row.session_id))
        return NotRedeemed()
    marked = connection.execute(update(authorization_codes).where(this, table.used.is_(None)).values(used=now))
    if marked.rowcount != 1 or row.expires <= now:
        return NotRedeemed()
    # RFC 6749, 4.1.3: the same address as in the request.
    if redirect_uri != row.redirect_uri:
        return NotRedeemed("redirect_uri is not the one that the code was asked for with.")
    # RFC 9700, 2.1.1: a verifier without a challenge is a sign of a downgrade.
    if (row.challenge is None) != (verifier is None):
        return NotRedeemed("code_verifier does not belong to the request of this code.")
    if row.challenge is not None and not _proves(verifier or "", row.challenge):
        return NotRedeemed("code_verifier does not belong to the request of this code.")
    return Redeemed(row.session_id, row.identity_id, row.scope, row.offline, row.nonce)


def _proves(verifier: str, challenge: str) -> bool:
    if not is_verifier_untrusted(verifier):
        return False
    digest = urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    return hmac.compare_digest(digest, challenge)
