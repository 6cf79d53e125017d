"""The OAuth 2.0 routes of the Auth API: tokens given, checked and ended (RFC 6749, 7009, 7662)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from relay.api.bearer import Caller
from relay.api.client_authentication import (
    address_of,
    authenticated_client,
    caller_of,
    form_description,
    form_untrusted,
    identified_client,
)
from relay.api.token_grants import Giving, refusal
from relay.audit.notes import acting, note, quiet
from relay.auth import device
from relay.auth.browser_sessions import Authentication
from relay.auth.codes import authentications_of
from relay.auth.consents import below
from relay.auth.grants import GrantRefused
from relay.auth.identities import Identity
from relay.auth.known_scopes import expand
from relay.auth.linked import set_of
from relay.auth.public_clients import ensure_row
from relay.auth.scopes import InvalidScope, parse_untrusted
from relay.auth.tokens import TokenRecord, find, revoke
from relay.refusal import ApiError
from relay.services import Services, services_of

router = APIRouter(prefix="/v2/oauth2", tags=["Auth"])

# What a device that waits for its user hears again and again.
WAITING = frozenset({"authorization_pending", "slow_down"})
_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}
_TOKEN_FIELDS = (
    "scope",
    "code",
    "redirect_uri",
    "code_verifier",
    "refresh_token",
    "device_code",
    "token",
    "access_type",
    "client_id",
    "client_secret",
)


@router.post("/token", openapi_extra=form_description("grant_type", optional=_TOKEN_FIELDS))
async def token(request: Request) -> JSONResponse:
    """Tokens for a grant (RFC 6749, 4; RFC 8628, 3.4; and Globus's dependent tokens)."""
    services = services_of(request)
    form = await form_untrusted(request)
    client = await identified_client(request, form)
    giving = Giving(services, client, form, services.clock())

    def work(connection: Connection) -> Any:
        outcome = giving.run(connection)
        if not isinstance(outcome, GrantRefused):
            note(request, grant=form["grant_type"], scope=_scopes(outcome))
            # In whose name the client acts with it.
            given = find(connection, _documents(outcome)[0]["access_token"], giving.now) if outcome else None
            acting(request, None if given is None else given.identity_id, client.id)
        elif outcome.code in WAITING:
            quiet(request)
        return outcome

    try:
        outcome = await services.store.write(work)
    except GrantRefused as error:
        raise refusal(error) from error
    if isinstance(outcome, GrantRefused):
        raise refusal(outcome)
    return JSONResponse(outcome, headers=_NO_STORE)


def _scopes(outcome: Any) -> str:
    """All scopes of an answer with tokens, for the audit log."""
    return " ".join(document["scope"] for document in _documents(outcome))


def _documents(outcome: Any) -> list[dict[str, Any]]:
    return outcome if isinstance(outcome, list) else [outcome, *outcome.get("other_tokens", ())]


@router.post("/device_authorization", openapi_extra=form_description(optional=("client_id", "scope", "access_type")))
async def device_authorization(request: Request) -> JSONResponse:
    """Begin signing in on another device (RFC 8628, 3.1)."""
    services = services_of(request)
    form = await form_untrusted(request)
    client = await identified_client(request, form)
    if form.get("access_type", "online") not in ("online", "offline"):
        raise ApiError(400, "invalid_request", "access_type must be online or offline.")
    now, settings = services.clock(), services.settings
    scope, agent = form.get("scope", ""), request.headers.get("user-agent", "")
    # Nobody has shown who they are yet, and every request leaves a row behind.
    beginner = [f"{caller_of(request)} devices"]
    wait = services.crowd_guesses.retry_after(beginner, now)
    if wait > 0:
        later = {"Retry-After": str(math.ceil(wait))}
        raise ApiError(429, "slow_down", "Too many sign-ins were begun from here.", headers=later)
    services.crowd_guesses.failed(beginner, now)

    def begin(connection: Connection) -> device.NewDeviceCode:
        try:
            if not parse_untrusted(scope):
                raise ApiError(400, "invalid_scope", "The request names no scope.")
            expand(connection, parse_untrusted(scope).values())
        except InvalidScope as error:
            raise ApiError(400, "invalid_scope", str(error)) from error
        if device.count_waiting(connection, now) >= device.MAX_WAITING:
            raise ApiError(429, "slow_down", "Too many sign-ins wait; try again later.", headers={"Retry-After": "60"})
        ensure_row(connection, client, now)
        return device.begin(
            connection,
            client.id,
            scope,
            offline=form.get("access_type") == "offline",
            address=address_of(request),
            user_agent=agent,
            now=now,
            life=settings.sign_in.device_code_life,
        )

    made = await services.store.write(begin)
    page = f"{settings.public_url}/device"
    document = {
        "device_code": made.device_code,
        "user_code": made.user_code,
        "verification_uri": page,
        "verification_uri_complete": f"{page}?user_code={made.user_code}",
        "expires_in": int(settings.sign_in.device_code_life),
        "interval": device.INTERVAL,
    }
    return JSONResponse(document, headers=_NO_STORE)


@router.post("/token/validate", openapi_extra=form_description("token"))
async def validate(request: Request) -> dict[str, bool]:
    """Whether a token of this client is alive."""
    services = services_of(request)
    form = await form_untrusted(request)
    client = await identified_client(request, form)
    record = await _find(services, form.get("token", ""))
    alive = record is not None and record.client_id == client.id and record.replaced is None
    return {"active": alive}


@router.post("/token/introspect", openapi_extra=form_description("token", optional=("include",)))
async def introspect(request: Request) -> dict[str, Any]:
    """What a token stands for, told to the client that holds it or the service it is meant for."""
    services = services_of(request)
    form = await form_untrusted(request)
    client = await authenticated_client(request, form)
    record = await _find(services, form.get("token", ""))
    if record is None or client.id not in (record.client_id, record.resource_server):
        return {"active": False}
    include = {part.strip() for part in form.get("include", "").split(",") if part.strip()}
    document = _introspection(record, services.settings.public_url)
    found = record

    def more(connection: Connection) -> dict[str, Any]:
        shown = authentications_of(connection, found.session_id)
        added: dict[str, Any] = {"dependent_tokens_cache_id": _cache_id(connection, found)}
        if "session_info" in include:
            added["session_info"] = _session_info(found, shown.values())
        if "identity_set" in include or "identity_set_detail" in include:
            linked = set_of(connection, found.identity_id)
            if "identity_set" in include:
                added["identity_set"] = [identity.id for identity in linked]
            if "identity_set_detail" in include:
                added["identity_set_detail"] = [
                    identity_in_set(identity, seen_at(shown, identity.id, found)) for identity in linked
                ]
        return added

    return document | await services.store.read(more)


def _cache_id(connection: Connection, record: TokenRecord) -> str:
    """Under which a service may keep the dependent tokens of a token: another one as soon as it would get others.

    They belong to the session of the token, and hold what stands below its scopes in the person's consents.
    """
    allowed = below(connection, record.identity_id, record.client_id, record.scopes)
    given = sorted(f"{scope} {lasting}" for scope, lasting in allowed.items())
    text = " ".join([record.session_id, record.resource_server, *given])
    return hashlib.sha256(text.encode()).hexdigest()


@router.post("/token/revoke", openapi_extra=form_description(optional=("token", "client_id")))
async def end(request: Request) -> dict[str, bool]:
    """End a token. Succeeds whether or not there is such a token; clients signing out may send an empty one.

    A client that shows credentials must show the right ones; one that names only its id may end what it holds.
    """
    services = services_of(request)
    form = await form_untrusted(request)
    if "authorization" in request.headers or "client_secret" in form:
        await authenticated_client(request, form)
    shown = form.get("token", "")

    def work(connection: Connection) -> None:
        owner = revoke(connection, shown)
        if owner is not None:
            note(request, identity=owner)

    if shown:
        await services.store.write(work)
    return {"active": False}


def _introspection(record: TokenRecord, issuer: str) -> dict[str, Any]:
    return {
        "active": True,
        "token_type": "Bearer",
        "scope": " ".join(record.scopes),
        "client_id": record.client_id,
        "sub": record.identity_id,
        "username": record.username,
        "name": record.name,
        "email": record.email,
        "exp": int(record.expires),
        "iat": int(record.issued),
        "nbf": int(record.issued),
        "aud": list(dict.fromkeys([record.resource_server, record.client_id])),
        "iss": issuer,
    }


def identity_in_set(identity: Identity, authenticated: float | None) -> dict[str, Any]:
    """One identity as an element of an identity set."""
    return {
        "sub": identity.id,
        "username": identity.username,
        "name": identity.name,
        "email": identity.email,
        "organization": identity.organization,
        "identity_provider": identity.provider_id,
        "identity_provider_display_name": identity.username.rpartition("@")[2],
        "last_authentication": None if authenticated is None else int(authenticated),
    }


def _session_info(record: TokenRecord, shown: Iterable[Authentication]) -> dict[str, Any]:
    """A client that acts for itself has shown who it is with its secret, which no table keeps."""
    own = Authentication(record.identity_id, record.provider_id, record.authenticated, ())
    return {
        "session_id": record.session_id,
        "authentications": {
            item.identity_id: {
                "acr": None,
                "amr": list(item.methods) or None,
                "idp": item.provider_id,
                "auth_time": int(item.authenticated),
                "custom_claims": {},
            }
            for item in (list(shown) or [own])
        },
    }


def seen_at(shown: Mapping[str, Authentication], identity_id: str, record: TokenRecord | Caller) -> float | None:
    """When an identity showed who it is in the session of a token, if it did."""
    if identity_id in shown:
        return shown[identity_id].authenticated
    return record.authenticated if not shown and identity_id == record.identity_id else None


async def _find(services: Services, shown: str) -> TokenRecord | None:
    now = services.clock()
    return await services.store.read(lambda connection: find(connection, shown, now))
