"""The developers' part of the Auth API: projects, clients, credentials, policies.

The token must carry the scope ``manage_projects``. What belongs to projects of others does not exist for the caller.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.api.auth_login import delete_copy, make_copy
from relay.api.client_authentication import authenticated_client
from relay.api.developer import Developer, body_of, developer, reading, writing
from relay.applications import policies, projects, registration
from relay.applications.documents import required
from relay.audit.notes import note
from relay.auth.clients import Client
from relay.auth.providers import sign_in_provider_ids
from relay.refusal import ApiError
from relay.services import services_of

router = APIRouter(prefix="/v2/api", tags=["Auth"])


# --- projects ---------------------------------------------------------------------------------------------------------


@router.get("/projects")
async def list_projects(request: Request, caller: Developer) -> dict[str, Any]:
    """The caller's projects."""
    found = await reading(request, caller, projects.administered)
    return {"projects": [projects.project_document(project) for project in found]}


@router.post("/projects", status_code=201)
async def create_project(request: Request, caller: Developer) -> dict[str, Any]:
    """A new project."""
    document = await body_of(request, "project")

    def work(connection: Connection, subject: Subject) -> projects.Project:
        return projects.create(connection, document, subject, caller.identity_id)

    return {"project": projects.project_document(await writing(request, caller, work))}


@router.get("/projects/{project_id}")
async def show_project(request: Request, project_id: str, caller: Developer) -> dict[str, Any]:
    """One project."""
    found = await reading(
        request, caller, lambda connection, subject: projects.require(connection, project_id, subject)
    )
    return {"project": projects.project_document(found)}


@router.put("/projects/{project_id}")
async def update_project(request: Request, project_id: str, caller: Developer) -> dict[str, Any]:
    """Change a project."""
    document = await body_of(request, "project")

    def work(connection: Connection, subject: Subject) -> projects.Project:
        return projects.change(connection, projects.require(connection, project_id, subject), document)

    return {"project": projects.project_document(await writing(request, caller, work))}


@router.delete("/projects/{project_id}")
async def delete_project(request: Request, project_id: str, caller: Developer) -> dict[str, Any]:
    """Delete a project that holds nothing any more."""

    def work(connection: Connection, subject: Subject) -> projects.Project:
        found = projects.require(connection, project_id, subject)
        projects.remove(connection, found)
        return found

    return {"project": projects.project_document(await writing(request, caller, work))}


# --- clients ----------------------------------------------------------------------------------------------------------


@router.get("/clients")
async def list_clients(request: Request, caller: Developer, fqdn: str | None = None) -> dict[str, Any]:
    """The clients of all the caller's projects."""
    if fqdn is not None:
        raise projects.not_found("client with the domain", fqdn)

    def work(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        mine = [project.id for project in projects.administered(connection, subject)]
        found = registration.of_projects(connection, mine)
        return [registration.client_document(connection, one) for one in found]

    return {"clients": await reading(request, caller, work)}


@router.post("/clients", status_code=201)
async def create_client(request: Request) -> dict[str, Any]:
    """Register a client; or, without a token, the copy that a native application makes for itself."""
    document = await body_of(request, "client")
    authorization = request.headers.get("authorization", "").lower()
    if "template_id" in document and not authorization:
        return await make_copy(request, document)
    providers = sign_in_provider_ids(services_of(request).settings)
    if authorization.startswith("basic "):
        return await _create_child(request, document, providers)
    caller = await developer(request)

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        made = registration.create(connection, document, subject, caller.identity_id, providers)
        return registration.client_document(connection, made)

    return {"client": await writing(request, caller, work)}


async def _create_child(request: Request, document: Any, providers: frozenset[str]) -> dict[str, Any]:
    """Register a client on the word of another one, which shows its own id and secret."""
    parent: Client = await authenticated_client(request, {})
    if parent.parent_id is not None:
        raise ApiError(403, "FORBIDDEN", "A copy of a native application signs people in and does nothing else.")
    services = services_of(request)
    now = services.clock()

    def work(connection: Connection) -> dict[str, Any]:
        made = registration.create_child(connection, document, parent.id, now, providers)
        return registration.client_document(connection, made)

    return {"client": await services.store.write(work)}


@router.get("/clients/{client_id}")
async def show_client(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """One client: of the caller's own projects, or any that is visible to all."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return registration.client_document(connection, registration.look(connection, client_id, subject))

    return {"client": await reading(request, caller, work)}


@router.put("/clients/{client_id}")
async def update_client(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """Change a client."""
    document = await body_of(request, "client")
    providers = sign_in_provider_ids(services_of(request).settings)

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = registration.require(connection, client_id, subject)
        changed = registration.change(connection, found, document, subject, providers)
        return registration.client_document(connection, changed)

    return {"client": await writing(request, caller, work)}


@router.delete("/clients/{client_id}")
async def delete_client(request: Request, client_id: str) -> dict[str, Any]:
    """Delete a client with all it holds; a native application's copy of itself does so on its own word."""
    if request.headers.get("authorization", "").lower().startswith("basic "):
        return await delete_copy(request, client_id)
    caller = await developer(request)

    def work(connection: Connection, subject: Subject) -> tuple[dict[str, Any], list[str]]:
        found = registration.require(connection, client_id, subject)
        document = registration.client_document(connection, found)
        removed = registration.remove(connection, found, caller.identity_id, subject.now)
        if removed.inherited:
            note(request, inherited_projects=" ".join(removed.inherited))
        return document, removed.ended

    document, ended = await writing(request, caller, work)
    for task_id in ended:
        services_of(request).steward.cut(task_id)
    return {"client": document}


# --- credentials ------------------------------------------------------------------------------------------------------


@router.get("/clients/{client_id}/credentials")
async def list_credentials(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """The secrets of a client, without the secrets themselves."""

    def work(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        return registration.secret_documents(connection, registration.require(connection, client_id, subject).client.id)

    return {"credentials": await reading(request, caller, work)}


@router.post("/clients/{client_id}/credentials", status_code=201)
async def create_credential(request: Request, client_id: str, caller: Developer) -> dict[str, Any]:
    """A further secret, shown this once."""
    name = required(await body_of(request, "credential"), "name")
    # Permission first: making a secret costs.
    await reading(request, caller, lambda connection, subject: registration.require(connection, client_id, subject))
    secret, digest = await services_of(request).secrets.make()

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = registration.require(connection, client_id, subject)
        return registration.add_secret(connection, found, name, digest, secret, subject.now)

    return {"credential": await writing(request, caller, work)}


@router.delete("/clients/{client_id}/credentials/{credential_id}")
async def delete_credential(request: Request, client_id: str, credential_id: str, caller: Developer) -> dict[str, Any]:
    """Take a secret away."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = registration.require(connection, client_id, subject)
        return registration.remove_secret(connection, found, credential_id)

    return {"credential": await writing(request, caller, work)}


# --- policies ---------------------------------------------------------------------------------------------------------


@router.get("/policies")
async def list_policies(request: Request, caller: Developer) -> dict[str, Any]:
    """The policies of all the caller's projects."""

    def work(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        mine = [project.id for project in projects.administered(connection, subject)]
        return policies.of_projects(connection, mine)

    return {"policies": await reading(request, caller, work)}


@router.post("/policies", status_code=201)
async def create_policy(request: Request, caller: Developer) -> dict[str, Any]:
    """A new policy."""
    document = await body_of(request, "policy")

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return policies.create(connection, document, subject)

    return {"policy": await writing(request, caller, work)}


@router.get("/policies/{policy_id}")
async def show_policy(request: Request, policy_id: str, caller: Developer) -> dict[str, Any]:
    """One policy."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return policies.policy_document(policies.require(connection, policy_id, subject))

    return {"policy": await reading(request, caller, work)}


@router.put("/policies/{policy_id}")
async def update_policy(request: Request, policy_id: str, caller: Developer) -> dict[str, Any]:
    """Change a policy."""
    document = await body_of(request, "policy")

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        return policies.change(connection, policies.require(connection, policy_id, subject), document, subject)

    return {"policy": await writing(request, caller, work)}


@router.delete("/policies/{policy_id}")
async def delete_policy(request: Request, policy_id: str, caller: Developer) -> dict[str, Any]:
    """Delete a policy."""

    def work(connection: Connection, subject: Subject) -> dict[str, Any]:
        row = policies.require(connection, policy_id, subject)
        policies.remove(connection, row.id)
        return policies.policy_document(row)

    return {"policy": await writing(request, caller, work)}
