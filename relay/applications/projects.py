"""Projects: groups of applications with the people who administer them.

Who is not an administrator of a project learns nothing of it: for them it does not exist.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from relay.access.decisions import Subject
from relay.applications import documents
from relay.auth.identities import Identity, select_by_ids
from relay.refusal import ApiError
from relay.store.application_tables import policies, project_admins, projects, registrations

MAX_PROJECTS = 100


@dataclass(frozen=True)
class Project:
    """One project with its administrators."""

    id: str
    display_name: str
    contact_email: str
    admins: tuple[Identity, ...]


def not_found(what: str, id_: str) -> ApiError:
    """What does not exist and what is somebody else's look the same."""
    return ApiError(404, "NOT_FOUND", f"There is no {what} '{id_[:64]}'.")


def administered(connection: Connection, subject: Subject) -> list[Project]:
    """The projects of a person, oldest first."""
    mine = select(project_admins.c.project_id).where(project_admins.c.identity_id.in_(subject.identities))
    rows = connection.execute(select(projects).where(projects.c.id.in_(mine)).order_by(projects.c.created)).all()
    return [_with_admins(connection, row) for row in rows]


def require(connection: Connection, project_id: str, subject: Subject) -> Project:
    """A project that the person administers. Raises `ApiError` 404."""
    row = connection.execute(select(projects).where(projects.c.id == project_id.lower()[:36])).first()
    if row is not None:
        project = _with_admins(connection, row)
        if any(admin.id in subject.identities for admin in project.admins):
            return project
    raise not_found("project", project_id)


def _with_admins(connection: Connection, row: Any) -> Project:
    query = select(project_admins.c.identity_id).where(project_admins.c.project_id == row.id)
    known = select_by_ids(connection, connection.execute(query).scalars().all())
    admins = sorted(known.values(), key=lambda identity: identity.username)
    return Project(row.id, row.display_name, row.contact_email, tuple(admins))


def create(connection: Connection, document: Mapping[str, Any], subject: Subject, caller_id: str) -> Project:
    """A new project; without ``admin_ids`` its maker administers it. Raises `ApiError` 400, 409."""
    admins = _admins(connection, document) or [caller_id]
    # Not those that somebody administers: others name them for that without asking.
    mine = projects.c.created_by.in_(subject.identities)
    if connection.execute(select(func.count()).select_from(projects).where(mine)).scalar_one() >= MAX_PROJECTS:
        raise ApiError(409, "CONFLICT", f"You have made {MAX_PROJECTS} projects, the most allowed.")
    project_id = str(uuid.uuid4())
    connection.execute(
        insert(projects).values(
            id=project_id,
            display_name=documents.required(document, "display_name"),
            contact_email=documents.email(document, "contact_email"),
            created=subject.now,
            created_by=caller_id,
        )
    )
    _set_admins(connection, project_id, admins)
    row = connection.execute(select(projects).where(projects.c.id == project_id)).one()
    return _with_admins(connection, row)


def change(connection: Connection, project: Project, document: Mapping[str, Any]) -> Project:
    """Change the keys that are present. Raises `ApiError` 400."""
    values: dict[str, Any] = {}
    if "display_name" in document:
        values["display_name"] = documents.required(document, "display_name")
    if "contact_email" in document:
        values["contact_email"] = documents.email(document, "contact_email")
    if values:
        connection.execute(update(projects).where(projects.c.id == project.id).values(**values))
    if document.get("admin_ids") is not None or document.get("admin_group_ids"):
        admins = _admins(connection, document)
        if not admins:
            raise documents.invalid("A project needs at least one administrator.")
        _set_admins(connection, project.id, admins)
    return _with_admins(connection, connection.execute(select(projects).where(projects.c.id == project.id)).one())


def remove(connection: Connection, project: Project) -> None:
    """Delete a project that holds nothing any more. Raises `ApiError` 409."""
    for table in (registrations, policies):
        if connection.execute(select(table.c.project_id).where(table.c.project_id == project.id)).first() is not None:
            raise ApiError(409, "CONFLICT", "The project still has clients or policies; delete them first.")
    connection.execute(delete(projects).where(projects.c.id == project.id))


def inherit(connection: Connection, leaving_id: str, heir_id: str) -> list[str]:
    """Let an heir administer the projects that an identity about to be deleted administers alone, so that what they
    hold stays in reach; returns their ids. Raises `ApiError` 409 when that identity is the heir itself.
    """
    other = project_admins.alias().c
    mine = project_admins.c
    others = exists(
        select(other.identity_id).where(other.project_id == mine.project_id, other.identity_id != leaving_id)
    )
    query = select(mine.project_id).where(mine.identity_id == leaving_id, ~others)
    alone = list(connection.execute(query).scalars())
    if alone and heir_id == leaving_id:
        sentence = "You are the only administrator of a project; name another one for it, or delete it, first."
        raise ApiError(409, "CONFLICT", sentence)
    for project_id in alone:
        connection.execute(insert(project_admins).values(project_id=project_id, identity_id=heir_id))
    return alone


def _admins(connection: Connection, document: Mapping[str, Any]) -> list[str]:
    if document.get("admin_group_ids"):
        raise ApiError(501, "NOT_IMPLEMENTED", "This relay has no groups; name the administrators in admin_ids.")
    wanted = [documents.identifier(value, "admin_ids") for value in documents.texts(document, "admin_ids") or ()]
    unknown = set(wanted) - set(select_by_ids(connection, wanted))
    if unknown:
        raise documents.invalid(f"admin_ids: there is no identity '{min(unknown)}'.")
    return wanted


def _set_admins(connection: Connection, project_id: str, admins: list[str]) -> None:
    connection.execute(delete(project_admins).where(project_admins.c.project_id == project_id))
    rows = [{"project_id": project_id, "identity_id": identity_id} for identity_id in dict.fromkeys(admins)]
    connection.execute(insert(project_admins), rows)


def project_document(project: Project) -> dict[str, Any]:
    """The project document of the Auth API."""
    people = [
        {
            "id": admin.id,
            "username": admin.username,
            "name": admin.name,
            "email": admin.email,
            "organization": admin.organization,
            "identity_provider": admin.provider_id,
            "identity_type": admin.kind,
            "status": admin.status,
        }
        for admin in project.admins
    ]
    return {
        "id": project.id,
        "display_name": project.display_name,
        "project_name": project.display_name,
        "contact_email": project.contact_email,
        "admin_ids": [admin.id for admin in project.admins],
        "admin_group_ids": None,
        "admins": {"identities": people, "groups": []},
    }
