"""Access rules of collections: which folders the owner has opened to whom.

A rule counts only while the owner's own configuration lets the collection be shared. Rules that have expired grant
nothing from that moment on; `remove_expired` tidies them away.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from protocol.errors import ProtocolError
from protocol.names import CollectionPath, below_home, format_path, parse_path_untrusted
from relay.access.decisions import Rule
from relay.auth.identities import select_by_ids
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.times import api_time
from relay.transfer.fields import Fields, bad_request

MAX_RULES = 1000
MAX_PATH = 4096
# Characters of the paths of all rules of a collection: whoever asks for it waits while they are read.
MAX_PATHS = 200_000
PRINCIPAL_TYPES = ("identity", "group", "all_authenticated_users", "anonymous")
_rule = tables.access_rules.c


@dataclass(frozen=True, kw_only=True)
class StoredRule:
    """One row. ``path`` is a folder in its canonical text, with a slash at its end."""

    id: str
    collection_id: str
    principal_type: str
    principal: str
    path: str
    permissions: str
    created: float
    expires: float | None


def of_collections(connection: Connection, ids: Iterable[str]) -> dict[str, list[Rule]]:
    """The rules of collections, as decisions read them."""
    found: dict[str, list[Rule]] = {}
    for row in connection.execute(select(tables.access_rules).where(_rule.collection_id.in_(sorted(ids)))):
        # What is stored was written by `_folder`, so it can be read.
        rule = Rule(row.principal_type, row.principal, parse_path_untrusted(row.path), row.permissions, row.expires)
        found.setdefault(row.collection_id, []).append(rule)
    return found


def listed(connection: Connection, collection_id: str) -> list[StoredRule]:
    """All rules of a collection, oldest first."""
    query = select(tables.access_rules).where(_rule.collection_id == collection_id).order_by(_rule.created, _rule.id)
    return [StoredRule(**row) for row in connection.execute(query).mappings()]


def find(connection: Connection, collection_id: str, rule_id: str) -> StoredRule:
    """One rule. Raises `ApiError` 404 AccessRuleNotFound."""
    query = select(tables.access_rules).where(_rule.collection_id == collection_id, _rule.id == rule_id[:64].lower())
    row = connection.execute(query).mappings().first()
    if row is None:
        raise ApiError(404, "AccessRuleNotFound", f"No such access rule '{rule_id[:64]}' on this endpoint.")
    return StoredRule(**row)


def rule_document(rule: StoredRule) -> dict[str, Any]:
    """The access document of the Transfer API."""
    return {
        "DATA_TYPE": "access",
        "id": rule.id,
        "principal_type": rule.principal_type,
        "principal": rule.principal,
        "path": rule.path,
        "permissions": rule.permissions,
        "create_time": api_time(rule.created),
        "expiration_date": api_time(rule.expires),
        "role_id": None,
        "role_type": None,
    }


def administrator_document(principal_type: str, principal: str, role_id: str | None) -> dict[str, Any]:
    """The access that comes from the role ``administrator``, shown among the rules and not editable there."""
    return {
        "DATA_TYPE": "access",
        "id": None,
        "principal_type": principal_type,
        "principal": principal,
        "path": "/",
        "permissions": "rw",
        "create_time": None,
        "expiration_date": None,
        "role_id": role_id,
        "role_type": "administrator",
    }


@dataclass(frozen=True, kw_only=True)
class NewRule:
    """What a request to open a folder asks for."""

    principal_type: str
    principal: str
    path: str
    permissions: str
    expires: float | None


def read_request(document: object, now: float) -> NewRule:
    """A rule as a client wrote it. Raises `ApiError` 400, and 501 for groups."""
    fields = Fields(document, "the access rule")
    fields.data_type("access")
    kind = fields.choice("principal_type", PRINCIPAL_TYPES, "")
    if not kind:
        raise bad_request(f"principal_type must be one of {', '.join(PRINCIPAL_TYPES)}.")
    if kind == "group":
        raise ApiError(501, "NotSupported", "This relay has no groups; give access to identities.")
    # Clients send an empty principal, or none, where the type says it all.
    principal = fields.identifier("principal") if kind == "identity" else ""
    if kind != "identity" and fields.raw("principal") not in (None, "", kind):
        raise bad_request(f"principal must be empty for {kind}.")
    return NewRule(
        principal_type=kind,
        principal=principal,
        path=_folder(fields.required_text("path", longest=MAX_PATH)),
        permissions=_permissions(fields),
        expires=_expires(fields, now),
    )


def _folder(text: str) -> str:
    if below_home(text):
        raise bad_request("path must begin at the collection's root, with a slash; rules do not count from home.")
    try:
        path: CollectionPath = parse_path_untrusted(text)
    except ProtocolError as error:
        raise bad_request(f"path: {error.sentence}") from error
    return format_path(path, directory=True)


def _permissions(fields: Fields) -> str:
    permissions = fields.choice("permissions", ("r", "rw"), "")
    if not permissions:
        raise bad_request("permissions must be r or rw.")
    return permissions


def _expires(fields: Fields, now: float) -> float | None:
    expires = fields.time("expiration_date")
    if expires is not None and expires <= now:
        raise bad_request("expiration_date lies in the past.")
    return expires


def add(connection: Connection, collection_id: str, new: NewRule, *, writable: bool, now: float) -> StoredRule:
    """Open a folder. ``writable`` says whether people who are not signed in may be let write.

    Raises `ApiError`: 400 for an unknown identity, 409 Exists for the same person and folder, 409 for too many.
    """
    if new.principal_type == "identity" and new.principal not in select_by_ids(connection, [new.principal]):
        raise bad_request(f"There is no identity '{new.principal}'.")
    if new.principal_type == "anonymous" and new.permissions == "rw" and not writable:
        raise bad_request("This endpoint does not let people write who are not signed in.")
    mine = _rule.collection_id == collection_id
    present = connection.execute(
        select(_rule.id).where(
            mine,
            _rule.principal_type == new.principal_type,
            _rule.principal == new.principal,
            _rule.path == new.path,
        )
    ).first()
    if present is not None:
        raise ApiError(409, "Exists", "There is a rule for this principal and this path already; change that one.")
    held = select(func.count(), func.coalesce(func.sum(func.length(_rule.path)), 0)).where(mine)
    count, characters = connection.execute(held).one()
    if count >= MAX_RULES:
        raise ApiError(409, "Conflict", f"An endpoint has at most {MAX_RULES} access rules.")
    if characters + len(new.path) > MAX_PATHS:
        sentence = f"The paths of an endpoint's access rules have at most {MAX_PATHS} characters together."
        raise ApiError(409, "Conflict", sentence)
    rule = StoredRule(id=str(uuid.uuid4()), collection_id=collection_id, created=now, **vars(new))
    connection.execute(insert(tables.access_rules).values(**vars(rule)))
    return rule


def change(connection: Connection, rule: StoredRule, document: object, *, writable: bool, now: float) -> None:
    """Change permissions or expiry; other keys are ignored. Raises `ApiError` 400."""
    fields = Fields(document, "the access rule")
    fields.data_type("access")
    values: dict[str, Any] = {}
    if fields.raw("permissions") is not None:
        values["permissions"] = _permissions(fields)
        if rule.principal_type == "anonymous" and values["permissions"] == "rw" and not writable:
            raise bad_request("This endpoint does not let people write who are not signed in.")
    if "expiration_date" in fields:
        values["expires"] = _expires(fields, now)
    if values:
        connection.execute(update(tables.access_rules).where(_rule.id == rule.id).values(**values))


def remove(connection: Connection, rule_id: str) -> None:
    """Take a rule away; tasks that lose their permission by it are the caller's to end."""
    connection.execute(delete(tables.access_rules).where(_rule.id == rule_id))


def remove_expired(connection: Connection, now: float) -> list[str]:
    """Forget rules past their time; returns the collections that had some."""
    past = _rule.expires <= now
    affected = connection.execute(select(_rule.collection_id).where(past).distinct()).scalars().all()
    if affected:
        connection.execute(delete(tables.access_rules).where(past))
    return list(affected)


def next_expiry(connection: Connection) -> float | None:
    """When the next rule ends, or None."""
    return connection.execute(select(func.min(_rule.expires))).scalar_one_or_none()
