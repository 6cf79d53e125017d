"""What the routes of the developers' API have in common: who may call them, and how they reach the database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.access.principals import subject_of
from relay.api.bearer import Caller, auth_caller
from relay.api.bodies import body_untrusted
from relay.api.documents import NOT_JSON, decoded_untrusted
from relay.applications.documents import invalid, wrapped
from relay.auth.scopes import MANAGE_PROJECTS, VIEW_CLIENTS_AND_SCOPES
from relay.refusal import ApiError
from relay.services import services_of

MAX_BODY = 256 * 1024
T = TypeVar("T")


async def developer(request: Request) -> Caller:
    """The caller, whose token must allow managing projects. Raises `ApiError` 401, 403."""
    caller = await auth_caller(request)
    if MANAGE_PROJECTS not in caller.scopes:
        raise ApiError(
            403,
            "FORBIDDEN",
            "The token does not carry the scope manage_projects.",
            extra={"required_scopes": [MANAGE_PROJECTS]},
        )
    return caller


async def scope_reader(request: Request) -> Caller:
    """The caller, whose token must allow managing projects or looking at scopes. Raises `ApiError` 401, 403."""
    caller = await auth_caller(request)
    if not caller.scopes & {MANAGE_PROJECTS, VIEW_CLIENTS_AND_SCOPES}:
        raise ApiError(
            403,
            "FORBIDDEN",
            "The token carries neither of the scopes manage_projects and view_clients_and_scopes.",
            extra={"required_scopes": [VIEW_CLIENTS_AND_SCOPES]},
        )
    return caller


Developer = Annotated[Caller, Depends(developer)]


async def body_of(request: Request, key: str) -> Any:
    """The object under the one key of the request's body. Raises `ApiError` 400, 413, 503."""
    body = await body_untrusted(request, MAX_BODY)
    if body is None:
        raise ApiError(413, "REQUEST_TOO_LARGE", f"The document is larger than {MAX_BODY} bytes.")
    try:
        return wrapped(await decoded_untrusted(request, body), key)
    except NOT_JSON as error:
        raise invalid("The body of the request is not JSON.") from error


async def reading(request: Request, caller: Caller, work: Callable[[Connection, Subject], T]) -> T:
    """Look something up for the caller."""
    services = services_of(request)
    now = services.clock()
    return await services.store.read(
        lambda connection: work(connection, subject_of(connection, caller.identity_id, now))
    )


async def writing(request: Request, caller: Caller, work: Callable[[Connection, Subject], T]) -> T:
    """Change something for the caller, in one transaction."""
    services = services_of(request)
    now = services.clock()
    return await services.store.write(
        lambda connection: work(connection, subject_of(connection, caller.identity_id, now))
    )
