"""One project: what it is called, who administers it, its policies."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.applications import documents, policies, projects, registration
from relay.applications.projects import Project
from relay.auth.identities import select_by_usernames
from relay.pages.browser import go
from relay.pages.developers.frame import HOME, Visit, doing, looking, unknown
from relay.pages.developers.policy import policy_document_of
from relay.pages.render import PageProblem
from relay.services import services_of

router = APIRouter(include_in_schema=False)


@router.get(HOME + "/projects/{project_id}")
async def show_project_page(request: Request, project_id: str) -> HTMLResponse:
    """The project."""
    return await _page(await looking(request), project_id)


async def _page(visit: Visit, project_id: str) -> HTMLResponse:
    def look(connection: Connection, subject: Subject) -> dict[str, Any]:
        project = projects.require(connection, project_id, subject)
        return {
            "project": project,
            "applications": registration.of_projects(connection, [project.id]),
            "policies": policies.of_projects(connection, [project.id]),
        }

    return visit.page("project", **await visit.read(look))


@router.post(HOME + "/projects/{project_id}")
async def change_project_page(request: Request, project_id: str) -> Response:
    """Change the project, its administrators or its policies; or delete it."""
    visit, deed = await doing(request, "project")
    deeds = {"change": _change, "add": _add, "leave": _leave, "policy": _policy, "delete": _delete}
    if deed not in deeds:
        raise unknown()
    domain = services_of(request).settings.user_domain

    def work(connection: Connection, subject: Subject) -> str:
        return deeds[deed](connection, projects.require(connection, project_id, subject), subject, visit, domain)

    try:
        return go(await visit.write(work))
    except PageProblem as problem:
        return await visit.again(problem, lambda: _page(visit, project_id))


def _place(project: Project) -> str:
    return f"{HOME}/projects/{project.id}"


def _change(connection: Connection, project: Project, _subject: Subject, visit: Visit, _domain: str) -> str:
    document = {"display_name": visit.text("display_name"), "contact_email": visit.text("contact_email")}
    return _place(projects.change(connection, project, document))


def _add(connection: Connection, project: Project, _subject: Subject, visit: Visit, domain: str) -> str:
    name = (visit.text("username") or "").lower()
    name = name if "@" in name else f"{name}@{domain}"
    found = select_by_usernames(connection, [name]).get(name)
    if found is None:
        raise documents.invalid(f"Nobody here is called {name[:300]}.")
    wanted = [*(admin.id for admin in project.admins), found.id]
    return _place(projects.change(connection, project, {"admin_ids": wanted}))


def _leave(connection: Connection, project: Project, subject: Subject, visit: Visit, _domain: str) -> str:
    wanted = [admin.id for admin in project.admins if admin.id != visit.fields.get("identity")]
    after = projects.change(connection, project, {"admin_ids": wanted})
    return _place(after) if any(admin.id in subject.identities for admin in after.admins) else HOME


def _policy(connection: Connection, project: Project, subject: Subject, visit: Visit, _domain: str) -> str:
    policies.create(connection, {**policy_document_of(visit), "project_id": project.id}, subject)
    return _place(project)


def _delete(connection: Connection, project: Project, _subject: Subject, _visit: Visit, _domain: str) -> str:
    projects.remove(connection, project)
    return HOME
