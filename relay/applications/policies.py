"""Authentication policies: what an application demands of how, when and as whom somebody has signed in."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from relay.access.decisions import Subject
from relay.applications import documents, projects
from relay.refusal import ApiError
from relay.store.application_tables import policies

LONGEST_TIMEOUT = 30 * 86400
MAX_POLICIES = 200
_CONSTRAINTS = (("domain_constraints_include", "domains_include"), ("domain_constraints_exclude", "domains_exclude"))


def of_projects(connection: Connection, project_ids: Iterable[str]) -> list[dict[str, Any]]:
    """The policies of some projects, oldest first."""
    query = select(policies).where(policies.c.project_id.in_(list(project_ids))).order_by(policies.c.created)
    return [policy_document(row) for row in connection.execute(query)]


def require(connection: Connection, policy_id: str, subject: Subject) -> Row[Any]:
    """A policy of a project that the person administers. Raises `ApiError` 404."""
    row = connection.execute(select(policies).where(policies.c.id == policy_id.lower()[:36])).first()
    if row is not None:
        try:
            projects.require(connection, row.project_id, subject)
        except ApiError as error:
            raise projects.not_found("policy", policy_id) from error
        return row
    raise projects.not_found("policy", policy_id)


def create(connection: Connection, document: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    """A new policy. Raises `ApiError` 400, 404, 409."""
    project_id = documents.identifier(document.get("project_id"), "project_id")
    projects.require(connection, project_id, subject)
    if len(of_projects(connection, [project_id])) >= MAX_POLICIES:
        raise ApiError(409, "CONFLICT", f"A project has at most {MAX_POLICIES} policies.")
    complete = {"high_assurance": False, "required_mfa": False, **document}
    documents.required(document, "display_name")
    documents.required(document, "description")
    values = {
        "assurance_timeout": None,
        "domains_include": None,
        "domains_exclude": None,
        **_values(complete),
        "id": str(uuid.uuid4()),
        "project_id": project_id,
        "created": subject.now,
    }
    _check(values)
    connection.execute(insert(policies).values(**values))
    return policy_document(connection.execute(select(policies).where(policies.c.id == values["id"])).one())


def change(connection: Connection, row: Row[Any], document: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    """Change the keys that are present. Raises `ApiError` 400, 404."""
    values = _values(document)
    if document.get("project_id") is not None:
        values["project_id"] = documents.identifier(document["project_id"], "project_id")
        projects.require(connection, values["project_id"], subject)
    _check({**row._mapping, **values})
    if values:
        connection.execute(update(policies).where(policies.c.id == row.id).values(**values))
    return policy_document(connection.execute(select(policies).where(policies.c.id == row.id)).one())


def remove(connection: Connection, policy_id: str) -> None:
    """Delete a policy; requests that name it are refused from then on."""
    connection.execute(delete(policies).where(policies.c.id == policy_id))


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in ("display_name", "description"):
        if key in document:
            values[key] = documents.required(document, key)
    for key in ("high_assurance", "required_mfa"):
        if document.get(key) is not None:
            values[key] = documents.switch(document, key, False)
    if "authentication_assurance_timeout" in document:
        values["assurance_timeout"] = _timeout(document["authentication_assurance_timeout"])
    for key, column in _CONSTRAINTS:
        if key in document:
            wanted = documents.domains(document, key)
            values[column] = None if wanted is None else json.dumps(wanted)
    return values


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST_TIMEOUT:
        raise documents.invalid(f"authentication_assurance_timeout must be 1 to {LONGEST_TIMEOUT} seconds.")
    return float(value)


def _check(values: Mapping[Any, Any]) -> None:
    if values["high_assurance"] and values["assurance_timeout"] is None:
        raise documents.invalid("A high assurance policy needs an authentication_assurance_timeout.")


def policy_document(row: Row[Any]) -> dict[str, Any]:
    """The policy document of the Auth API."""
    timeout = row.assurance_timeout
    return {
        "id": row.id,
        "project_id": row.project_id,
        "display_name": row.display_name,
        "description": row.description,
        "high_assurance": row.high_assurance,
        "authentication_assurance_timeout": None if timeout is None else int(timeout),
        "required_mfa": row.required_mfa,
        "domain_constraints_include": None if row.domains_include is None else json.loads(row.domains_include),
        "domain_constraints_exclude": None if row.domains_exclude is None else json.loads(row.domains_exclude),
    }
