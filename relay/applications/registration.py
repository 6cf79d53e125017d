"""Clients that developers register: what they are, where they send browsers back to, and their secrets.

A client and its secrets live in `relay.auth.clients`; here is what the developers' API adds, and who may touch it: the
administrators of the client's project.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from protocol.errors import ItemFailed
from relay.access.decisions import Subject
from relay.applications import documents, projects
from relay.auth import clients
from relay.auth.clients import Client, client_of, find_client, insert_client
from relay.auth.identities import CLIENT_PROVIDER_ID, add_identity
from relay.auth.public_clients import remove_client
from relay.refusal import ApiError
from relay.store import auth_tables
from relay.store.application_tables import registrations
from relay.store.sign_in_tables import scopes
from relay.store.transfer_tables import collections
from relay.times import iso
from relay.transfer import task_turns

MAX_CLIENTS = 500
PUBLIC_TYPES = frozenset({"public_installed_client", "public_webapp_client"})
CONFIDENTIAL_TYPES = frozenset(
    {
        "confidential_client",
        "client_identity",
        "resource_server",
        "globus_connect_server",
        "hybrid_confidential_client_resource_server",
    }
)
_LINKS = ("terms_and_conditions", "privacy_policy")


@dataclass(frozen=True)
class Registered:
    """A client with what its developer said of it."""

    client: Client
    project_id: str
    client_type: str
    visibility: str
    terms_and_conditions: str | None
    privacy_policy: str | None
    preselect_idp: str | None
    required_idp: str | None = None
    registered_by: str | None = None

    @property
    def parent(self) -> str | None:
        """The client that this one came from: as its copy, or registered by it."""
        return self.registered_by or self.client.parent_id


def of_projects(connection: Connection, project_ids: list[str]) -> list[Registered]:
    """All clients of some projects, oldest first."""
    query = (
        select(auth_tables.clients, *_OWN)
        .join(registrations, registrations.c.client_id == auth_tables.clients.c.id)
        .where(registrations.c.project_id.in_(project_ids))
        .order_by(auth_tables.clients.c.created)
    )
    return [_registered(row) for row in connection.execute(query).mappings()]


_OWN = [column for column in registrations.c if column.name != "client_id"]


def _registered(row: Mapping[Any, Any]) -> Registered:
    return Registered(client_of(row), **{column.name: row[column.name] for column in _OWN})


def find(connection: Connection, client_id: str) -> Registered | None:
    """A registered client, whoever it belongs to."""
    query = (
        select(auth_tables.clients, *_OWN)
        .join(registrations, registrations.c.client_id == auth_tables.clients.c.id)
        .where(auth_tables.clients.c.id == client_id.lower()[:36])
    )
    row = connection.execute(query).mappings().first()
    return None if row is None else _registered(row)


def require(connection: Connection, client_id: str, subject: Subject) -> Registered:
    """A client of a project that the person administers, or one that the asking client registered itself.

    Raises `ApiError` 404.
    """
    found = find(connection, client_id)
    if found is not None:
        if found.registered_by in subject.identities:
            return found
        try:
            projects.require(connection, found.project_id, subject)
        except ApiError as error:
            raise projects.not_found("client", client_id) from error
        return found
    raise projects.not_found("client", client_id)


def look(connection: Connection, client_id: str, subject: Subject) -> Registered:
    """The same, and beside these every client that is visible to all. Raises `ApiError` 404."""
    found = find(connection, client_id)
    return found if found is not None and found.visibility == "public" else require(connection, client_id, subject)


def create(
    connection: Connection,
    document: Mapping[str, Any],
    subject: Subject,
    owner_id: str,
    providers: Collection[str] = (),
) -> Registered:
    """Register a client, still without a secret. ``providers`` are the ids of those that people sign in with here.

    Raises `ApiError` 400, 404, 409.
    """
    project_id = documents.identifier(document.get("project"), "project")
    projects.require(connection, project_id, subject)
    return _insert(connection, document, project_id, owner_id, None, subject.now, providers)


def create_child(
    connection: Connection, document: Mapping[str, Any], parent_id: str, now: float, providers: Collection[str] = ()
) -> Registered:
    """Register a client on the word of another one, in the same project and under the same people.

    Children have no children. Raises `ApiError` 400, 403, 409.
    """
    parent = find(connection, parent_id)
    if parent is None or parent.registered_by is not None:
        sentence = "Only a client that a person registered in a project can register further ones."
        raise ApiError(403, "FORBIDDEN", sentence)
    if document.get("project", parent.project_id) != parent.project_id:
        raise documents.invalid("A client registers others in its own project; leave project out.")
    owner_id = parent.client.owner_id or parent.client.id
    return _insert(connection, document, parent.project_id, owner_id, parent.client.id, now, providers)


def _insert(
    connection: Connection,
    document: Mapping[str, Any],
    project_id: str,
    owner_id: str,
    registered_by: str | None,
    now: float,
    providers: Collection[str],
) -> Registered:
    mine = registrations.c.project_id == project_id
    if connection.execute(select(func.count()).select_from(registrations).where(mine)).scalar_one() >= MAX_CLIENTS:
        raise ApiError(409, "CONFLICT", f"A project has at most {MAX_CLIENTS} clients.")
    kind = _client_type(document)
    public = kind in PUBLIC_TYPES
    client = Client(
        id=str(uuid.uuid4()),
        name=documents.required(document, "name"),
        public=public,
        owner_id=owner_id,
        created=now,
        redirect_uris=tuple(documents.redirect_uris(document) or ()),
        # RFC 9700, 2.2.2: without a secret, a stolen refresh token must not go unnoticed.
        rotates=public,
    )
    insert_client(connection, client)
    if not public:
        add_identity(
            connection,
            username=clients.client_username(client.id),
            now=now,
            provider_id=CLIENT_PROVIDER_ID,
            identity_id=client.id,
            kind="client_identity",
            name=client.name,
        )
    row: dict[str, Any] = {
        "client_id": client.id,
        "project_id": project_id,
        "client_type": kind,
        "visibility": _visibility(document, "private"),
        "preselect_idp": _provider(document, "preselect_idp", providers),
        "required_idp": _provider(document, "required_idp", providers),
        "registered_by": registered_by,
        **_links(document),
    }
    connection.execute(insert(registrations).values(**row))
    return Registered(client, **{key: value for key, value in row.items() if key != "client_id"})


def _client_type(document: Mapping[str, Any]) -> str:
    kind = documents.text(document, "client_type")
    if kind is None:
        if document.get("public_client") is None:
            raise documents.invalid("Give either client_type or public_client.")
        public = documents.switch(document, "public_client", False)
        return "public_installed_client" if public else "confidential_client"
    if kind not in PUBLIC_TYPES | CONFIDENTIAL_TYPES:
        known = ", ".join(sorted(PUBLIC_TYPES | CONFIDENTIAL_TYPES))
        raise documents.invalid(f"client_type must be one of {known}.")
    if "public_client" in document and documents.switch(document, "public_client", False) != (kind in PUBLIC_TYPES):
        raise documents.invalid("client_type and public_client say different things.")
    return kind


def _visibility(document: Mapping[str, Any], default: str) -> str:
    value = documents.text(document, "visibility") or default
    if value not in ("private", "public"):
        raise documents.invalid("visibility must be private or public.")
    return value


def _provider(document: Mapping[str, Any], key: str, known: Collection[str]) -> str | None:
    value = document.get(key)
    if value is None:
        return None
    provider_id = documents.identifier(value, key)
    # Nobody could ever satisfy it.
    if provider_id not in known:
        raise documents.invalid(f"{key}: nobody signs in here with a provider '{provider_id}'.")
    return provider_id


def _links(document: Mapping[str, Any]) -> dict[str, str | None]:
    links = document.get("links") or {}
    if not isinstance(links, dict):
        raise documents.invalid("links must be an object.")
    return {key: documents.web_address(links, key) for key in _LINKS}


def change(
    connection: Connection,
    found: Registered,
    document: Mapping[str, Any],
    subject: Subject,
    providers: Collection[str] = (),
) -> Registered:
    """Change the keys that are present; what a client is stays. Raises `ApiError` 400, 404."""
    for key, now in (("client_type", found.client_type), ("public_client", found.client.public)):
        if document.get(key) is not None and document[key] != now:
            raise documents.invalid(f"{key} of a client cannot be changed; register a new one.")
    client: dict[str, Any] = {}
    if "name" in document:
        client["name"] = documents.required(document, "name")
    if document.get("redirect_uris") is not None:
        client["redirect_uris"] = json.dumps(documents.redirect_uris(document))
    if client:
        table = auth_tables.clients
        connection.execute(update(table).where(table.c.id == found.client.id).values(**client))
    own: dict[str, Any] = {}
    if document.get("project") is not None:
        own["project_id"] = documents.identifier(document["project"], "project")
        projects.require(connection, own["project_id"], subject)
    if "visibility" in document:
        own["visibility"] = _visibility(document, found.visibility)
    own |= {key: _provider(document, key, providers) for key in ("preselect_idp", "required_idp") if key in document}
    if "links" in document:
        own |= _links(document)
    if own:
        connection.execute(update(registrations).where(registrations.c.client_id == found.client.id).values(**own))
    changed = find(connection, found.client.id)
    assert changed is not None
    return changed


@dataclass(frozen=True)
class Removed:
    """What became of the things of a client that was deleted: ids of the tasks that ended, whose sessions are the
    caller's to cut, and of the projects that went to whoever deleted it."""

    ended: list[str]
    inherited: list[str]


def remove(connection: Connection, found: Registered, by_id: str, now: float) -> Removed:
    """Delete a client with its secrets, tokens and consents. Those that it registered stay in the project.

    Its tasks end, since they are nobody's any more. Projects that it administered alone go to ``by_id``, the identity
    that deletes it and could have acted as it anyway. Raises `ApiError` 409 when it would delete itself and leave such,
    or owns collections, which would be nobody's.
    """
    _refuse_owner(connection, found.client.id)
    inherited = projects.inherit(connection, found.client.id, by_id)
    mine = registrations.c.registered_by == found.client.id
    connection.execute(update(registrations).where(mine).values(registered_by=None))
    reason = f"The program “{found.client.name}”, which submitted this task, was deleted."
    ended = task_turns.end_all_of(connection, found.client.id, reason, now)
    remove_client(connection, found.client.id)
    return Removed(ended, inherited)


def _refuse_owner(connection: Connection, client_id: str) -> None:
    mine = (collections.c.owner_id == client_id) & collections.c.deleted.is_(None)
    name = connection.execute(select(collections.c.display_name).where(mine).limit(1)).scalar_one_or_none()
    if name is not None:
        sentence = (
            f"The program owns the collection “{name}”; delete what it owns first. Without secrets it does nothing."
        )
        raise ApiError(409, "CONFLICT", sentence)


def client_document(connection: Connection, found: Registered) -> dict[str, Any]:
    """The client document of the Auth API."""
    public = found.client.public
    own_scopes = select(scopes.c.id).where(scopes.c.client_id == found.client.id).order_by(scopes.c.created)
    grant_types = ["authorization_code", "refresh_token"]
    if not public:
        grant_types += ["client_credentials", "urn:globus:auth:grant_type:dependent_token"]
    return {
        "id": found.client.id,
        "name": found.client.name,
        "client_type": found.client_type,
        "public_client": public,
        "visibility": found.visibility,
        "project": found.project_id,
        "parent_client": found.parent,
        "redirect_uris": list(found.client.redirect_uris),
        "links": {"terms_and_conditions": found.terms_and_conditions, "privacy_policy": found.privacy_policy},
        "scopes": list(connection.execute(own_scopes).scalars()),
        "grant_types": sorted(grant_types),
        "fqdns": [],
        "required_idp": found.required_idp,
        "preselect_idp": found.preselect_idp,
        "prompt_for_named_grant": False,
        "userinfo_from_effective_identity": True,
    }


# --- secrets ---------------------------------------------------------------------------------------------------------


def secret_documents(connection: Connection, client_id: str) -> list[dict[str, Any]]:
    """The secrets of a client; the secrets themselves are not kept."""
    table = auth_tables.client_secrets
    rows = connection.execute(select(table).where(table.c.client_id == client_id).order_by(table.c.created))
    return [_secret_document(row.id, client_id, row.name, row.created, None) for row in rows]


def add_secret(
    connection: Connection, found: Registered, name: str, digest: str, secret: str, now: float
) -> dict[str, Any]:
    """A further secret, shown in this document and never again. Raises `ApiError` 400, 409."""
    if found.client.public:
        raise documents.invalid("Public clients have no secrets: they could not keep them.")
    assert find_client(connection, found.client.id) is not None
    try:
        secret_id = clients.add_secret(connection, client_id=found.client.id, digest=digest, now=now)
    except ItemFailed as error:
        raise ApiError(409, "CONFLICT", error.sentence) from error
    table = auth_tables.client_secrets
    connection.execute(update(table).where(table.c.id == secret_id).values(name=name))
    return _secret_document(secret_id, found.client.id, name, now, secret)


def remove_secret(connection: Connection, found: Registered, secret_id: str) -> dict[str, Any]:
    """Take a secret away; returns what it was. Raises `ApiError` 404."""
    for document in secret_documents(connection, found.client.id):
        if document["id"] == secret_id.lower():
            clients.remove_secret(connection, client_id=found.client.id, secret_id=document["id"])
            return document
    raise projects.not_found("credential", secret_id)


def _secret_document(id_: str, client_id: str, name: str, created: float, secret: str | None) -> dict[str, Any]:
    return {
        "id": id_,
        "client": client_id,
        "name": name,
        "created": iso(created),
        "secret": secret,
    }
