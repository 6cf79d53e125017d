"""The OAuth 2.0 routes of the Auth API: tokens given, checked and ended (RFC 6749, 7009, 7662)."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from relay.api.errors import ApiError
from relay.auth import grants
from relay.auth.clients import Client
from relay.auth.grants import GrantRefused, Lives
from relay.auth.identities import Identity, select_by_ids
from relay.auth.tokens import TokenRecord, find, revoke
from relay.services import Services, services_of

router = APIRouter(prefix="/v2/oauth2", tags=["Auth"])

MAX_FORM = 64 * 1024
_MAX_FIELDS = 50
_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


def _form_description(*required: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    properties = {name: {"type": "string"} for name in (*required, *optional)}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"requestBody": {"content": {"application/x-www-form-urlencoded": {"schema": schema}}}}


@router.post("/token", openapi_extra=_form_description("grant_type", optional=("scope", "refresh_token")))
async def token(request: Request) -> JSONResponse:
    """Tokens for a grant: ``client_credentials`` or ``refresh_token``."""
    services = services_of(request)
    form = await _form_untrusted(request)
    client = await authenticated_client(request, form)
    now = services.clock()
    lives = Lives(services.settings.sign_in.access_token_life, services.settings.sign_in.refresh_token_life)
    scope = form.get("scope", "")

    def grant(connection: Connection) -> dict[str, Any]:
        match form.get("grant_type"):
            case "client_credentials":
                issued = grants.client_credentials(connection, client, scope, now=now, lives=lives)
            case "refresh_token":
                shown = form.get("refresh_token", "")
                issued = [grants.refresh(connection, client.id, shown, scope, now=now, lives=lives)]
            case None:
                raise ApiError(400, "invalid_request", "The request names no grant_type.")
            case other:
                raise ApiError(400, "unsupported_grant_type", f"This relay does not know the grant {other[:100]!r}.")
        return grants.token_document(issued)

    try:
        document = await services.store.write(grant)
    except GrantRefused as error:
        # 401 for a dead grant, as Globus answers: its clients then ask for a new login.
        raise ApiError(401 if error.code == "invalid_grant" else 400, error.code, str(error)) from error
    return JSONResponse(document, headers=_NO_STORE)


@router.post("/token/validate", openapi_extra=_form_description("token"))
async def validate(request: Request) -> dict[str, bool]:
    """Whether a token of this client is alive."""
    services = services_of(request)
    form = await _form_untrusted(request)
    client = await authenticated_client(request, form)
    record = await _find(services, form.get("token", ""))
    return {"active": record is not None and record.client_id == client.id}


@router.post("/token/introspect", openapi_extra=_form_description("token", optional=("include",)))
async def introspect(request: Request) -> dict[str, Any]:
    """What a token stands for, told to the client that holds it or the service it is meant for."""
    services = services_of(request)
    form = await _form_untrusted(request)
    client = await authenticated_client(request, form)
    record = await _find(services, form.get("token", ""))
    if record is None or client.id not in (record.client_id, record.resource_server):
        return {"active": False}
    include = {part.strip() for part in form.get("include", "").split(",")}
    document = _introspection(record, services.settings.public_url)
    if "session_info" in include:
        document["session_info"] = {
            "session_id": record.session_id,
            "authentications": {
                record.identity_id: {
                    "acr": None,
                    "amr": None,
                    "idp": record.provider_id,
                    "auth_time": int(record.authenticated),
                    "custom_claims": {},
                }
            },
        }
    if "identity_set" in include:
        document["identity_set"] = [record.identity_id]
    if "identity_set_detail" in include:
        known = await services.store.read(lambda connection: select_by_ids(connection, [record.identity_id]))
        document["identity_set_detail"] = [
            identity_in_set(identity, record.authenticated) for identity in known.values()
        ]
    return document


@router.post("/token/revoke", openapi_extra=_form_description(optional=("token", "client_id")))
async def end(request: Request) -> dict[str, bool]:
    """End a token. Succeeds whether or not there is such a token; clients signing out may send an empty one.

    A client that shows credentials must show the right ones; one that names only its id may end what it holds.
    """
    services = services_of(request)
    form = await _form_untrusted(request)
    if "authorization" in request.headers or "client_secret" in form:
        await authenticated_client(request, form)
    shown = form.get("token", "")
    if shown:
        await services.store.write(lambda connection: revoke(connection, shown))
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


async def _find(services: Services, shown: str) -> TokenRecord | None:
    now = services.clock()
    return await services.store.read(lambda connection: find(connection, shown, now))


async def authenticated_client(request: Request, form: Mapping[str, str]) -> Client:
    """The client whose id and secret the request shows, by HTTP Basic or in the form (RFC 6749, 2.3.1).

    Raises `ApiError`: 401 ``invalid_client``, 400 ``invalid_request`` for both ways at once, 429 after many failures.
    """
    client_id, secret = _credentials_untrusted(request.headers.get("authorization"), form)
    services = services_of(request)
    address = request.client.host if request.client else "unknown"
    # By address and client, so that nobody locks a client out from elsewhere. An address gets more tries in all,
    # because many people may share one.
    pair, crowd = f"{address} {client_id[:36]}", f"{address} *"
    now = services.clock()
    wait = max(services.guesses.retry_after([pair], now), services.crowd_guesses.retry_after([crowd], now))
    if wait > 0:
        seconds = math.ceil(wait)
        sentence = f"Too many wrong secrets were tried; try again in {seconds} seconds."
        raise ApiError(429, "too_many_requests", sentence, headers={"Retry-After": str(seconds)})
    client = await services.secrets.check(client_id, secret)
    if client is None:
        services.guesses.failed([pair], now)
        services.crowd_guesses.failed([crowd], now)
        raise _invalid_client("The client is unknown or its secret is wrong.")
    return client


def _credentials_untrusted(header: str | None, form: Mapping[str, str]) -> tuple[str, str]:
    if header is None:
        if not form.get("client_id") or not form.get("client_secret"):
            raise _invalid_client("The request shows no client id and secret.")
        return form["client_id"], form["client_secret"]
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        raise _invalid_client("Clients sign in with HTTP Basic, or with id and secret in the form.")
    if "client_secret" in form:
        raise ApiError(400, "invalid_request", "The request shows the client's secret in two ways.")
    try:
        client_id, _, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise _invalid_client("The HTTP Basic header cannot be read.") from error
    if form.get("client_id", client_id) != client_id:
        raise ApiError(400, "invalid_request", "The request names two different clients.")
    return unquote_plus(client_id), unquote_plus(secret)


def _invalid_client(sentence: str) -> ApiError:
    return ApiError(401, "invalid_client", sentence, headers={"WWW-Authenticate": 'Basic realm="Globus Auth"'})


async def _form_untrusted(request: Request) -> dict[str, str]:
    """The fields of a form. Repeated fields are refused (RFC 6749, 3.2), since readers could differ on which counts."""
    kind = request.headers.get("content-type", "application/x-www-form-urlencoded").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ApiError(400, "invalid_request", "The body must be application/x-www-form-urlencoded.")
    body = bytearray()
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_FORM:
                raise ApiError(413, "invalid_request", f"The form is larger than {MAX_FORM} bytes.")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError as error:
        raise ApiError(400, "invalid_request", "The form cannot be read.") from error
    form = dict(pairs)
    if len(form) != len(pairs):
        raise ApiError(400, "invalid_request", "A field of the form is repeated.")
    return form
