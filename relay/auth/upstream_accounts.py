"""Which identity an account at an upstream provider is, and visits to providers that are under way."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from protocol.errors import ItemFailed
from relay.auth.identities import Identity, add_identity, select_by_ids, select_by_usernames
from relay.auth.tokens import MAX_TOKEN, token_digest
from relay.auth.upstream import Claims
from relay.store.auth_tables import identities
from relay.store.sign_in_tables import upstream_accounts, upstream_visits

VISIT_LIFE = 900.0


@dataclass(frozen=True)
class Visit:
    """A visit to a provider. ``link_to`` is the identity that another one is to be linked to."""

    nonce: str
    verifier: str
    destination: str
    link_to: str | None


def begin_visit(
    connection: Connection, provider: str, browser: str, destination: str, link_to: str | None, now: float
) -> tuple[str, Visit]:
    """A new visit and its state; ``browser`` is the digest of the visitor's cookie."""
    state = secrets.token_urlsafe(32)
    visit = Visit(secrets.token_urlsafe(24), secrets.token_urlsafe(48), destination, link_to)
    connection.execute(
        insert(upstream_visits).values(
            digest=token_digest(state),
            provider=provider,
            browser=browser,
            nonce=visit.nonce,
            verifier=visit.verifier,
            destination=destination,
            identity_id=link_to,
            expires=now + VISIT_LIFE,
        )
    )
    return state, visit


def end_visit(connection: Connection, provider: str, browser: str, state: str, now: float) -> Visit | None:
    """The visit of a state, which is used up; None when this browser began no such visit at this provider."""
    if not 1 <= len(state) <= MAX_TOKEN:
        return None
    this = upstream_visits.c.digest == token_digest(state)
    row = connection.execute(select(upstream_visits).where(this)).one_or_none()
    if row is None or row.browser != browser or row.provider != provider:
        return None
    if connection.execute(delete(upstream_visits).where(this)).rowcount != 1 or row.expires <= now:
        return None
    return Visit(row.nonce, row.verifier, row.destination, row.identity_id)


def settle_identity(connection: Connection, claims: Claims, provider_id: str, now: float) -> Identity:
    """The identity of an account: the one it has been, or a new one. Raises `ItemFailed` when the name is another's.

    The account is known by issuer and subject, which never change hands; the name only describes it. An identity that
    rules have named before its owner came belongs to the first who comes under that name.
    """
    table = upstream_accounts.c
    mine = (table.issuer == claims.issuer) & (table.subject == claims.subject)
    known = connection.execute(select(table.identity_id).where(mine)).scalar_one_or_none()
    described = {"name": claims.name, "email": claims.email, "organization": claims.organization}
    if known is None:
        waiting = select_by_usernames(connection, [claims.username]).get(claims.username)
        if waiting is None:
            made = add_identity(connection, username=claims.username, now=now, provider_id=provider_id)
            known = made.id
        elif waiting.status == "unused":
            known = waiting.id
        else:
            raise ItemFailed(f"The name {claims.username} belongs to another account here.", code="EXISTS")
        connection.execute(
            insert(upstream_accounts).values(
                issuer=claims.issuer, subject=claims.subject, identity_id=known, created=now
            )
        )
    present = select_by_ids(connection, [known])[known]
    if present.status != "closed":
        values = {**described, "provider_id": provider_id, "status": "used"}
        connection.execute(update(identities).where(identities.c.id == known).values(values))
    return select_by_ids(connection, [known])[known]
