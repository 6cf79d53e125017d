"""Discovery, public keys, and the clients that native applications make for themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from relay.api.client_authentication import authenticated_client, caller_of
from relay.api.token_grants import DEVICE_CODE, GRANT_TYPES
from relay.auth import public_clients
from relay.auth.clients import Client
from relay.auth.public_clients import WELL_KNOWN, client_for, remove_client
from relay.auth.scopes import OPENID_SCOPES, VIEW_IDENTITY_SET
from relay.keys import ID_TOKEN_ALGORITHM
from relay.refusal import ApiError
from relay.services import services_of
from relay.times import iso

router = APIRouter(tags=["Auth"])


@router.get("/.well-known/openid-configuration")
@router.get("/.well-known/oauth-authorization-server", include_in_schema=False)
async def discovery(request: Request) -> dict[str, Any]:
    """OpenID Connect Discovery 1.0; for clients of plain OAuth, RFC 8414."""
    origin = services_of(request).settings.public_url
    return {
        "issuer": origin,
        "authorization_endpoint": f"{origin}/v2/oauth2/authorize",
        "token_endpoint": f"{origin}/v2/oauth2/token",
        "userinfo_endpoint": f"{origin}/v2/oauth2/userinfo",
        "revocation_endpoint": f"{origin}/v2/oauth2/token/revoke",
        "introspection_endpoint": f"{origin}/v2/oauth2/token/introspect",
        "jwks_uri": f"{origin}/jwk.json",
        "scopes_supported": [*sorted(OPENID_SCOPES), VIEW_IDENTITY_SET],
        "response_types_supported": ["code"],
        "response_modes_supported": ["query"],
        "grant_types_supported": list(GRANT_TYPES),
        "device_authorization_endpoint": f"{origin}/v2/oauth2/device_authorization",
        "code_challenge_methods_supported": ["S256"],
        "authorization_response_iss_parameter_supported": True,
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [ID_TOKEN_ALGORITHM],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
        "claims_supported": [
            "iss",
            "sub",
            "aud",
            "iat",
            "exp",
            "nonce",
            "at_hash",
            "auth_time",
            "name",
            "email",
            "preferred_username",
            "identity_provider",
            "identity_provider_display_name",
            "organization",
            "last_authentication",
        ],
    }


@router.get("/jwk.json")
async def keys(request: Request) -> JSONResponse:
    """The public keys of id_tokens (RFC 7517), the one in use first."""
    return JSONResponse(services_of(request).keys.jwk_set)


async def make_copy(request: Request, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """An installation's own copy of a native application, as the Globus CLI asks for at its first login.

    ``wanted`` is Globus's document of a client.
    """
    services = services_of(request)
    beginner, now = [f"{caller_of(request)} copies"], services.clock()
    template_id = wanted.get("template_id")
    if not isinstance(template_id, str) or template_id not in WELL_KNOWN:
        raise ApiError(403, "FORBIDDEN", "Without credentials, only copies of known native applications can be made.")
    name = wanted.get("name")
    if name is not None and (not isinstance(name, str) or not name.strip() or not name.isprintable()):
        raise ApiError(400, "INVALID_REQUEST", "name must be a text that can be shown.")
    wait = services.crowd_guesses.retry_after(beginner, now)
    if wait > 0:
        seconds = str(math.ceil(wait))
        raise ApiError(
            429, "TOO_MANY_REQUESTS", "Too many clients were made from here.", headers={"Retry-After": seconds}
        )
    services.crowd_guesses.failed(beginner, now)
    secret, digest = await services.secrets.make()

    def work(connection: Connection) -> tuple[Client, str]:
        template = client_for(connection, template_id, unregistered=False)
        assert template is not None
        return public_clients.make_copy(connection, template, name or template.name, now=now, digest=digest)

    client, secret_id = await services.store.write(work)
    credential = {
        "id": secret_id,
        "name": "default",
        "client": client.id,
        "created": iso(now),
        "secret": secret,
    }
    return {"client": copy_document(client), "included": {"client_credential": credential}}


async def delete_copy(request: Request, client_id: str) -> dict[str, Any]:
    """End a copy of a native application, on its own word, with all that it was allowed."""
    client = await authenticated_client(request, {})
    if client.id != client_id.lower() or client.parent_id is None:
        raise ApiError(403, "FORBIDDEN", "A client can delete only itself, and only when it is a copy.")
    await services_of(request).store.write(lambda connection: remove_client(connection, client.id))
    return {"client": copy_document(client)}


def copy_document(client: Client) -> dict[str, Any]:
    """A copy as Globus's clients read it."""
    return {
        "id": client.id,
        "name": client.name,
        "client_type": "confidential_client",
        "public_client": False,
        "visibility": "private",
        "project": None,
        "parent_client": client.parent_id,
        "redirect_uris": list(client.redirect_uris),
        "links": {"terms_and_conditions": None, "privacy_policy": None},
        "scopes": [],
        "grant_types": ["authorization_code", "refresh_token", DEVICE_CODE],
        "fqdns": [],
        "required_idp": None,
        "preselect_idp": None,
        "prompt_for_named_grant": False,
        "userinfo_from_effective_identity": True,
    }
