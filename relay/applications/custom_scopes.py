"""Scopes that clients of this relay offer to others, as developers define them.

A scope's string is ``https://auth.globus.org/scopes/``, the id of its client, ``/`` and its suffix. It may need further
scopes, which whoever allows it allows too, and which its client gets as dependent tokens.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, literal, select, update

from relay.access.decisions import Subject
from relay.applications import documents, projects, registration
from relay.auth import consents
from relay.auth.known_scopes import built_in, facts_of, names_with_ids
from relay.auth.scopes import resource_server_of
from relay.refusal import ApiError
from relay.store.auth_tables import tokens
from relay.store.sign_in_tables import scope_dependencies, scopes

MAX_SCOPES = 100
MAX_NEEDS = 50
_SUFFIX = re.compile(r"[a-z0-9_]{1,80}")
_PREFIX = "https://auth.globus.org/scopes/"


@dataclass(frozen=True)
class Need:
    """A scope that another one needs.

    ``optional``: whoever is asked may refuse it alone. ``requires_refresh_token``: the service needs it while people
    are away; they are told so, and it gets a refresh token when it asks with ``access_type=offline``.
    """

    scope: str
    optional: bool
    requires_refresh_token: bool


@dataclass(frozen=True)
class CustomScope:
    """A scope as its developer defined it."""

    id: str
    client_id: str
    suffix: str
    name: str
    description: str
    advertised: bool
    allows_refresh: bool
    required_domains: tuple[str, ...]
    needs: tuple[Need, ...]

    @property
    def string(self) -> str:
        """The scope as applications ask for it."""
        return f"{_PREFIX}{self.client_id}/{self.suffix}"


def of_clients(connection: Connection, client_ids: Iterable[str]) -> list[CustomScope]:
    """The scopes of some clients, oldest first."""
    query = select(scopes).where(scopes.c.client_id.in_(list(client_ids))).order_by(scopes.c.created)
    return [_custom(connection, row) for row in connection.execute(query).all()]


def administered(connection: Connection, subject: Subject) -> list[CustomScope]:
    """The scopes of all clients of a person's projects."""
    mine = [project.id for project in projects.administered(connection, subject)]
    return of_clients(connection, [one.client.id for one in registration.of_projects(connection, mine)])


def _custom(connection: Connection, row: Any) -> CustomScope:
    table = scope_dependencies
    needs = connection.execute(select(table).where(table.c.scope_id == row.id).order_by(table.c.needs)).all()
    return CustomScope(
        id=row.id,
        client_id=row.client_id,
        suffix=row.suffix,
        name=row.name,
        description=row.description,
        advertised=row.advertised,
        allows_refresh=row.allows_refresh,
        required_domains=tuple(json.loads(row.required_domains)),
        needs=tuple(Need(item.needs, item.optional, item.requires_refresh_token) for item in needs),
    )


def find(connection: Connection, scope_id: str) -> CustomScope | None:
    """A scope by its id, whoever it belongs to."""
    row = connection.execute(select(scopes).where(scopes.c.id == scope_id.lower()[:36])).first()
    return None if row is None else _custom(connection, row)


def require(connection: Connection, scope_id: str, subject: Subject) -> CustomScope:
    """A scope of a client that the person administers. Raises `ApiError` 404."""
    found = find(connection, scope_id)
    if found is not None:
        try:
            registration.require(connection, found.client_id, subject)
        except ApiError as error:
            raise projects.not_found("scope", scope_id) from error
        return found
    raise projects.not_found("scope", scope_id)


def _is_visible(connection: Connection, scope: CustomScope, subject: Subject) -> bool:
    if scope.advertised:
        return True
    try:
        registration.look(connection, scope.client_id, subject)
    except ApiError:
        return False
    return True


def look(connection: Connection, scope_id: str, subject: Subject) -> dict[str, Any]:
    """The document of a scope that the person may see, a built-in one included. Raises `ApiError` 404."""
    found = look_up(connection, subject, ids=[scope_id])
    if not found:
        raise projects.not_found("scope", scope_id)
    return found[0]


def look_up(
    connection: Connection, subject: Subject, *, ids: Iterable[str] = (), strings: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """The documents of the scopes with these ids or strings that the person may see; others are left out."""
    wanted = [scope_id.lower()[:36] for scope_id in ids]
    found = [one for one in (find(connection, scope_id) for scope_id in wanted) if one is not None]
    names = list(names_with_ids(connection, set(wanted) - {one.id for one in found}).values())
    for string in strings:
        custom = _by_string(connection, string)
        if custom is not None:
            found.append(custom)
        else:
            names.append(string)
    documents_ = [scope_document(connection, one) for one in found if _is_visible(connection, one, subject)]
    return documents_ + [shown for shown in (built_in(connection, name) for name in names) if shown is not None]


def _by_string(connection: Connection, string: str) -> CustomScope | None:
    client_id, _, suffix = string.removeprefix(_PREFIX).partition("/")
    if not string.startswith(_PREFIX) or resource_server_of(string) is not None:
        return None
    mine = (scopes.c.client_id == client_id) & (scopes.c.suffix == suffix)
    row = connection.execute(select(scopes).where(mine)).first()
    return None if row is None else _custom(connection, row)


def create(connection: Connection, client_id: str, document: Mapping[str, Any], subject: Subject) -> CustomScope:
    """A new scope of a client. Raises `ApiError` 400, 404, 409."""
    client = registration.require(connection, client_id, subject).client
    if client.public:
        raise documents.invalid("A public client has no secret, so nobody could know who asks about its tokens.")
    count = select(func.count()).select_from(scopes).where(scopes.c.client_id == client.id)
    if connection.execute(count).scalar_one() >= MAX_SCOPES:
        raise ApiError(409, "CONFLICT", f"A client has at most {MAX_SCOPES} scopes.")
    documents.required(document, "name")
    documents.required(document, "description")
    values = {"advertised": False, "allows_refresh": True, "required_domains": "[]", **_values(document)}
    values["suffix"] = _suffix(connection, client.id, documents.required(document, "scope_suffix"))
    scope_id = str(uuid.uuid4())
    connection.execute(insert(scopes).values(id=scope_id, client_id=client.id, created=subject.now, **values))
    _set_needs(connection, scope_id, _needs(connection, document, subject) or ())
    made = find(connection, scope_id)
    assert made is not None
    return made


def change(connection: Connection, scope: CustomScope, document: Mapping[str, Any], subject: Subject) -> CustomScope:
    """Change the keys that are present. Under a new suffix nothing counts that was allowed under the former one.

    Raises `ApiError` 400, 409.
    """
    values = _values(document)
    suffix = documents.text(document, "scope_suffix")
    if suffix is not None and suffix != scope.suffix:
        values["suffix"] = _suffix(connection, scope.client_id, suffix)
        _forget(connection, scope)
    if values:
        connection.execute(update(scopes).where(scopes.c.id == scope.id).values(**values))
    needs = _needs(connection, document, subject)
    if needs is not None:
        _set_needs(connection, scope.id, needs)
    changed = find(connection, scope.id)
    assert changed is not None
    if changed.string != scope.string:
        table = scope_dependencies
        connection.execute(update(table).where(table.c.needs == scope.string).values(needs=changed.string))
    return changed


def remove(connection: Connection, scope: CustomScope) -> None:
    """Delete a scope, with the consents and tokens that name it; others that needed it do so no more."""
    _forget(connection, scope)
    connection.execute(delete(scope_dependencies).where(scope_dependencies.c.needs == scope.string))
    connection.execute(delete(scopes).where(scopes.c.id == scope.id))


def _forget(connection: Connection, scope: CustomScope) -> None:
    consents.forget_scope(connection, scope.string)
    words = literal(" ").concat(tokens.c.scope).concat(" ")
    named = func.instr(words, f" {scope.string} ") > 0
    connection.execute(delete(tokens).where(tokens.c.resource_server == scope.client_id, named))


def _suffix(connection: Connection, client_id: str, suffix: str) -> str:
    string = f"{_PREFIX}{client_id}/{suffix}"
    # Such as https and data_access, which mean a collection.
    if _SUFFIX.fullmatch(suffix) is None or resource_server_of(string) is not None:
        raise documents.invalid(
            "scope_suffix must be lower-case letters, digits and underscores, and not a known word."
        )
    if _by_string(connection, string) is not None:
        raise ApiError(409, "CONFLICT", f"The client has a scope {suffix} already.")
    return suffix


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        key: documents.required(document, key) for key in ("name", "description") if document.get(key) is not None
    }
    for key, column in (("advertised", "advertised"), ("allows_refresh_token", "allows_refresh")):
        if document.get(key) is not None:
            values[column] = documents.switch(document, key, False)
    wanted = documents.domains(document, "required_domains")
    if wanted is not None:
        if any(domain.startswith("*.") for domain in wanted):
            raise documents.invalid("required_domains must be whole domains such as example.org.")
        values["required_domains"] = json.dumps(wanted)
    return values


def _needs(connection: Connection, document: Mapping[str, Any], subject: Subject) -> list[Need] | None:
    """The dependent scopes of a document, each given by its id or its string; None when it says nothing of them."""
    wanted = document.get("dependent_scopes")
    if wanted is None:
        return None
    if not isinstance(wanted, list) or len(wanted) > MAX_NEEDS or not all(isinstance(item, dict) for item in wanted):
        raise documents.invalid(f"dependent_scopes must be a list of at most {MAX_NEEDS} objects.")
    named = [documents.required(item, "scope") for item in wanted]
    strings = {scope for scope in named if ":" in scope or scope.isalpha()}
    # All at once: whatever is meant by an id is searched for among the scopes of all collections.
    found = look_up(connection, subject, ids=set(named) - strings, strings=strings)
    known = {one[key]: one for one in found for key in ("id", "scope_string")}
    return [
        _need(item, scope, known.get(scope) or known.get(scope.lower()[:36]))
        for item, scope in zip(wanted, named, strict=True)
    ]


def _need(item: Mapping[str, Any], scope: str, found: Mapping[str, Any] | None) -> Need:
    if found is None:
        raise documents.invalid(f"dependent_scopes: there is no scope '{scope[:300]}'.")
    string, lasting = str(found["scope_string"]), documents.switch(item, "requires_refresh_token", False)
    if lasting and not found["allows_refresh_token"]:
        raise documents.invalid(
            f"dependent_scopes: {string} gives nobody a refresh token, so that none can require one of it."
        )
    return Need(string, documents.switch(item, "optional", False), lasting)


def _set_needs(connection: Connection, scope_id: str, needs: Sequence[Need]) -> None:
    connection.execute(delete(scope_dependencies).where(scope_dependencies.c.scope_id == scope_id))
    rows = {
        need.scope: {
            "scope_id": scope_id,
            "needs": need.scope,
            "optional": need.optional,
            "requires_refresh_token": need.requires_refresh_token,
        }
        for need in needs
    }
    if rows:
        connection.execute(insert(scope_dependencies), list(rows.values()))


def scope_document(connection: Connection, scope: CustomScope) -> dict[str, Any]:
    """The scope document of the Auth API."""
    known = [(need, facts_of(connection, need.scope)) for need in scope.needs]
    return {
        "id": scope.id,
        "scope_string": scope.string,
        "name": scope.name,
        "description": scope.description,
        "client": scope.client_id,
        "advertised": scope.advertised,
        "allows_refresh_token": scope.allows_refresh,
        "required_domains": list(scope.required_domains),
        "dependent_scopes": [
            {
                "scope": facts.id,
                "optional": need.optional,
                "requires_refresh_token": need.requires_refresh_token,
            }
            for need, facts in known
            if facts is not None
        ],
    }
