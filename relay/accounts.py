"""What the operator does to the accounts of a relay: users, clients, collections. Used by the command line.

Each function returns work for a `Store`; nothing here is reachable over the network.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from sqlalchemy import Connection, delete, select, update

from protocol.errors import ItemFailed
from relay.access.decisions import ROLES
from relay.auth import browser_sessions, clients, one_time_links, passwords, service_tokens
from relay.auth.administrators import (
    all_administrators,
    has_administrator,
    make_administrator,
    remove_administrator,
)
from relay.auth.identities import (
    Identity,
    add_identity,
    normal_username,
    provider_id_of,
    select_by_ids,
    select_by_usernames,
)
from relay.auth.linked import primary_of, set_of
from relay.refusal import ApiError
from relay.settings import Settings
from relay.store import auth_tables as tables
from relay.store.application_tables import registrations
from relay.store.database import Store
from relay.times import iso
from relay.transfer.enrolment import create_mapped_collection

_GRANT = re.compile(r"(.+):([a-z_]+)")


class Refused(ItemFailed):
    """The operator asked for something that cannot be done; the sentence says why."""

    default_code = "REFUSED"


def adding_user(
    settings: Settings, name: str, full_name: str | None, email: str | None
) -> Callable[[Store], Awaitable[Identity]]:
    """Add a user, or bring one to life that so far only rules had named."""
    username = _username(settings, name)
    now = time.time()

    def work(connection: Connection) -> Identity:
        known = select_by_usernames(connection, [username]).get(username)
        if known is None or known.status != "unused":
            return add_identity(
                connection,
                username=username,
                now=now,
                provider_id=provider_id_of(username.rpartition("@")[2]),
                name=full_name,
                email=email,
            )
        values = {"status": "used", "name": full_name, "email": email}
        connection.execute(update(tables.identities).where(tables.identities.c.id == known.id).values(values))
        return select_by_ids(connection, [known.id])[known.id]

    return lambda store: store.write(work)


def inviting(settings: Settings, who: str) -> Callable[[Store], Awaitable[str]]:
    """A one-time link with which a user chooses a password; it works for a week. The work raises `Refused` for
    somebody who signs in elsewhere."""

    async def work(store: Store) -> str:
        identity = await find_identity(store, settings, who)
        if identity.kind != "login" or identity.provider_id != provider_id_of(settings.user_domain):
            raise Refused(f"{identity.username} does not sign in with a password of this relay.")
        key = await store.write(lambda c: one_time_links.make(c, "password", identity.id, time.time()))
        return _link(settings, key)

    return work


def setting_password(settings: Settings, who: str, password: str) -> Callable[[Store], Awaitable[None]]:
    """Give a user this password and end their sessions in browsers."""

    async def work(store: Store) -> None:
        identity = await find_identity(store, settings, who)
        passwords.check_strength(password, identity.username)
        digest = await trio.to_thread.run_sync(passwords.digest_of, password)

        def write(connection: Connection) -> None:
            passwords.store_digest(connection, identity.id, digest, time.time())
            # They belong to the person, who may act under another name.
            browser_sessions.end_all_sessions(connection, primary_of(connection, identity.id))

        await store.write(write)

    return work


async def first_administrator_link(settings: Settings, store: Store) -> str | None:
    """The one-time link for the first administrator, made anew; None when there is an administrator already."""

    def work(connection: Connection) -> str | None:
        if has_administrator(connection):
            return None
        return _link(settings, one_time_links.make(connection, "administrator", None, time.time()))

    return await store.write(work)


def making_administrator(settings: Settings, who: str) -> Callable[[Store], Awaitable[Identity]]:
    """Let somebody administer the relay. The work raises `Refused` for a closed account and for a program."""
    now = time.time()

    async def work(store: Store) -> Identity:
        identity = await find_identity(store, settings, who)
        if identity.kind != "login" or identity.status == "closed":
            raise Refused(f"{identity.username} is a program or closed; administrators are people who can sign in.")
        await store.write(lambda connection: make_administrator(connection, identity.id, now))
        return identity

    return work


def removing_administrator(settings: Settings, who: str) -> Callable[[Store], Awaitable[Identity]]:
    """Let somebody administer the relay no longer. The work raises `Refused` for somebody who did not."""

    async def work(store: Store) -> Identity:
        identity = await find_identity(store, settings, who)
        if not await store.write(lambda connection: remove_administrator(connection, identity.id)):
            raise Refused(f"{identity.username} is no administrator of this relay.")
        return identity

    return work


def _link(settings: Settings, key: str) -> str:
    return f"{settings.public_url}/welcome?key={key}"


def closing(settings: Settings, who: str) -> Callable[[Store], Awaitable[Identity]]:
    """Close an account: nobody signs in with it any more and its tokens end. Nothing else of it is deleted."""

    async def work(store: Store) -> Identity:
        identity = await find_identity(store, settings, who)

        def write(connection: Connection) -> None:
            this = tables.identities.c.id == identity.id
            connection.execute(update(tables.identities).where(this).values(status="closed"))
            # For good: should the account be opened again, nobody is signed in by what was given before.
            _sign_out(connection, identity.id)

        await store.write(write)
        return identity

    return work


def signing_out(settings: Settings, who: str) -> Callable[[Store], Awaitable[Identity]]:
    """End all sessions and tokens of a person, named by any of their identities; they may sign in again."""

    async def work(store: Store) -> Identity:
        identity = await find_identity(store, settings, who)

        def write(connection: Connection) -> None:
            # Tokens stay with the identity that was the primary one when they were given.
            for one in set_of(connection, identity.id):
                _sign_out(connection, one.id)

        await store.write(write)
        return identity

    return work


def _sign_out(connection: Connection, identity_id: str) -> None:
    browser_sessions.end_all_sessions(connection, identity_id)
    person = primary_of(connection, identity_id)
    if person != identity_id:
        browser_sessions.end_what_was_opened_by(connection, person, identity_id)
    connection.execute(delete(tables.sessions).where(tables.sessions.c.identity_id == identity_id))


def programs_of(identity_id: str) -> Callable[[Store], Awaitable[list[clients.Client]]]:
    """The clients that were added for somebody: each is an identity of its own, which nothing closes but itself.

    Applications of projects are left out, which may have other administrators.
    """
    mine = (tables.clients.c.owner_id == identity_id) & tables.clients.c.id.not_in(select(registrations.c.client_id))
    owned = select(tables.clients).join(tables.identities, tables.identities.c.id == tables.clients.c.id)
    still = owned.where(mine, tables.identities.c.status != "closed").order_by(tables.clients.c.created)
    return lambda store: store.read(lambda c: [clients.client_of(row) for row in c.execute(still).mappings()])


def opening(settings: Settings, who: str) -> Callable[[Store], Awaitable[Identity]]:
    """Open a closed account again; its owner has to sign in anew. The work raises `Refused` for one that is not
    closed."""

    async def work(store: Store) -> Identity:
        identity = await find_identity(store, settings, who)
        if identity.status != "closed":
            raise Refused(f"{identity.username} is not closed.")
        this = tables.identities.c.id == identity.id
        await store.write(lambda c: c.execute(update(tables.identities).where(this).values(status="used")).rowcount)
        return identity

    return work


async def list_users(store: Store) -> list[dict[str, Any]]:
    """All users by name, client identities left out."""
    query = select(tables.identities).where(tables.identities.c.kind == "login").order_by(tables.identities.c.username)

    def work(connection: Connection) -> list[dict[str, Any]]:
        special = all_administrators(connection)
        rows = connection.execute(query).mappings()
        return [{**row, "role": "administrator" if row["id"] in special else "user"} for row in rows]

    return await store.read(work)


def listing_tokens(settings: Settings, who: str | None) -> Callable[[Store], Awaitable[list[dict[str, Any]]]]:
    """The tokens of long life, of everybody or of one person; never the secrets themselves, which nobody has."""
    now = time.time()

    def tokens(connection: Connection, owner_id: str | None) -> list[dict[str, Any]]:
        return [
            {
                "id": one.token.id,
                "username": one.username,
                "name": one.token.name,
                "created": iso(one.token.created),
                "expires": iso(one.token.expires),
                "is_ending": one.token.is_ending(now),
            }
            for one in service_tokens.all_tokens(connection, now, owner_id)
        ]

    return listing(settings, who, tokens)


def listing(
    settings: Settings, who: str | None, rows: Callable[[Connection, str | None], list[dict[str, Any]]]
) -> Callable[[Store], Awaitable[list[dict[str, Any]]]]:
    """Rows of everybody, or of one person, whose id ``rows`` is given. The work raises `Refused` for a stranger."""

    async def work(store: Store) -> list[dict[str, Any]]:
        owner_id = None if who is None else (await find_identity(store, settings, who)).id
        return await store.read(lambda connection: rows(connection, owner_id))

    return work


def ending_token(token_id: str) -> Callable[[Store], Awaitable[bool]]:
    """End a token of long life; the result says whether there was one."""
    return lambda store: store.write(lambda connection: service_tokens.withdraw(connection, token_id))


def adding_client(settings: Settings, name: str, owner: str | None) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Add a client with its first secret."""
    now = time.time()

    async def work(store: Store) -> dict[str, Any]:
        owner_id = None if owner is None else (await find_identity(store, settings, owner)).id
        secret, digest = await trio.to_thread.run_sync(clients.new_digest)
        client, secret_id = await store.write(
            lambda connection: clients.add_client(connection, name=name, now=now, digest=digest, owner_id=owner_id)
        )
        return {
            "client_id": client.id,
            "client_secret": secret,
            "secret_id": secret_id,
            "name": client.name,
            "username": clients.client_username(client.id),
            "owner_id": client.owner_id,
        }

    return work


async def list_clients(store: Store) -> list[dict[str, Any]]:
    """All clients with their owners' names and the ids of their secrets."""

    def work(connection: Connection) -> list[dict[str, Any]]:
        rows = connection.execute(select(tables.clients).order_by(tables.clients.c.created)).mappings().all()
        owners = select_by_ids(connection, {row["owner_id"] for row in rows if row["owner_id"]})
        kept: dict[str, list[str]] = {}
        for row in connection.execute(select(tables.client_secrets.c.client_id, tables.client_secrets.c.id)):
            kept.setdefault(row.client_id, []).append(row.id)
        return [
            {
                "client_id": row["id"],
                "name": row["name"],
                "owner": owners[row["owner_id"]].username if row["owner_id"] else None,
                "secret_ids": kept.get(row["id"], []),
            }
            for row in rows
        ]

    return await store.read(work)


def adding_secret(client_id: str) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Give a client a further secret."""
    now = time.time()

    async def work(store: Store) -> dict[str, Any]:
        secret, digest = await trio.to_thread.run_sync(clients.new_digest)
        secret_id = await store.write(
            lambda connection: clients.add_secret(connection, client_id=client_id, digest=digest, now=now)
        )
        return {"client_id": client_id, "client_secret": secret, "secret_id": secret_id}

    return work


def removing_secret(client_id: str, secret_id: str) -> Callable[[Store], Awaitable[bool]]:
    """Take a secret from a client; the result says whether there was one."""
    return lambda store: store.write(
        lambda connection: clients.remove_secret(connection, client_id=client_id, secret_id=secret_id)
    )


def adding_collection(
    settings: Settings, name: str, owner: str, grants: Sequence[str], public: bool
) -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Make a collection with its setup key; ``grants`` are ``identity:role``. Raises `Refused` for a grant of another
    form, and the work for people it does not know."""
    wanted = [identity_and_role(text) for text in grants]

    async def work(store: Store) -> dict[str, Any]:
        owner_id = (await find_identity(store, settings, owner)).id
        roles = tuple([((await find_identity(store, settings, who)).id, role) for who, role in wanted])
        document = {"DATA_TYPE": "endpoint", "is_globus_connect": True, "display_name": name, "public": public}
        try:
            collection_id, setup_key = await create_mapped_collection(store, settings, owner_id, document, grants=roles)
        except ApiError as error:
            raise Refused(error.message) from error
        return {"collection_id": collection_id, "setup_key": setup_key, "name": name, "owner_id": owner_id}

    return work


def identity_and_role(text: str) -> tuple[str, str]:
    """The parts of ``identity:role``. Raises `Refused` for another form and for roles that there are not."""
    match = _GRANT.fullmatch(text)
    if match is None or match[2] not in ROLES:
        raise Refused(f"{text!r} is no IDENTITY:ROLE; the roles are {', '.join(ROLES)}.")
    return match[1], match[2]


async def find_identity(store: Store, settings: Settings, who: str) -> Identity:
    """An identity by its id, its username, or its name in the relay's own domain. Raises `Refused` for a stranger."""
    try:
        wanted = str(uuid.UUID(who))
        found = await store.read(lambda connection: select_by_ids(connection, [wanted]))
    except ValueError:
        wanted = _username(settings, who)
        found = await store.read(lambda connection: select_by_usernames(connection, [wanted]))
    if not found:
        raise Refused(f"There is no user or client {who!r}; add it with `user add` or `client add`.")
    return found[wanted]


def _username(settings: Settings, name: str) -> str:
    full = name if "@" in name else f"{name}@{settings.user_domain}"
    try:
        return normal_username(full)
    except ValueError as error:
        raise Refused(str(error)) from error
