"""The Auth API's routes about people: who the caller is, who others are, what was consented to."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy import Connection

from relay.api.auth_tokens import identity_in_set, seen_at
from relay.api.bearer import Caller, auth_caller
from relay.api.client_authentication import authenticated_client
from relay.auth.browser_sessions import Authentication
from relay.auth.codes import authentications_of
from relay.auth.consents import consents_of, document
from relay.auth.identities import (
    Identity,
    add_identity,
    normal_username,
    provider_id_of,
    select_by_ids,
    select_by_usernames,
)
from relay.auth.linked import primary_of, set_of
from relay.auth.providers import IdentityProvider, identity_providers, named_after
from relay.auth.scopes import MANAGE_PROJECTS, VIEW_CONSENTS, VIEW_IDENTITY_SET
from relay.auth.upstream import provider_identity_id
from relay.refusal import ApiError, too_many
from relay.services import Services, services_of
from relay.settings import Settings

router = APIRouter(prefix="/v2", tags=["Auth"])

MAX_LOOKUPS = 500
# How many people one person may name, in so many seconds, before they come: each stays in the database.
PROVISIONS, PROVISIONS_PERIOD = 1000, 86400.0


@router.get("/oauth2/userinfo")
async def userinfo(request: Request, caller: Caller = Depends(auth_caller)) -> dict[str, Any]:
    """The caller's own identity (OpenID Connect Core 1.0, 5.3); how much is told depends on the token's scopes."""
    if "openid" not in caller.scopes:
        raise ApiError(403, "FORBIDDEN", "The token does not carry the scope openid.")

    def look(connection: Connection) -> tuple[list[Identity], dict[str, Authentication]]:
        return set_of(connection, caller.identity_id), authentications_of(connection, caller.session_id)

    linked, shown = await services_of(request).store.read(look)
    (identity,) = [item for item in linked if item.id == caller.identity_id]
    document: dict[str, Any] = {"sub": identity.id, "last_authentication": int(caller.authenticated)}
    if "profile" in caller.scopes:
        document |= {
            "preferred_username": identity.username,
            "name": identity.name,
            "organization": identity.organization,
            "identity_provider": identity.provider_id,
            "identity_provider_display_name": identity.username.rpartition("@")[2],
        }
    if "email" in caller.scopes:
        document["email"] = identity.email
    if VIEW_IDENTITY_SET in caller.scopes:
        document["identity_set"] = [identity_in_set(item, seen_at(shown, item.id, caller)) for item in linked]
    return document


async def _known_caller(request: Request) -> str:
    """The id of the identity that asks: by bearer token, or a client by its secret, as confidential clients may."""
    if not request.headers.get("authorization", "").lower().startswith("basic "):
        return (await auth_caller(request)).identity_id
    client = await authenticated_client(request, {})
    if client.parent_id is not None:
        # Anybody may have a copy of a native application without asking; who uses it shows a person's token.
        raise ApiError(403, "FORBIDDEN", "A copy of an application is nobody: sign in, and ask with your token.")
    return client.id


@router.get("/api/identities")
async def find_identities(
    request: Request,
    ids: str | None = None,
    usernames: str | None = None,
    provision: str = "false",
    include: str = "",
    caller_id: str = Depends(_known_caller),
) -> dict[str, Any]:
    """Identities by ``ids`` or by ``usernames``, comma-separated lists; unknown ones are left out.

    With ``provision=true``, usernames of the domains known here that nobody has yet are given an identity, so that
    rules can name people before they come; a bounded number in a day (`PROVISIONS`).
    """
    if (ids is None) == (usernames is None):
        raise ApiError(400, "INVALID_REQUEST", "Give either ids or usernames, one of the two.")
    if provision.lower() not in ("true", "false"):
        raise ApiError(400, "INVALID_REQUEST", "provision must be true or false.")
    services = services_of(request)
    if ids is not None:
        wanted = [_normal_id(part) for part in _split(ids)]
        found = await services.store.read(lambda connection: select_by_ids(connection, wanted))
    else:
        names = [_checked_username(part) for part in _split(usernames or "")]
        found = await services.store.read(lambda connection: select_by_usernames(connection, names))
        missing = [name for name in names if name not in found]
        vouchers, now = _vouchers(services.settings), services.clock()
        new = {name for name in missing if name.rpartition("@")[2] in vouchers}
        if provision.lower() == "true" and new:
            await _count_new(services, caller_id, len(new), now)
            found = await services.store.write(lambda connection: _provision(connection, names, vouchers, now))
    document: dict[str, Any] = {"identities": [_identity_document(identity) for identity in found.values()]}
    if "identity_provider" in include.split(","):
        providers = {identity.provider_id: identity.username.rpartition("@")[2] for identity in found.values()}
        document["included"] = {
            "identity_providers": [_provider_document(named_after(key, domain)) for key, domain in providers.items()]
        }
    return document


@router.get("/api/identity_providers", dependencies=[Depends(_known_caller)])
async def find_providers(request: Request, ids: str | None = None, domains: str | None = None) -> dict[str, Any]:
    """The identity providers of this relay with these ``ids`` or ``domains``."""
    if (ids is None) == (domains is None):
        raise ApiError(400, "INVALID_REQUEST", "Give either ids or domains, one of the two.")
    documents = [_provider_document(one) for one in identity_providers(services_of(request).settings)]
    asked_ids, asked_domains = set(_split(ids or "")), {part.lower() for part in _split(domains or "")}
    chosen = [item for item in documents if item["id"] in asked_ids or asked_domains & set(item["domains"])]
    return {"identity_providers": chosen}


@router.get("/api/identities/{identity_id}/consents")
async def consents(
    request: Request,
    identity_id: str,
    all_clients: str = Query("false", alias="all"),
    caller: Caller = Depends(auth_caller),
) -> dict[str, Any]:
    """What the caller has consented to: for the asking client alone, or with ``all`` for every one."""
    if identity_id != caller.identity_id:
        raise ApiError(403, "FORBIDDEN", "Consents are shown only to the identity that gave them.")
    whole = all_clients.lower() == "true"
    if whole and not caller.scopes & {VIEW_CONSENTS, MANAGE_PROJECTS}:
        raise ApiError(403, "FORBIDDEN", f"The token does not carry the scope {VIEW_CONSENTS}.")

    def look(connection: Connection) -> list[Mapping[str, Any]]:
        found = consents_of(connection, identity_id, None if whole else caller.client_id)
        return [document(connection, consent, identity_id) for consent in found]

    return {"consents": await services_of(request).store.read(look)}


def _vouchers(settings: Settings) -> dict[str, str]:
    """The domains in which people are named here, each with the id of the provider that names them."""
    of_providers = {
        domain: provider_identity_id(provider)
        for provider in settings.sign_in.providers
        for domain in provider.domains
        if domain != "*"
    }
    return {**of_providers, settings.user_domain: provider_id_of(settings.user_domain)}


async def _count_new(services: Services, caller_id: str, count: int, now: float) -> None:
    """Count people whom a person names before they come. Raises `ApiError` 429 when these are too many."""
    person = await services.store.read(lambda connection: primary_of(connection, caller_id))
    balance = services.provisions.take(person, now, count)
    if balance is not None and balance.wait:
        seconds = max(1, math.ceil(balance.wait))
        raise too_many(
            f"At most {balance.limit} people in a day may be named by one person before they sign in here; "
            f"go on in {seconds} s.",
            seconds,
        )


def _provision(
    connection: Connection, names: Iterable[str], vouchers: Mapping[str, str], now: float
) -> dict[str, Identity]:
    found = select_by_usernames(connection, names)
    for name in names:
        provider_id = vouchers.get(name.rpartition("@")[2])
        if name not in found and provider_id is not None:
            found[name] = add_identity(connection, username=name, now=now, provider_id=provider_id, status="unused")
    return found


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > MAX_LOOKUPS:
        raise ApiError(400, "INVALID_REQUEST", f"At most {MAX_LOOKUPS} may be asked for at once.")
    return parts


def _normal_id(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise ApiError(400, "INVALID_REQUEST", f"{text[:100]!r} is no identity id.") from error


def _checked_username(text: str) -> str:
    try:
        return normal_username(text)
    except ValueError as error:
        raise ApiError(400, "INVALID_REQUEST", str(error)) from error


def _identity_document(identity: Identity) -> dict[str, Any]:
    return {
        "id": identity.id,
        "username": identity.username,
        "name": identity.name,
        "email": identity.email,
        "organization": identity.organization,
        "status": identity.status,
        "identity_type": identity.kind,
        "identity_provider": identity.provider_id,
    }


def _provider_document(provider: IdentityProvider) -> dict[str, Any]:
    return {
        "id": provider.id,
        "name": provider.name,
        "short_name": provider.short_name,
        "domains": list(provider.domains),
        "alternative_names": [],
    }
