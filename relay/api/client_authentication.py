"""Which client a request of the OAuth routes is from, and the forms these routes take (RFC 6749, 2.3 and 3.2)."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from fastapi import Request

from protocol.places import neighbourhood
from relay.api.bodies import body_untrusted
from relay.audit.notes import acting
from relay.auth.clients import Client
from relay.auth.public_clients import client_for
from relay.refusal import ApiError
from relay.services import services_of

MAX_FORM = 64 * 1024
_MAX_FIELDS = 50


def form_description(*required: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The form of a route for the OpenAPI description."""
    properties = {name: {"type": "string"} for name in (*required, *optional)}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"requestBody": {"content": {"application/x-www-form-urlencoded": {"schema": schema}}}}


def address_of(request: Request) -> str:
    """Where a request comes from, for people to see."""
    return request.client.host if request.client else "unknown"


def caller_of(request: Request) -> str:
    """As whom limits count whoever sent a request without having said who they are."""
    return neighbourhood(address_of(request))


async def identified_client(request: Request, form: Mapping[str, str]) -> Client:
    """The client of a request: one with a secret has shown it, a public one has named itself.

    Raises `ApiError` as `authenticated_client` does.
    """
    if "authorization" in request.headers or "client_secret" in form:
        return await authenticated_client(request, form)
    services = services_of(request)
    unregistered = services.settings.sign_in.unregistered_clients
    client_id = form.get("client_id", "")
    client = await services.store.read(lambda connection: client_for(connection, client_id, unregistered=unregistered))
    if client is None or not client.public:
        raise _invalid_client("The request shows no client id and secret.")
    return client


async def authenticated_client(request: Request, form: Mapping[str, str]) -> Client:
    """The client whose id and secret the request shows, by HTTP Basic or in the form (RFC 6749, 2.3.1).

    Raises `ApiError`: 401 ``invalid_client``, 400 ``invalid_request`` for both ways at once, 429 after many failures.
    """
    client_id, secret = _credentials_untrusted(request.headers.get("authorization"), form)
    services = services_of(request)
    caller = caller_of(request)
    # By address and client, so that nobody locks a client out from elsewhere. An address gets more tries in all,
    # because many people may share one.
    pair, crowd = f"{caller} {client_id[:36]}", f"{caller} *"
    # Whoever has many waiting holds up themselves alone, and those behind as many wrong ones are not looked at.
    async with services.secrets.turns.of(caller):
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
    acting(request, None, client.id)
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
    except ValueError as error:
        raise _invalid_client("The HTTP Basic header cannot be read.") from error
    if form.get("client_id", client_id) != client_id:
        raise ApiError(400, "invalid_request", "The request names two different clients.")
    return unquote_plus(client_id), unquote_plus(secret)


def _invalid_client(sentence: str) -> ApiError:
    return ApiError(401, "invalid_client", sentence, headers={"WWW-Authenticate": 'Basic realm="Globus Auth"'})


async def form_untrusted(request: Request) -> dict[str, str]:
    """The fields of a form. Repeated fields are refused (RFC 6749, 3.2), since readers could differ on which counts."""
    kind = request.headers.get("content-type", "application/x-www-form-urlencoded").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ApiError(400, "invalid_request", "The body must be application/x-www-form-urlencoded.")
    body = await body_untrusted(request, MAX_FORM)
    if body is None:
        raise ApiError(413, "invalid_request", f"The form is larger than {MAX_FORM} bytes.")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError as error:
        raise ApiError(400, "invalid_request", "The form cannot be read.") from error
    form = dict(pairs)
    if len(form) != len(pairs):
        raise ApiError(400, "invalid_request", "A field of the form is repeated.")
    return form
