"""Roles on collections: who beside the owner may manage them or watch over their tasks."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from relay.access.decisions import ROLES
from relay.auth.identities import select_by_ids
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer.collections import Collection
from relay.transfer.fields import Fields

MAX_ROLES = 1000


@dataclass(frozen=True)
class Grant:
    """One role given to one identity. ``id`` is null for the owner, who is an administrator without a row."""

    id: str | None
    principal: str
    role: str
    principal_type: str = "identity"


def role_document(grant: Grant) -> dict[str, Any]:
    """The role document of the Transfer API."""
    return {
        "DATA_TYPE": "role",
        "id": grant.id,
        "principal_type": grant.principal_type,
        "principal": grant.principal,
        "role": grant.role,
    }


def granted(connection: Connection, collection: Collection) -> list[Grant]:
    """All roles on a collection, the owner first."""
    role = tables.roles.c
    rows = connection.execute(
        select(role.id, role.principal, role.role, role.principal_type)
        .where(role.collection_id == collection.id)
        .order_by(role.created, role.id)
    )
    return [Grant(None, collection.owner_id, "administrator"), *(Grant(*row) for row in rows)]


def find(connection: Connection, collection: Collection, role_id: str) -> Grant:
    """One role. Raises `ApiError` 404 RoleNotFound."""
    for grant in granted(connection, collection):
        if grant.id is not None and grant.id == role_id.lower():
            return grant
    raise ApiError(404, "RoleNotFound", f"No such role '{role_id[:64]}' on this endpoint.")


def read_request(document: object) -> tuple[str, str]:
    """Identity and role of a request to grant one. Raises `ApiError` 400."""
    fields = Fields(document, "the role")
    fields.data_type("role")
    kind = fields.choice("principal_type", ("identity", "group"), "identity")
    if kind == "group":
        raise ApiError(501, "NotSupported", "This relay has no groups; give the role to identities.")
    role = fields.choice("role", ROLES, "")
    if not role:
        raise ApiError(400, "ClientError.BadRequest", f"role must be one of {', '.join(ROLES)}.")
    return fields.identifier("principal"), role


def grant(connection: Connection, collection: Collection, identity_id: str, role: str, now: float) -> Grant:
    """Give a role. Raises `ApiError` 400 for an unknown identity, 409 Exists when it has the role already."""
    if identity_id not in select_by_ids(connection, [identity_id]):
        raise ApiError(400, "ClientError.BadRequest", f"There is no identity '{identity_id}'.")
    present = granted(connection, collection)
    if any(given.principal == identity_id and given.role == role for given in present):
        raise ApiError(409, "Exists", f"The identity already has the role {role} on this endpoint.")
    if len(present) > MAX_ROLES:
        raise ApiError(409, "Conflict", f"An endpoint has at most {MAX_ROLES} roles.")
    new = Grant(str(uuid.uuid4()), identity_id, role)
    connection.execute(
        insert(tables.roles).values(
            id=new.id,
            collection_id=collection.id,
            principal_type=new.principal_type,
            principal=identity_id,
            role=role,
            created=now,
        )
    )
    return new


def withdraw(connection: Connection, collection: Collection, role_id: str) -> Grant:
    """Take a role away; tasks that lose their permission by it are the caller's to end. Raises `ApiError` 404."""
    found = find(connection, collection, role_id)
    connection.execute(delete(tables.roles).where(tables.roles.c.id == found.id))
    return found
