"""What the operator does to applications, from the command line. Nothing here is reachable over the network."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from sqlalchemy import Connection

from protocol.errors import ItemFailed
from relay.access.decisions import Subject
from relay.access.principals import subject_of
from relay.accounts import find_identity
from relay.applications import projects, registration
from relay.auth.clients import new_digest
from relay.refusal import ApiError
from relay.settings import Settings
from relay.store.database import Store

# What people call the kinds, and what the developers' API calls them.
KINDS = {"web": "confidential_client", "native": "public_installed_client", "service": "client_identity"}


class NotRegistered(ItemFailed):
    """The application cannot be registered; the sentence says why."""

    default_code = "REFUSED"


def adding_application(
    settings: Settings, name: str, owner: str, kind: str, redirect_uris: Sequence[str], project: str | None
) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Register an application in the owner's project of that name, which is made when it is missing. The work raises
    `NotRegistered` with what is wrong with it."""
    now = time.time()

    async def work(store: Store) -> dict[str, Any]:
        identity = await find_identity(store, settings, owner)
        secret, digest = await trio.to_thread.run_sync(new_digest)

        def register(connection: Connection) -> dict[str, Any]:
            subject = subject_of(connection, identity.id, now)
            project_id = _project(connection, subject, identity.id, project or name, identity.email or owner)
            document = {
                "name": name,
                "project": project_id,
                "client_type": KINDS[kind],
                "redirect_uris": list(redirect_uris),
            }
            found = registration.create(connection, document, subject, identity.id)
            shown = {"client_id": found.client.id, "client_secret": None, "name": name, "project_id": project_id}
            if not found.client.public:
                made = registration.add_secret(connection, found, "first", digest, secret, now)
                shown["client_secret"] = made["secret"]
            return shown

        try:
            return await store.write(register)
        except ApiError as error:
            raise NotRegistered(error.message) from error

    return work


def _project(connection: Connection, subject: Subject, owner_id: str, name: str, mail: str) -> str:
    for project in projects.administered(connection, subject):
        if project.display_name == name:
            return project.id
    address = mail if "@" in mail else f"{mail}@localhost"
    document = {"display_name": name, "contact_email": address}
    return projects.create(connection, document, subject, owner_id).id
