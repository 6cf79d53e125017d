"""One application: its settings, its secrets, the scopes it offers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.applications import custom_scopes, documents, registration
from relay.applications.registration import Registered
from relay.audit.notes import note
from relay.pages.browser import go
from relay.pages.developers.frame import HOME, Visit, doing, looking, unknown
from relay.pages.developers.scope import scope_document_of
from relay.pages.render import PageProblem
from relay.services import services_of

router = APIRouter(include_in_schema=False)


@router.get(HOME + "/applications/{client_id}")
async def show_application_page(request: Request, client_id: str) -> HTMLResponse:
    """The application."""
    return await _page(await looking(request), client_id)


async def _page(visit: Visit, client_id: str, secret: str = "", name: str = "") -> HTMLResponse:
    def look(connection: Connection, subject: Subject) -> dict[str, Any]:
        found = registration.require(connection, client_id, subject)
        return {
            "found": found,
            "secrets": registration.secret_documents(connection, found.client.id),
            "scopes": custom_scopes.of_clients(connection, [found.client.id]),
        }

    origin = services_of(visit.request).settings.public_url
    facts = await visit.read(look)
    return visit.page("application", secret=secret, secret_name=name, origin=origin, providers=visit.providers, **facts)


@router.post(HOME + "/applications/{client_id}")
async def change_application_page(request: Request, client_id: str) -> Response:
    """Change the application, its secrets or its scopes; or delete it."""
    visit, deed = await doing(request, "application")
    deeds = {"change": _change, "end": _end_secret, "scope": _scope, "delete": _delete}
    if deed != "secret" and deed not in deeds:
        raise unknown()

    def work(connection: Connection, subject: Subject) -> str:
        return deeds[deed](connection, registration.require(connection, client_id, subject), subject, visit)

    try:
        return await _new_secret(visit, client_id) if deed == "secret" else go(await visit.write(work))
    except PageProblem as problem:
        return await visit.again(problem, lambda: _page(visit, client_id))


async def _new_secret(visit: Visit, client_id: str) -> HTMLResponse:
    # Permission first: making a secret costs.
    await visit.read(lambda connection, subject: registration.require(connection, client_id, subject))
    secret, digest = await services_of(visit.request).secrets.make()

    def work(connection: Connection, subject: Subject) -> str:
        found = registration.require(connection, client_id, subject)
        name = documents.required({"name": visit.text("name")}, "name")
        registration.add_secret(connection, found, name, digest, secret, subject.now)
        return name

    return await _page(visit, client_id, secret, await visit.write(work))


def _place(found: Registered) -> str:
    return f"{HOME}/applications/{found.client.id}"


def _change(connection: Connection, found: Registered, subject: Subject, visit: Visit) -> str:
    document = {
        "name": visit.text("name"),
        "redirect_uris": visit.lines("redirect_uris"),
        "visibility": "public" if visit.ticked("public") else "private",
        "links": {key: visit.text(key) for key in ("terms_and_conditions", "privacy_policy")},
        "required_idp": visit.text("required_idp"),
        "preselect_idp": visit.text("preselect_idp"),
    }
    providers = {provider.id for provider in visit.providers}
    return _place(registration.change(connection, found, document, subject, providers))


def _end_secret(connection: Connection, found: Registered, _subject: Subject, visit: Visit) -> str:
    registration.remove_secret(connection, found, visit.fields.get("secret", ""))
    return _place(found)


def _scope(connection: Connection, found: Registered, subject: Subject, visit: Visit) -> str:
    custom_scopes.create(connection, found.client.id, scope_document_of(visit), subject)
    return _place(found)


def _delete(connection: Connection, found: Registered, subject: Subject, visit: Visit) -> str:
    removed = registration.remove(connection, found, visit.identity.id, subject.now)
    visit.ended += removed.ended
    if removed.inherited:
        note(visit.request, inherited_projects=" ".join(removed.inherited))
    return f"{HOME}/projects/{found.project_id}"
