"""Enrolment: a collection is made with a setup key, an agent redeems the key and becomes a node.

A key works once. Of any number of concurrent redemptions one wins, because marking the key as used is one conditional
update inside one transaction. The winner may repeat its request (its answer may have been lost on the way) and gets
the same answer; for everybody else the key is invalid, whatever the reason, with no difference to be seen.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from sqlalchemy import Connection, insert, select, update

from protocol.control import EnrolAnswer, EnrolRequest
from protocol.errors import ProtocolError
from protocol.identity import fingerprint_of_certificate_untrusted, public_key_of_certificate_untrusted
from relay.auth.identities import select_by_ids
from relay.refusal import ApiError
from relay.settings import Settings
from relay.store import transfer_tables as tables
from relay.store.database import Store
from relay.tls import ca_fingerprint
from relay.transfer import collections, setup_keys
from relay.transfer.fields import BAD_REQUEST, Fields, is_uuid
from relay.transfer.nodes import checked_home

AUDIENCE = "towpath-enrol"
MAX_PROOF = 8 * 1024
# An agent makes its proof at the moment of enrolling; clocks of laptops may be off by this much.
PROOF_LEEWAY = 600.0
MAX_PROOF_LIFE = 3600.0
MAX_UNUSED_KEYS = 1000


@dataclass(frozen=True)
class RelayName:
    """What an enrolled agent pins: the relay's id and its root key (PEM)."""

    relay_id: str
    relay_root: str


async def create_mapped_collection(
    store: Store,
    settings: Settings,
    owner_id: str,
    document: Mapping[str, Any],
    *,
    grants: tuple[tuple[str, str], ...] = (),
    now: float | None = None,
) -> tuple[str, str]:
    """Make a collection described by a Globus endpoint document; returns its id and its setup key, shown only now.

    ``grants`` are (identity id, role) pairs given at once. Raises `ApiError` 400 for a bad document and for unknown
    identities, and the errors of the store and of the relay's certificate.
    """
    fields = Fields(document, "the endpoint")
    fields.data_type("endpoint")
    if not fields.boolean("is_globus_connect", True):
        raise ApiError(400, BAD_REQUEST, "is_globus_connect must be true: collections are served by an agent.")
    values = collections.read_description(fields, creating=True)
    setup_key = setup_keys.make(settings.public_url, ca_fingerprint(settings))
    moment = time.time() if now is None else now
    collection_id = str(uuid.uuid4())
    work = functools.partial(
        _insert_collection,
        values={**_NEW, **values, "id": collection_id, "owner_id": owner_id, "created": moment},
        setup_key=setup_key,
        key_life=settings.enrolment.setup_key_life,
        grants=grants,
    )
    await store.write(work)
    return collection_id, setup_key


_NEW: dict[str, Any] = {
    "subscription_admin_verified": False,
    # Until an agent has said otherwise, nothing can be read, written or shared.
    "read_only": False,
    "shareable": False,
    "available": False,
}


def _insert_collection(
    connection: Connection,
    *,
    values: dict[str, Any],
    setup_key: str,
    key_life: float,
    grants: tuple[tuple[str, str], ...],
) -> None:
    people = {values["owner_id"], *(identity for identity, _ in grants)}
    unknown = people - set(select_by_ids(connection, people))
    if unknown:
        raise ApiError(400, BAD_REQUEST, f"There is no identity '{sorted(unknown)[0]}'.")
    waiting = connection.execute(
        select(tables.collections.c.id)
        .where(
            tables.collections.c.owner_id == values["owner_id"],
            tables.collections.c.node_id.is_(None),
            tables.collections.c.deleted.is_(None),
        )
        .limit(MAX_UNUSED_KEYS)
    ).all()
    if len(waiting) >= MAX_UNUSED_KEYS:
        raise ApiError(
            409, "Conflict", f"You have {MAX_UNUSED_KEYS} collections whose setup key was never used; delete some."
        )
    connection.execute(insert(tables.collections).values(**values))
    setup_keys.add(connection, setup_key, values["id"], now=values["created"], life=key_life)
    for identity_id, role in dict.fromkeys(grants):
        connection.execute(
            insert(tables.roles).values(
                id=str(uuid.uuid4()),
                collection_id=values["id"],
                principal_type="identity",
                principal=identity_id,
                role=role,
                created=values["created"],
            )
        )


async def redeem(
    store: Store,
    name: RelayName,
    request: EnrolRequest,
    now: float,
    told: Callable[[EnrolAnswer], None] = lambda answer: None,
) -> EnrolAnswer:
    """Turn a setup key into a node and a served collection; ``told`` hears of it before the transaction ends.

    Raises `ApiError`: 400 for a request that is malformed or not proven, 403 SetupKeyInvalid when the key is unknown,
    used or expired, 403 PermissionDenied when the node is another's.
    """
    fingerprint = check_proof_untrusted(request, now)

    def work(connection: Connection) -> EnrolAnswer:
        answer = _redeem(connection, name, request, fingerprint, now)
        told(answer)
        return answer

    return await store.write(work)


def check_proof_untrusted(request: EnrolRequest, now: float) -> str:
    """The fingerprint of the key that the applicant has shown to hold. Raises `ApiError` 400."""
    if len(request.proof) > MAX_PROOF or len(request.setup_key) > setup_keys.MAX_KEY:
        raise ApiError(400, BAD_REQUEST, "The enrolment request is too large.")
    if request.node_id is not None and not is_uuid(request.node_id):
        raise ApiError(400, BAD_REQUEST, "node_id must be a UUID.")
    try:
        key = public_key_of_certificate_untrusted(request.certificate)
        fingerprint = fingerprint_of_certificate_untrusted(request.certificate)
        # Times are compared below, with the relay's own clock and leeway.
        claims = jwt.decode(
            request.proof,
            key,
            algorithms=["EdDSA"],
            audience=AUDIENCE,
            options={"verify_exp": False, "verify_iat": False, "verify_nbf": False},
        )
    except ProtocolError as error:
        raise ApiError(400, BAD_REQUEST, error.sentence) from error
    except jwt.PyJWTError as error:
        raise ApiError(400, BAD_REQUEST, "The proof is not signed by the key of the certificate.") from error
    issued, expires = claims.get("iat"), claims.get("exp")
    if claims.get("sub") != setup_keys.digest(request.setup_key):
        raise ApiError(400, BAD_REQUEST, "The proof was made for another setup key.")
    if not isinstance(issued, int | float) or not isinstance(expires, int | float):
        raise ApiError(400, BAD_REQUEST, "The proof has no time of validity.")
    if expires - issued > MAX_PROOF_LIFE or not issued - PROOF_LEEWAY <= now <= expires + PROOF_LEEWAY:
        raise ApiError(400, BAD_REQUEST, "The proof is not valid at this time; check the clocks of relay and agent.")
    return fingerprint


def _redeem(
    connection: Connection, name: RelayName, request: EnrolRequest, fingerprint: str, now: float
) -> EnrolAnswer:
    key = tables.setup_keys.c
    digest = setup_keys.digest(request.setup_key)
    row = connection.execute(select(tables.setup_keys).where(key.digest == digest)).one_or_none()
    collection = None if row is None else collections.load(connection, row.collection_id)
    if row is None or collection is None or collection.deleted is not None:
        raise _invalid_key()
    node = _node_by_fingerprint(connection, fingerprint)
    if row.redeemed is not None:
        if node is None or node.id != row.node_id:
            raise _invalid_key()
        return _answer(connection, name, collection, node.id, node.endpoint_id)
    if row.expires <= now:
        raise _invalid_key()
    node_id, endpoint_id = _settle(connection, collection.owner_id, request, fingerprint, node, now)
    claimed = connection.execute(
        update(tables.setup_keys)
        .where(key.digest == digest, key.redeemed.is_(None), key.expires > now)
        .values(redeemed=now, node_id=node_id)
    )
    if claimed.rowcount != 1:
        raise _invalid_key()
    served = {"endpoint_id": endpoint_id, "node_id": node_id, "available": True, "home": checked_home(request.home)}
    collections.change(connection, collection.id, served)
    return _answer(connection, name, collection, node_id, endpoint_id)


@dataclass(frozen=True)
class _KnownNode:
    id: str
    endpoint_id: str


def _node_by_fingerprint(connection: Connection, fingerprint: str) -> _KnownNode | None:
    node = tables.nodes.c
    known = select(node.id, node.endpoint_id, node.revoked).where(node.fingerprint == fingerprint)
    row = connection.execute(known).one_or_none()
    if row is not None and row.revoked is not None:
        raise ApiError(
            403,
            "PermissionDenied",
            "This relay's operator has revoked the agent's key. Move its state directory away, and set it up anew.",
        )
    return None if row is None else _KnownNode(row.id, row.endpoint_id)


def _settle(
    connection: Connection, owner_id: str, request: EnrolRequest, fingerprint: str, node: _KnownNode | None, now: float
) -> tuple[str, str]:
    """Node and endpoint that the collection goes to: those the applicant's key has already, or new ones."""
    if request.node_id is not None and (node is None or node.id != request.node_id.lower()):
        raise ApiError(
            403, "PermissionDenied", f"Node '{request.node_id}' is not known here under this key; set it up anew."
        )
    if node is None:
        endpoint_id, node_id = str(uuid.uuid4()), str(uuid.uuid4())
        connection.execute(insert(tables.endpoints).values(id=endpoint_id, owner_id=owner_id, created=now))
        connection.execute(
            insert(tables.nodes).values(
                id=node_id,
                endpoint_id=endpoint_id,
                certificate=request.certificate,
                fingerprint=fingerprint,
                hostname=request.hostname[:255],
                version=request.version[:64],
                created=now,
                journal="",
                last_event=0,
                paused=False,
            )
        )
        return node_id, endpoint_id
    owner = connection.execute(
        select(tables.endpoints.c.owner_id).where(tables.endpoints.c.id == node.endpoint_id)
    ).scalar_one()
    if owner != owner_id:
        raise ApiError(
            403,
            "PermissionDenied",
            "This agent belongs to another user; a setup key adds a collection only to an agent of the same owner.",
        )
    return node.id, node.endpoint_id


def _answer(
    connection: Connection, name: RelayName, collection: collections.Collection, node_id: str, endpoint_id: str
) -> EnrolAnswer:
    owner = select_by_ids(connection, [collection.owner_id]).get(collection.owner_id)
    return EnrolAnswer(
        endpoint_id=endpoint_id,
        node_id=node_id,
        collection_id=collection.id,
        display_name=collection.display_name,
        owner="" if owner is None else owner.username,
        owner_id=collection.owner_id,
        relay_id=name.relay_id,
        relay_root=name.relay_root,
    )


def _invalid_key() -> ApiError:
    return ApiError(
        403, "SetupKeyInvalid", "This setup key is unknown, was already used, or has expired; ask for a new one."
    )
