"""The developers' part of the Auth API: projects, clients, credentials, policies.

The token must carry the scope ``manage_projects``. What belongs to projects of others does not exist for the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
import trio
from fastapi import APIRouter, Depends, Request
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.access.principals import subject_of
from relay.api.auth_login import delete_copy, make_copy
from relay.api.errors import ApiError
from relay.applications import policies, projects, registration
from relay.applications.documents import invalid, required, wrapped
from relay.auth.bearer import Caller, auth_caller
from relay.auth.clients import new_digest
from relay.auth.scopes import MANAGE_PROJECTS
from relay.services import services_of

router = APIRouter(prefix="/v2/api", tags=["Auth"])
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


Developer = Annotated[Caller, Depends(developer)]


async def _body(request: Request, key: str) -> Any:
    body = await request.body()
    if len(body) > MAX_BODY:
        raise ApiError(413, "REQUEST_TOO_LARGE", f"The document is larger than {MAX_BODY} bytes.")
    try:
        return wrapped(msgspec.json.decode(body), key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid("The body of the request is not JSON.") from error


async def _read(request: Request, caller: Caller, work: Callable[[Connection, Subject], T]) -> T:
    services = services_of(request)
    now = services.clock()
    return await services.store.read(
        lambda connection: work(connection, subject_of(connection, caller.identity_id, now))
    )


async def _write(request: Request, caller: Caller, work: Callable[[Connection, Subject], T]) -> T:
    services = services_of(request)
    now = services.clock()
    return await services.store.write(
        lambda connection: work(connection, subject_of(connection, caller.identity_id, now))
    )


# --- projects ---------------------------------------------------------------------------------------------------------


@router.get("/projects")
async def list_projects(request: Request, caller: Developer) -> dict[str, Any]:
    """The caller's projects."""
    found = await _read(request, caller, projects.administered)
    return {"projects": [projects.project_document(project) for project in found]}


@router.post("/projects", status_code=201)
async def create_project(request: Request, caller: Developer) -> dict[str, Any]:
    """A new project."""
    document = await _body(request, "project")

    def work(connection: Connection, subject: Subject) -> projects.Project:
        return projects.create(connection, document, subject, caller.identity_id)

    return {"project": projects.project_document(await _write(request, caller, work))}


@router.get("/projects/{project_id}")
async def show_project(request: Request, project_id: str, caller: Developer) -> dict[str, Any]:
    """One project."""
    found = await _read(request, caller, lambda connection, subject: projects.require(connection, project_id, subject))
    return {"project": projects.project_document(found)}


@router.put("/projects/{project_id}")
async def update_project(request: Request, project_id: str, caller: Developer) -> dict[str, Any]:
    """Change a project."""
    document = await _body(request, "project")

    def work(connection: Connection, subject: Subject) -> projects.Project:
        return projects.change(connection, projects.require(connection, project_id, subject), document)

    return {"project": projects.project_document(await _write(request, caller, work))}


@router.delete("/projects/{project_id}")
async def delete_project(request: Request, project_id: str, caller: Developer) -> dict[str, Any]:
    """Delete a project that holds nothing any more."""

    def work(connection: Connection, subject: Subject) -> projects.Project:
        found = projects.require(connection, project_id, subject)
        projects.remove(connection, found)
        return found

    return {"project": projects.project_document(await _write(request, caller, work))}


# --- clients ----------------------------------------------------------------------------------------------------------


@router.get("/clients")
async def list_clients(request: Request, caller: Developer, fqdn: str | None = None) -> dict[str, Any]:
    """The clients of all the caller's projects."""
    if fqdn is not None:
        raise projects.not_found("client with the domain", fqdn)

    def work(connection: Connection, subject: Subject) -> list[registration.Registered]:
        mine = [project.id for project in projects.administered(connection, subject)]
        return registration.of_projects(connection, mine)

    return {"clients": [registration.client_document(one) for one in await _read(request, caller, work)]}


@router.post("/clients", status_code=201)
async def create_client(request: Request) -> dict[str, Any]:
    """Register a client; or, without a token, the copy that a native application makes for itself."""
    document = await _body(request, "client")
    authorization = request.headers.get("authorization", "").lower()
    if "template_id" in document and not authorization:
        return await make_copy(request, document)
    if authorization.startswith("basic "):
        raise ApiError(501, "NOT_IMPLEMENTED", "Clients cannot make child clients here; register them in a project.")
    caller = await developer(request)

    def work(connection: Connection, subject: Subject) -> registration.Registered:
        return registration.create(connection, document, subject, caller.identity_id)

    return {"client": registration.client_document(await _write(request, caller, work))}


@router.get("/clients/{client_id}")
async def show_client(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """One client."""
    found = await _read(
        request, caller, lambda connection, subject: registration.require(connection, client_id, subject)
    )
    return {"client": registration.client_document(found)}


@router.put("/clients/{client_id}")
async def update_client(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """Change a client."""
    document = await _body(request, "client")

    def work(connection: Connection, subject: Subject) -> registration.Registered:
        found = registration.require(connection, client_id, subject)
        return registration.change(connection, found, document, subject)

    return {"client": registration.client_document(await _write(request, caller, work))}


@router.delete("/clients/{client_id}")
async def delete_client(request: Request, client_id: str) -> dict[str, Any]:
    """Delete a client with all it holds; a native application's copy of itself does so on its own word."""
    if request.headers.get("authorization", "").lower().startswith("basic "):
        return await delete_copy(request, client_id)
    caller = await developer(request)

    def work(connection: Connection, subject: Subject) -> registration.Registered:
        found = registration.require(connection, client_id, subject)
        registration.remove(connection, found)
        return found

    return {"client": registration.client_document(await _write(request, caller, work))}


# --- credentials ------------------------------------------------------------------------------------------------------


@router.get("/clients/{client_id}/credentials")
async def list_credentials(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """The secrets of a client, without the secrets themselves."""

    def work(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        return registration.secret_documents(connection, registration.require(connection, client_id, subject).client.id)

    return {"credentials": await _read(request, caller, work)}


@router.post("/clients/{client_id}/credentials", status_code=201)
async def create_credential(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """A further secret, shown this once."""
    name = required(await _body(request, "credential"), "name")
    # Permission first: making a secret costs.
    await _read(request, caller, lambda connection, subject: registration.require(connection, client_id, subject))
    secret, digest = await trio.to_thread.run_sync(new_digest)

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = registration.require(connection, client_id, subject)
        return registration.add_secret(connection, found, name, digest, secret, subject.now)

    return {"credential": await _write(request, caller, work)}


@router.delete("/clients/{client_id}/credentials/{credential_id}")
async def delete_credential(request: Request, client_id: str, credential_id: str, caller: Developer) -> dict[str, Any]:
    """Take a secret away."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = registration.require(connection, client_id, subject)
        return registration.remove_secret(connection, found, credential_id)

    return {"credential": await _write(request, caller, work)}


# --- policies ---------------------------------------------------------------------------------------------------------


@router.get("/policies")
async def list_policies(request: Request, caller: Developer) -> dict[str, Any]:
    """The policies of all the caller's projects."""

    def work(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        mine = [project.id for project in projects.administered(connection, subject)]
        return policies.of_projects(connection, mine)

    return {"policies": await _read(request, caller, work)}


@router.post("/policies", status_code=201)
async def create_policy(request: Request, caller: Developer) -> dict[str, Any]:
    """A new policy."""
    document = await _body(request, "policy")

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return policies.create(connection, document, subject)

    return {"policy": await _write(request, caller, work)}


@router.get("/policies/{policy_id}")
async def show_policy(request: Request, policy_id: str, caller: Developer) -> dict[str, Any]:
    """One policy."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return policies.policy_document(policies.require(connection, policy_id, subject))

    return {"policy": await _read(request, caller, work)}


@router.put("/policies/{policy_id}")
async def update_policy(request: Request, policy_id: str, caller: Developer) -> dict[str, Any]:
    """Change a policy."""
    document = await _body(request, "policy")

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return policies.change(connection, policies.require(connection, policy_id, subject), document, subject)

    return {"policy": await _write(request, caller, work)}


@router.delete("/policies/{policy_id}")
async def delete_policy(request: Request, policy_id: str, caller: Developer) -> dict[str, Any]:
    """Delete a policy."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        row = policies.require(connection, policy_id, subject)
        policies.remove(connection, row.id)
        return policies.policy_document(row)

    return {"policy": await _write(request, caller, work)}
