"""Applications that keep no secret: Globus's own native applications, ours, and any other that asks.

A native application has no secret that would prove who it is; PKCE binds the code to the program that asked for it
(RFC 8252, RFC 7636), and where the browser may be sent is limited to this machine and the relay's own page.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from sqlalchemy import Connection, delete, update

from relay.auth.clients import Client, add_client, find_client, insert_client
from relay.store.auth_tables import clients, identities

TOWPATH_CLI = "8a2b1f0e-6c0d-5e0a-9d53-2f6c1d7a4b11"
# Native applications that users of Globus have, by their public ids.
WELL_KNOWN: Mapping[str, str] = {
    TOWPATH_CLI: "Towpath command line",
    "95fdeba8-fac2-42bd-a357-e068d82ff78e": "Globus CLI",
    "61338d24-54d5-408f-a10d-66c06b59f6d2": "Globus SDK tutorial application",
    "b1629e83-00e8-4036-a3bd-8a21dc2f9dce": "globus-xr",
    "64d2d5b3-b77e-4e04-86d9-e3f143f563f7": "globus-jupyterlab",
    "f2a9c08a-4a6c-4524-936f-a4ec4fabb9bd": "globus-mcp",
    "ee929f5c-ed08-4320-b22f-c1aa5229e490": "globus-search-cli",
    "bc77d044-1f42-46cc-9702-87f756cd08a6": "globus-timer-cli",
}
# A copy of an application that was never signed in with is forgotten after this many seconds.
UNUSED_LIFE = 86400.0
MAX_NAME = 200
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def client_for(connection: Connection, client_id: str, *, unregistered: bool) -> Client | None:
    """The client with this id: registered, well known, or, with ``unregistered``, any native application.

    What is not registered has no row yet; `ensure_row` makes it once somebody has allowed it something.
    """
    try:
        normal = str(uuid.UUID(client_id))
    except ValueError:
        return None
    known = find_client(connection, normal)
    if known is not None:
        return known
    if normal in WELL_KNOWN:
        return Client(id=normal, name=WELL_KNOWN[normal], public=True, owner_id=None, created=0.0)
    if unregistered:
        return Client(id=normal, name=f"Application {normal}", public=True, owner_id=None, created=0.0)
    return None


def is_nameless(client: Client) -> bool:
    """Whether nobody has vouched for the client's name: it is neither registered nor well known."""
    root = client.parent_id or client.id
    return client.public and client.owner_id is None and root not in WELL_KNOWN and client.name.endswith(client.id)


def title_of(client: Client) -> str:
    """What to call the client before people. The name of a copy was chosen by whoever made it."""
    if client.parent_id is None:
        return client.name
    template = WELL_KNOWN.get(client.parent_id, f"Application {client.parent_id}")
    return template if client.name == template else f"{template}, called “{client.name}” on its machine"


def ensure_row(connection: Connection, client: Client, now: float) -> None:
    """Make sure that tokens and consents can refer to the client."""
    if find_client(connection, client.id) is None:
        insert_client(connection, Client(**{**vars(client), "created": now}))


def make_copy(connection: Connection, template: Client, name: str, *, now: float, digest: str) -> tuple[Client, str]:
    """One installation's own copy of a native application, with a secret; returns it and the secret's id.

    The copy can do nothing but sign people in: what anybody may have without asking must not be an identity.
    """
    ensure_row(connection, template, now)
    return add_client(connection, name=name[:MAX_NAME], now=now, digest=digest, parent_id=template.id)


def note_use(connection: Connection, client_id: str, now: float) -> None:
    """Somebody signed in with the client."""
    connection.execute(update(clients).where(clients.c.id == client_id).values(last_used=now))


def remove_client(connection: Connection, client_id: str) -> None:
    """Forget a client with its identity, secrets, consents and tokens. Clients that it registered itself stay, and
    belong to nobody."""
    connection.execute(update(clients).where(clients.c.owner_id == client_id).values(owner_id=None))
    connection.execute(delete(clients).where(clients.c.id == client_id))
    connection.execute(delete(identities).where(identities.c.id == client_id, identities.c.kind == "client_identity"))


def remove_unused_copies(connection: Connection, now: float) -> int:
    """Forget copies of applications that nobody ever signed in with. Returns how many."""
    table = clients.c
    query = table.parent_id.is_not(None) & table.last_used.is_(None) & (table.created < now - UNUSED_LIFE)
    stale = connection.execute(clients.select().with_only_columns(table.id).where(query)).scalars().all()
    for client_id in stale:
        remove_client(connection, client_id)
    return len(stale)


def may_redirect_to(client: Client, redirect_uri: str, own_page: str) -> bool:
    """Whether the browser may be sent there with a code.

    A registered address counts as it was written (RFC 9700, 2.1), except that a loopback one may have any port (RFC
    8252, 7.3). Public clients and copies may besides use any loopback address and the relay's page ``own_page``.
    """
    if redirect_uri in client.redirect_uris:
        return True
    native = client.public or client.parent_id is not None
    if native and redirect_uri == own_page:
        return True
    port_free = _loopback_without_port(redirect_uri)
    if port_free is None:
        return False
    if native:
        return True
    return any(port_free == _loopback_without_port(registered) for registered in client.redirect_uris)


def _loopback_without_port(uri: str) -> tuple[str, str, str] | None:
    try:
        parts = urlsplit(uri)
        if parts.port == 0:
            return None
    except ValueError:
        return None
    plain = parts.scheme == "http" and not parts.fragment and "#" not in uri and "@" not in parts.netloc
    if not plain or parts.hostname not in _LOOPBACK or any(c.isspace() or ord(c) < 32 or c == "\\" for c in uri):
        return None
    return parts.hostname, parts.path, parts.query
