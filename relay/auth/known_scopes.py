"""What each scope is: the ones every relay knows and those that clients of this relay offer.

A scope of one endpoint or collection exists when that exists. Custom scopes are ``https://auth.globus.org/scopes/``,
the id of the client that offers them, ``/`` and a suffix; they may need further scopes, which are then asked for too.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, union

from relay.auth.identities import Identity
from relay.auth.scopes import (
    AUTH_SERVER,
    COMPUTE_SERVER,
    FLOWS_SERVER,
    GROUPS_SERVER,
    SEARCH_SERVER,
    TIMERS_ID,
    TRANSFER_SERVER,
    InvalidScope,
    Scope,
    object_ids,
    resource_server_of,
)
from relay.store import sign_in_tables as tables
from relay.store.transfer_tables import collections, endpoints

MAX_TREE = 500
# So many optional scopes can be refused one by one.
MAX_CHOICES = 40
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CUSTOM = re.compile(r"https://auth\.globus\.org/scopes/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([A-Za-z0-9_]+)")

_WORDS: Mapping[str, str] = {
    "openid": "Know who you are",
    "profile": "See your name, username and organisation",
    "email": "See your e-mail address",
    f"urn:globus:auth:scope:{AUTH_SERVER}:view_identity_set": "See the identities linked to yours",
    f"urn:globus:auth:scope:{AUTH_SERVER}:view_identities": "Look up the identities of other people",
    f"urn:globus:auth:scope:{AUTH_SERVER}:manage_projects": "Manage your applications and their secrets",
    f"urn:globus:auth:scope:{AUTH_SERVER}:view_consents": "See what you have allowed applications to do",
    f"urn:globus:auth:scope:{AUTH_SERVER}:view_clients": "See your applications",
    f"urn:globus:auth:scope:{AUTH_SERVER}:view_clients_and_scopes": "See your applications and their scopes",
    f"urn:globus:auth:scope:{AUTH_SERVER}:view_authentications": "See when and how you signed in",
    f"urn:globus:auth:scope:{TRANSFER_SERVER}:all": (
        "Read, change and delete files on every collection you can use, and transfer data in your name"
    ),
    f"urn:globus:auth:scope:{TRANSFER_SERVER}:gcp_install": "Set up collections in your name",
    f"urn:globus:auth:scope:{GROUPS_SERVER}:all": "See and manage your groups and their members",
    f"urn:globus:auth:scope:{GROUPS_SERVER}:view_my_groups_and_memberships": "See your groups and memberships",
    f"urn:globus:auth:scope:{GROUPS_SERVER}:view_my_groups": "See your groups",
    f"urn:globus:auth:scope:{SEARCH_SERVER}:all": "Search, and manage search indexes in your name",
    f"urn:globus:auth:scope:{SEARCH_SERVER}:search": "Search in your name",
    f"urn:globus:auth:scope:{SEARCH_SERVER}:ingest": "Add entries to search indexes in your name",
    f"https://auth.globus.org/scopes/{TIMERS_ID}/timer": "Run transfers in your name at set times",
}
_OF_SERVER: Mapping[str, str] = {
    FLOWS_SERVER: "Manage and run flows in your name",
    COMPUTE_SERVER: "Run computations in your name",
    SEARCH_SERVER: "Search in your name",
}


class NotForPerson(Exception):
    """A scope is for people of other domains; the sentence says which."""


@dataclass(frozen=True)
class ScopeFacts:
    """One scope that exists. ``words`` completes the sentence "It wants to:"."""

    id: str
    name: str
    server: str
    words: str
    allows_refresh: bool = True
    required_domains: tuple[str, ...] = ()
    needs: tuple[Scope, ...] = ()


def facts_of(connection: Connection, name: str) -> ScopeFacts | None:
    """The scope with this name, or None."""
    server = resource_server_of(name)
    if server is None:
        return _custom(connection, name)
    if object_ids([server]) and not _exist(connection, {server}):
        return None
    return ScopeFacts(id_of(name), name, server, _WORDS.get(name) or _words_of(connection, name, server))


def id_of(name: str) -> str:
    """The id of a scope that every relay knows, or that belongs to an endpoint or collection: the same everywhere."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def names_with_ids(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Which of these ids are those of scopes that no client of this relay defined: their names by id."""
    if not ids:
        return {}
    found = {id_of(name): name for name in _WORDS if id_of(name) in ids}
    if len(found) < len(ids):
        # An id says nothing of its name, so that all that could be meant are gone through.
        for server in connection.execute(union(select(collections.c.id), select(endpoints.c.id))).scalars():
            for name in _of_object(server):
                if id_of(name) in ids:
                    found[id_of(name)] = name
    return found


def _of_object(server: str) -> tuple[str, ...]:
    prefix = f"https://auth.globus.org/scopes/{server}"
    return f"urn:globus:auth:scope:{server}:manage_collections", f"{prefix}/https", f"{prefix}/data_access"


def built_in(connection: Connection, name: str) -> dict[str, Any] | None:
    """The scope document of a scope that no client of this relay defined, or None."""
    if resource_server_of(name) is None:
        return None
    facts = facts_of(connection, name)
    if facts is None:
        return None
    return {
        "id": facts.id,
        "scope_string": name,
        "name": facts.words,
        "description": facts.words,
        "client": facts.server if _UUID.fullmatch(facts.server) else str(uuid.uuid5(uuid.NAMESPACE_DNS, facts.server)),
        "advertised": True,
        "allows_refresh_token": facts.allows_refresh,
        "required_domains": [],
        "dependent_scopes": [],
    }


def _custom(connection: Connection, name: str) -> ScopeFacts | None:
    match = _CUSTOM.fullmatch(name)
    if match is None:
        return None
    table = tables.scopes.c
    row = connection.execute(
        select(tables.scopes).where(table.client_id == match[1], table.suffix == match[2])
    ).one_or_none()
    if row is None:
        return None
    needs = connection.execute(
        select(tables.scope_dependencies).where(tables.scope_dependencies.c.scope_id == row.id)
    ).all()
    return ScopeFacts(
        id=row.id,
        name=name,
        server=row.client_id,
        words=row.description or row.name,
        allows_refresh=row.allows_refresh,
        required_domains=tuple(json.loads(row.required_domains)),
        needs=tuple(Scope(item.needs, item.optional, lasting=item.requires_refresh_token) for item in needs),
    )


def _words_of(connection: Connection, name: str, server: str) -> str:
    if server in _OF_SERVER:
        return _OF_SERVER[server]
    query = select(collections.c.display_name).where(collections.c.id == server)
    title = connection.execute(query).scalar_one_or_none() or server
    if name.endswith(":manage_collections"):
        return f"Manage the collections of “{title}”"
    if name.endswith("/https"):
        return f"Read and write files on “{title}” over HTTPS"
    if name.endswith("/data_access"):
        return f"Use your data on “{title}”"
    return f"Use {name}"


def _exist(connection: Connection, ids: set[str]) -> bool:
    known = union(
        select(collections.c.id).where(collections.c.id.in_(ids), collections.c.deleted.is_(None)),
        select(endpoints.c.id).where(endpoints.c.id.in_(ids)),
    )
    return set(connection.execute(known).scalars()) == ids


def expand(connection: Connection, requested: Iterable[Scope]) -> dict[str, tuple[Scope, ScopeFacts]]:
    """The requested scopes, each with what it needs added below it, and the facts of each top-level scope.

    Raises `InvalidScope` when a scope does not exist or the whole is too large.
    """
    budget = [MAX_TREE]
    found: dict[str, tuple[Scope, ScopeFacts]] = {}
    for scope in requested:
        grown, facts = _grow(connection, scope, (), budget)
        found[scope.name] = (grown, facts)
    return found


def _grow(connection: Connection, scope: Scope, above: tuple[str, ...], budget: list[int]) -> tuple[Scope, ScopeFacts]:
    budget[0] -= 1
    if budget[0] < 0:
        raise InvalidScope(f"The request needs more than {MAX_TREE} scopes.")
    facts = facts_of(connection, scope.name)
    if facts is None:
        raise InvalidScope(f"The scope {scope.name[:300]} is unknown here.")
    grown = Scope(scope.name, scope.optional, lasting=scope.lasting)
    # A scope that needs itself again further down is granted already where it first stands.
    path = (*above, scope.name)
    for dependency in (*scope.dependencies.values(), *facts.needs):
        if dependency.name not in path:
            below, _ = _grow(connection, dependency, path, budget)
            present = grown.dependencies.get(below.name)
            if present is None:
                grown.dependencies[below.name] = below
            else:
                present.merge(below)
    return grown, facts


@dataclass(frozen=True)
class Below:
    """What the service behind a scope may use in turn; ``lasting``: also while people are away.

    ``field`` names the box that may be left empty where the scope is optional.
    """

    scope: str
    lasting: bool
    field: str | None


@dataclass(frozen=True)
class Wish:
    """One requested scope as people are asked for it."""

    words: str
    scope: str
    below: tuple[Below, ...]

    @property
    def has_choice(self) -> bool:
        """Whether part of it can be refused alone."""
        return any(one.field is not None for one in self.below)


def wishes_of(expanded: Mapping[str, tuple[Scope, ScopeFacts]]) -> list[Wish]:
    """The requested scopes in words."""
    boxes = {(above, below): box for box, above, below in _choices(expanded)}
    return [
        Wish(
            facts.words,
            name,
            tuple(
                Below(str(one).removeprefix("*"), one.any_lasting(), boxes.get((name, one.name)))
                for one in scope.dependencies.values()
            ),
        )
        for name, (scope, facts) in expanded.items()
    ]


def digest_of(wishes: Iterable[Wish]) -> str:
    """What people were shown, as their answer names it: the scope's developer may change it while they read."""
    return hashlib.sha256(repr(list(wishes)).encode()).hexdigest()


def leave_out(expanded: Mapping[str, tuple[Scope, ScopeFacts]], ticked: Collection[str]) -> list[tuple[str, str]]:
    """Take what somebody refused out of the requested scopes; returns each with the scope that it stood below."""
    refused = [(above, below) for box, above, below in _choices(expanded) if box not in ticked]
    for above, below in refused:
        del expanded[above][0].dependencies[below]
    return refused


def _choices(expanded: Mapping[str, tuple[Scope, ScopeFacts]]) -> list[tuple[str, str, str]]:
    pairs = [
        (name, one.name) for name, (scope, _) in expanded.items() for one in scope.dependencies.values() if one.optional
    ]
    # More would not fit into a form; they are asked for like what is not optional.
    return [(f"below-{number}", *pair) for number, pair in enumerate(pairs[:MAX_CHOICES])]


def check_domains(scopes: Iterable[ScopeFacts], person: Iterable[Identity]) -> None:
    """Whether a person may have these scopes, some of which are for identities of certain domains.

    Raises `NotForPerson`.
    """
    own = {identity.username.rpartition("@")[2] for identity in person}
    for facts in scopes:
        if facts.required_domains and not own & set(facts.required_domains):
            domains = " or ".join(facts.required_domains)
            raise NotForPerson(f"The scope {facts.name} is for identities of {domains} only.")


def lasting_servers(expanded: Mapping[str, tuple[Scope, ScopeFacts]]) -> set[str]:
    """The resource servers for which a refresh token may be given: all that is asked of them allows one."""
    kept_back = {facts.server for _, facts in expanded.values() if not facts.allows_refresh}
    return {facts.server for _, facts in expanded.values()} - kept_back


def by_server(expanded: Mapping[str, tuple[Scope, ScopeFacts]]) -> dict[str, list[str]]:
    """Top-level scope names for each resource server, `AUTH_SERVER` first: one token is issued for each."""
    groups: dict[str, list[str]] = {}
    for name, (_, facts) in expanded.items():
        groups.setdefault(facts.server, []).append(name)
    return dict(sorted(groups.items(), key=lambda item: item[0] != AUTH_SERVER))
