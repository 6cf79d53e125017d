"""The claims of id_tokens (OpenID Connect Core 1.0, 2), as Globus's clients and web frameworks check them."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from relay.auth.identities import Identity

LIFE = 48 * 3600


def claims_of(
    identity: Identity,
    *,
    issuer: str,
    client_id: str,
    access_token: str,
    nonce: str | None,
    authenticated: float,
    scopes: frozenset[str],
    provider_name: str,
    now: float,
) -> dict[str, Any]:
    """What an id_token says; how much depends on the scopes. Times are Unix seconds."""
    claims: dict[str, Any] = {
        "iss": issuer,
        "aud": client_id,
        "sub": identity.id,
        "iat": int(now),
        "exp": int(now) + LIFE,
        "auth_time": int(authenticated),
        "last_authentication": int(authenticated),
        "at_hash": at_hash(access_token),
    }
    if nonce is not None:
        claims["nonce"] = nonce
    if "profile" in scopes:
        claims |= {
            "preferred_username": identity.username,
            "name": identity.name,
            "organization": identity.organization,
            "identity_provider": identity.provider_id,
            "identity_provider_display_name": provider_name,
        }
    if "email" in scopes:
        claims["email"] = identity.email
    return claims


def at_hash(access_token: str) -> str:
    """The left half of the token's SHA-512, for id_tokens signed with RS512 (OpenID Connect Core 1.0, 3.1.3.6)."""
    digest = hashlib.sha512(access_token.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=").decode()
