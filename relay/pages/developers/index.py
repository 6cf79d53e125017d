"""All that somebody has registered, and the form with which an application is registered in one go."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.applications import projects, registration
from relay.applications.operator import KINDS
from relay.audit.notes import note
from relay.pages.developers.frame import HOME, Visit, doing, looking, unknown
from relay.pages.render import PageProblem
from relay.services import services_of

router = APIRouter(include_in_schema=False)


@router.get(HOME)
async def overview(request: Request) -> HTMLResponse:
    """Projects and applications."""
    return await _page(await looking(request))


async def _page(visit: Visit) -> HTMLResponse:
    def look(connection: Connection, subject: Subject) -> list[dict[str, Any]]:
        return [
            {"project": project, "applications": registration.of_projects(connection, [project.id])}
            for project in projects.administered(connection, subject)
        ]

    return visit.page("index", found=await visit.read(look))


@router.post(HOME)
async def register(request: Request) -> Response:
    """Register an application, in a new project when none is chosen, and show its secret, this once."""
    visit, deed = await doing(request, "application")
    if deed != "register":
        raise unknown()
    try:
        made, shown = await _register(visit)
    except PageProblem as problem:
        return await visit.again(problem, lambda: _page(visit))
    return visit.page("registered", made=made, secret=shown, origin=services_of(request).settings.public_url)


async def _register(visit: Visit) -> tuple[registration.Registered, str | None]:
    kind = KINDS.get(visit.fields.get("kind", ""))
    if kind is None:
        raise PageProblem(400, "That did not work", "Choose what kind of application it is.")
    secret, digest = await services_of(visit.request).secrets.make()

    def work(connection: Connection, subject: Subject) -> tuple[registration.Registered, str | None]:
        project_id = visit.text("project") or _new_project(connection, subject, visit)
        document = {
            "name": visit.text("name"),
            "project": project_id,
            "client_type": kind,
            "redirect_uris": visit.lines("redirect_uris"),
        }
        made = registration.create(connection, document, subject, visit.identity.id)
        note(visit.request, client_id=made.client.id)
        if made.client.public:
            return made, None
        registration.add_secret(connection, made, "first", digest, secret, subject.now)
        return made, secret

    return await visit.write(work)


def _new_project(connection: Connection, subject: Subject, visit: Visit) -> str:
    mail = visit.text("contact_email") or visit.identity.email or ""
    document = {"display_name": visit.text("name"), "contact_email": mail}
    return projects.create(connection, document, subject, visit.identity.id).id
