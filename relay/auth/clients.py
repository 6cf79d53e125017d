"""Client identities: programs that sign in with an id and a secret.

A secret is shown once and stored as a scrypt digest (RFC 7914). Checking one costs some memory and time, so few are
checked at once, and a check takes as long for a client that does not exist.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from sqlalchemy import Connection, delete, insert, select

from protocol.errors import ItemFailed
from relay.auth.identities import CLIENT_DOMAIN, CLIENT_PROVIDER_ID, add_identity
from relay.quota.turns import Turns
from relay.store.auth_tables import client_secrets, clients
from relay.store.database import Store

_LOG_N, _R, _P = 14, 8, 1
_SALT, _LENGTH = 16, 32
MAX_SECRET = 512
MAX_SECRETS_PER_CLIENT = 10


@dataclass(frozen=True)
class Client:
    """One client. The identity it acts as has the same id. ``owner_id`` is the user it belongs to.

    ``parent_id`` is the application of which it is one installation's own copy. With ``rotates``, each use of a
    refresh token replaces it.
    """

    id: str
    name: str
    public: bool
    owner_id: str | None
    created: float
    parent_id: str | None = None
    redirect_uris: tuple[str, ...] = ()
    rotates: bool = False


class NoSuchClient(ItemFailed):
    """There is no client with this id."""

    default_code = "NOT_FOUND"


def client_username(client_id: str) -> str:
    """The username of the identity a client acts as."""
    return f"{client_id}@{CLIENT_DOMAIN}"


def new_digest() -> tuple[str, str]:
    """A new random secret and its digest. Takes some tens of milliseconds: not for the event loop."""
    secret = secrets.token_urlsafe(32)
    salt = secrets.token_bytes(_SALT)
    derived = _scrypt(salt, _LOG_N, _R, _P).derive(secret.encode())
    return secret, f"scrypt${_LOG_N}${_R}${_P}${base64.b64encode(salt).decode()}${base64.b64encode(derived).decode()}"


def add_client(
    connection: Connection,
    *,
    name: str,
    now: float,
    digest: str,
    owner_id: str | None = None,
    parent_id: str | None = None,
    redirect_uris: Sequence[str] = (),
) -> tuple[Client, str]:
    """Store a client with its identity and first secret's ``digest``; returns the client and the secret's id."""
    client = Client(
        id=str(uuid.uuid4()),
        name=name,
        public=False,
        owner_id=owner_id,
        created=now,
        parent_id=parent_id,
        redirect_uris=tuple(redirect_uris),
    )
    insert_client(connection, client)
    add_identity(
        connection,
        username=client_username(client.id),
        now=now,
        provider_id=CLIENT_PROVIDER_ID,
        identity_id=client.id,
        kind="client_identity",
        name=name,
    )
    return client, add_secret(connection, client_id=client.id, digest=digest, now=now)


def add_secret(connection: Connection, *, client_id: str, digest: str, now: float) -> str:
    """Give a client a further secret; returns the secret's id. Raises `NoSuchClient`, or ItemFailed for too many."""
    if find_client(connection, client_id) is None:
        raise NoSuchClient(f"There is no client {client_id}.", subject=client_id)
    present = connection.execute(select(client_secrets.c.id).where(client_secrets.c.client_id == client_id)).all()
    if len(present) >= MAX_SECRETS_PER_CLIENT:
        raise ItemFailed(f"The client has {len(present)} secrets already; remove one first.", code="TOO_MANY")
    secret_id = str(uuid.uuid4())
    connection.execute(insert(client_secrets).values(id=secret_id, client_id=client_id, digest=digest, created=now))
    return secret_id


def remove_secret(connection: Connection, *, client_id: str, secret_id: str) -> bool:
    """Take a secret away; returns whether there was one."""
    mine = (client_secrets.c.client_id == client_id) & (client_secrets.c.id == secret_id)
    return connection.execute(delete(client_secrets).where(mine)).rowcount > 0


def find_client(connection: Connection, client_id: str) -> Client | None:
    """The client with this id."""
    row = connection.execute(select(clients).where(clients.c.id == client_id)).mappings().first()
    return None if row is None else client_of(row)


def client_names(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """What these clients are called, by id; unknown ids are left out. At most some thousands at once."""
    rows = connection.execute(select(clients.c.id, clients.c.name).where(clients.c.id.in_(ids)))
    return {row.id: row.name for row in rows}


def client_of(row: Mapping[Any, Any]) -> Client:
    """A row of the table of clients as a record; columns that the record does not know are left out."""
    values = {field: row[field] for field in Client.__dataclass_fields__}
    return Client(**{**values, "redirect_uris": tuple(json.loads(values["redirect_uris"]))})


def insert_client(connection: Connection, client: Client) -> None:
    """Store the row of a client, and nothing beside it."""
    values = {**vars(client), "redirect_uris": json.dumps(client.redirect_uris)}
    connection.execute(insert(clients).values(**values))


# Checks of secrets under way.
_CHECKS = 2


class SecretChecker:
    """Makes clients' secrets, and checks them against the store; few at once, because each costs memory and time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # 16 MiB and one processor core for each check under way.
        self._limit = trio.CapacityLimiter(_CHECKS)
        # To be taken before a check: no caller has more than that waiting for those.
        self.turns = Turns(_CHECKS)

    async def make(self) -> tuple[str, str]:
        """A new random secret and its digest, made when its turn comes."""
        return await trio.to_thread.run_sync(new_digest, limiter=self._limit)

    async def check(self, client_id: str, secret: str) -> Client | None:
        """The client, when the secret is one of its secrets; None otherwise. Raises the store's errors."""
        if len(client_id) > 36 or not 1 <= len(secret) <= MAX_SECRET:
            return None

        def load(connection: Connection) -> tuple[Client | None, Sequence[str]]:
            rows = connection.execute(
                select(client_secrets.c.digest).where(client_secrets.c.client_id == client_id)
            ).scalars()
            return find_client(connection, client_id), rows.all()

        client, digests = await self._store.read(load)
        # A client that does not exist costs one check too, so that the time says nothing about it.
        right = await trio.to_thread.run_sync(_matches_any, secret, digests or [_NOBODY], limiter=self._limit)
        return client if right else None


def _matches_any(secret: str, digests: Sequence[str]) -> bool:
    results = [_matches(secret, digest) for digest in digests]
    return any(results)


def _matches(secret: str, digest: str) -> bool:
    try:
        name, log_n, r, p, salt, derived = digest.split("$")
        if name != "scrypt":
            return False
        # `verify` compares in constant time.
        _scrypt(base64.b64decode(salt), int(log_n), int(r), int(p)).verify(
            secret.encode(errors="surrogatepass"), base64.b64decode(derived)
        )
    except (InvalidKey, binascii.Error):
        return False
    return True


def _scrypt(salt: bytes, log_n: int, r: int, p: int) -> Scrypt:
    return Scrypt(salt=salt, length=_LENGTH, n=1 << log_n, r=r, p=p)


# No secret has this digest: finding one would take inverting scrypt.
_NOBODY = (
    f"scrypt${_LOG_N}${_R}${_P}${base64.b64encode(bytes(_SALT)).decode()}${base64.b64encode(bytes(_LENGTH)).decode()}"
)
