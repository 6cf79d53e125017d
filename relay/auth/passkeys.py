"""Passkeys (WebAuthn level 2): made and checked with the webauthn library; the database keeps the public halves."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import webauthn
from sqlalchemy import Connection, delete, insert, select, update
from webauthn.helpers import base64url_to_bytes, bytes_to_base64url, options_to_json
from webauthn.helpers.exceptions import WebAuthnException
from webauthn.helpers.structs import (
    AuthenticatorSelectionCriteria,
    PublicKeyCredentialDescriptor,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)

from protocol.errors import ItemFailed
from relay.auth.identities import Identity
from relay.store.sign_in_tables import passkeys

MAX_PASSKEYS = 20
MAX_NAME = 100
# A credential as a browser sends it; attestations are not asked for, so it stays small.
MAX_CREDENTIAL = 32 * 1024
# How long a challenge may be answered, in seconds.
CHALLENGE_LIFE = 300.0
# What reading a credential of a browser's making may raise.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
# A passkey proves possession and, because user verification is required, a second factor (RFC 8176).
METHODS = ("hwk", "user", "mfa")


class PasskeyRefused(ItemFailed):
    """The passkey is not taken; the sentence says why."""

    default_code = "PASSKEY_REFUSED"


class AnsweredChallenges:
    """Which challenges were answered rightly, so that each counts once (WebAuthn level 2, 13.4.3): passkeys that are
    kept in the cloud count no uses, and an answer that somebody has seen would let them in, too.

    Only right answers are kept, and no longer than challenges live, so that strangers fill no memory. What was answered
    is forgotten with the process: challenges from before ``started`` (Unix seconds) count no more. `take` is for
    writing transactions, of which there is one at a time.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._answered: dict[bytes, float] = {}

    def counts(self, since: float, now: float) -> bool:
        """Whether a challenge that was offered then may still be answered."""
        return self._started <= since and now - since <= CHALLENGE_LIFE

    def take(self, challenge: bytes, now: float) -> None:
        """A challenge was answered. Raises `PasskeyRefused` when it was before."""
        self._answered = {key: end for key, end in self._answered.items() if end >= now}
        if challenge in self._answered:
            raise PasskeyRefused("This answer was used already; try the passkey again.")
        self._answered[challenge] = now + CHALLENGE_LIFE


@dataclass(frozen=True)
class Passkey:
    """One passkey. Times are Unix seconds."""

    id: str
    identity_id: str
    name: str
    created: float
    last_used: float | None


@dataclass(frozen=True)
class Site:
    """The relay as authenticators know it: host name without a port, and origin."""

    host: str
    origin: str
    name: str


def passkeys_of(connection: Connection, identity_ids: Collection[str]) -> list[Passkey]:
    """All passkeys of these identities, the oldest first."""
    query = select(passkeys).where(passkeys.c.identity_id.in_(list(identity_ids))).order_by(passkeys.c.created)
    return [Passkey(row.id, row.identity_id, row.name, row.created, row.last_used) for row in connection.execute(query)]


def creation_options(site: Site, identity: Identity, present: Collection[Passkey], challenge: bytes) -> dict[str, Any]:
    """What a browser needs to make a passkey."""
    options = webauthn.generate_registration_options(
        rp_id=site.host,
        rp_name=site.name,
        user_id=identity.id.encode(),
        user_name=identity.username,
        user_display_name=identity.name or identity.username,
        challenge=challenge,
        authenticator_selection=AuthenticatorSelectionCriteria(
            resident_key=ResidentKeyRequirement.REQUIRED, user_verification=UserVerificationRequirement.REQUIRED
        ),
        exclude_credentials=[PublicKeyCredentialDescriptor(id=base64url_to_bytes(key.id)) for key in present],
    )
    document: dict[str, Any] = json.loads(options_to_json(options))
    return document


def request_options(site: Site, challenge: bytes) -> dict[str, Any]:
    """What a browser needs to use a passkey, whichever it has for this relay."""
    options = webauthn.generate_authentication_options(
        rp_id=site.host, challenge=challenge, user_verification=UserVerificationRequirement.REQUIRED
    )
    document: dict[str, Any] = json.loads(options_to_json(options))
    return document


def add_untrusted(
    connection: Connection, site: Site, identity: Identity, credential: str, challenge: bytes, name: str, now: float
) -> None:
    """Keep a passkey that a browser has just made. Raises `PasskeyRefused`."""
    if len(passkeys_of(connection, [identity.id])) >= MAX_PASSKEYS:
        raise PasskeyRefused(f"You have {MAX_PASSKEYS} passkeys; remove one first.")
    if len(credential) > MAX_CREDENTIAL:
        raise PasskeyRefused("The passkey is too large.")
    try:
        verified = webauthn.verify_registration_response(
            credential=credential,
            expected_challenge=challenge,
            expected_rp_id=site.host,
            expected_origin=site.origin,
            require_user_verification=True,
        )
    except (WebAuthnException, *_UNREADABLE) as error:
        raise PasskeyRefused("The passkey cannot be read, or belongs to another site.") from error
    key_id = bytes_to_base64url(verified.credential_id)
    if connection.execute(select(passkeys.c.id).where(passkeys.c.id == key_id)).first() is not None:
        raise PasskeyRefused("This passkey is known here already.")
    connection.execute(
        insert(passkeys).values(
            id=key_id,
            identity_id=identity.id,
            public_key=verified.credential_public_key,
            sign_count=verified.sign_count,
            name=(name.strip() or "Passkey")[:MAX_NAME],
            created=now,
        )
    )


def check_untrusted(connection: Connection, site: Site, credential: str, challenge: bytes, now: float) -> str:
    """The id of the identity that has shown its passkey. Raises `PasskeyRefused`."""
    wrong = PasskeyRefused("This passkey is not known here.")
    if len(credential) > MAX_CREDENTIAL:
        raise wrong
    try:
        document = json.loads(credential)
        key_id = bytes_to_base64url(base64url_to_bytes(document["rawId"]))
    except _UNREADABLE as error:
        raise wrong from error
    row = connection.execute(select(passkeys).where(passkeys.c.id == key_id)).one_or_none()
    if row is None:
        raise wrong
    try:
        verified = webauthn.verify_authentication_response(
            credential=credential,
            expected_challenge=challenge,
            expected_rp_id=site.host,
            expected_origin=site.origin,
            credential_public_key=row.public_key,
            # A count that does not grow is the sign of a copied authenticator; the library refuses it.
            credential_current_sign_count=row.sign_count,
            require_user_verification=True,
        )
    except (WebAuthnException, *_UNREADABLE) as error:
        raise wrong from error
    values = {"sign_count": verified.new_sign_count, "last_used": now}
    connection.execute(update(passkeys).where(passkeys.c.id == key_id).values(values))
    identity_id: str = row.identity_id
    return identity_id


def remove(connection: Connection, identity_ids: Collection[str], key_id: str) -> bool:
    """Forget a passkey of one of these identities; returns whether there was one."""
    mine = (passkeys.c.id == key_id) & passkeys.c.identity_id.in_(list(identity_ids))
    return connection.execute(delete(passkeys).where(mine)).rowcount > 0
