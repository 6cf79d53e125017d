"""Who is calling: the bearer token of a request, looked up once, in one place.

The dependencies here are the only way a route learns of its caller. A missing, unknown, expired or revoked token and a
token for another service are all 401 and look the same from outside.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from relay.audit.notes import acting
from relay.auth.scopes import AUTH_SERVER, TRANSFER_ALL, TRANSFER_SERVER
from relay.auth.tokens import TokenRecord, find
from relay.quota.requests import count
from relay.refusal import ApiError
from relay.services import services_of

TRANSFER_UNAUTHENTICATED = "ClientError.AuthenticationFailed"


@dataclass(frozen=True)
class Caller:
    """The identity in whose name a request is made, and what its token allows."""

    identity_id: str
    username: str
    name: str | None
    client_id: str
    scopes: frozenset[str]
    email: str | None = None
    session_id: str = ""
    provider_id: str = ""
    authenticated: float = 0.0


async def transfer_caller(request: Request) -> Caller:
    """The caller of a Transfer API route. Raises `ApiError` 401 ``ClientError.AuthenticationFailed``."""
    caller = await _caller(request, TRANSFER_SERVER)
    if caller is None or TRANSFER_ALL not in caller.scopes:
        raise _unauthenticated(TRANSFER_UNAUTHENTICATED, "No credentials were given, or they are no longer valid.")
    return caller


async def auth_caller(request: Request) -> Caller:
    """The caller of an Auth API route. Raises `ApiError` 401 ``UNAUTHORIZED``."""
    caller = await _caller(request, AUTH_SERVER)
    if caller is None:
        raise _unauthenticated("UNAUTHORIZED", "Call must be authenticated.")
    return caller


async def _caller(request: Request, resource_server: str) -> Caller | None:
    token = bearer_token_untrusted(request.headers.get("authorization", ""))
    if token is None:
        return None
    services = services_of(request)
    now = services.clock()
    record = await services.store.read(lambda connection: find(connection, token, now))
    if record is None or record.kind != "access" or record.resource_server != resource_server:
        return None
    acting(request, record.identity_id, record.client_id)
    # By identity, not by token: whoever makes many tokens gets no more by it.
    count(request, services.requests, record.identity_id, now)
    return _from_record(record)


def bearer_token_untrusted(header: str) -> str | None:
    """The token of an Authorization header (RFC 6750), or None."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip().isascii() and token.strip() else None


def _from_record(record: TokenRecord) -> Caller:
    return Caller(
        identity_id=record.identity_id,
        username=record.username,
        name=record.name,
        client_id=record.client_id,
        scopes=frozenset(record.scopes),
        email=record.email,
        session_id=record.session_id,
        provider_id=record.provider_id,
        authenticated=record.authenticated,
    )


def _unauthenticated(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers={"WWW-Authenticate": "Bearer"})
