"""Scope strings: what a token allows, and for which service.

A request is a list of scopes separated by spaces; each may carry dependencies in square brackets, nested to any
depth up to a bound, and a dependency may be marked optional with a star: ``A[B *C[D]] E``. The same scope may appear
several times; repetitions are merged. Source: the Globus Auth documents and clients (`globus_sdk.scopes`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

AUTH_SERVER = "auth.globus.org"
TRANSFER_SERVER = "transfer.api.globus.org"
GROUPS_SERVER = "groups.api.globus.org"
SEARCH_SERVER = "search.api.globus.org"
TIMERS_ID = "524230d7-ea86-4a52-8312-86065a9e0417"
FLOWS_ID = "eec9b274-0c81-4334-bdc2-54e90e689b9a"
FLOWS_SERVER = "flows.globus.org"
COMPUTE_ID = "facd7ccc-c5f4-42aa-916b-a0e270e2c2a9"
COMPUTE_SERVER = "funcx_service"

OPENID_SCOPES = frozenset({"openid", "profile", "email"})
TRANSFER_ALL = f"urn:globus:auth:scope:{TRANSFER_SERVER}:all"
VIEW_IDENTITY_SET = f"urn:globus:auth:scope:{AUTH_SERVER}:view_identity_set"
VIEW_CONSENTS = f"urn:globus:auth:scope:{AUTH_SERVER}:view_consents"
VIEW_CLIENTS_AND_SCOPES = f"urn:globus:auth:scope:{AUTH_SERVER}:view_clients_and_scopes"
MANAGE_PROJECTS = f"urn:globus:auth:scope:{AUTH_SERVER}:manage_projects"

MAX_LENGTH = 16 * 1024
MAX_DEPTH = 16
MAX_SCOPES = 500

_URN_NAMES: Mapping[str, frozenset[str]] = {
    AUTH_SERVER: frozenset(
        {
            "view_identity_set",
            "view_identities",
            "manage_projects",
            "view_consents",
            "view_clients",
            "view_clients_and_scopes",
            "view_authentications",
        }
    ),
    TRANSFER_SERVER: frozenset({"all", "gcp_install"}),
    GROUPS_SERVER: frozenset({"all", "view_my_groups_and_memberships", "view_my_groups"}),
    SEARCH_SERVER: frozenset({"all", "search", "ingest", "globus_connect_server"}),
}
_URL_NAMES: Mapping[str, tuple[str, frozenset[str]]] = {
    TIMERS_ID: (TIMERS_ID, frozenset({"timer"})),
    FLOWS_ID: (
        FLOWS_SERVER,
        frozenset({"all", "manage_flows", "view_flows", "run", "run_status", "run_manage"}),
    ),
    COMPUTE_ID: (COMPUTE_SERVER, frozenset({"all"})),
}
_URN = re.compile(r"urn:globus:auth:scope:([A-Za-z0-9._-]+):([A-Za-z0-9_]+)")
_URL = re.compile(r"https://auth\.globus\.org/scopes/([A-Za-z0-9._-]+)/([A-Za-z0-9_]+)")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# RFC 6749, 3.3, without the characters that the bracket grammar uses.
_PART = re.compile(r"[\x21\x23-\x29\x2b-\x5a\x5e-\x7e]+|[\[\]* ]")


class InvalidScope(ValueError):
    """The request does not follow the grammar, or asks for a scope that this relay does not know."""


@dataclass
class Scope:
    """One requested scope with its dependencies by name.

    ``optional`` marks a dependency that may be refused, ``lasting`` one that the service above it needs while the
    person is away: a refresh token. The text of a scope has no sign for the latter, which is for developers to say.
    """

    name: str
    optional: bool = False
    dependencies: dict[str, Scope] = field(default_factory=dict)
    lasting: bool = False

    def __str__(self) -> str:
        inner = " ".join(str(dependency) for dependency in self.dependencies.values())
        return ("*" if self.optional else "") + self.name + (f"[{inner}]" if inner else "")

    def any_lasting(self) -> bool:
        """Whether this or anything below it is needed while the person is away."""
        return self.lasting or any(dependency.any_lasting() for dependency in self.dependencies.values())

    def merge(self, other: Scope) -> None:
        """Take in what another mention of the same scope asks for. Required wins over optional."""
        self.optional = self.optional and other.optional
        self.lasting = self.lasting or other.lasting
        for dependency in other.dependencies.values():
            _add(self.dependencies, dependency)


def parse_untrusted(text: str) -> dict[str, Scope]:
    """The scopes of a request, in the order of their first mention, repetitions merged.

    Raises only `InvalidScope`.
    """
    if len(text) > MAX_LENGTH:
        raise InvalidScope(f"The scope of the request is longer than {MAX_LENGTH} characters.")
    levels: list[dict[str, Scope]] = [{}]
    owners: list[Scope] = []
    last: Scope | None = None
    optional = False
    count = 0
    for part in _parts(text):
        if part == "[":
            if last is None:
                raise InvalidScope("An opening bracket in the scope does not follow a scope directly.")
            if len(levels) > MAX_DEPTH:
                raise InvalidScope(f"The scope is nested more than {MAX_DEPTH} levels deep.")
            owners.append(last)
            levels.append({})
            last = None
        elif part == "]":
            if optional or len(levels) == 1:
                raise InvalidScope("A closing bracket in the scope has no opening one, or follows a star.")
            inner = levels.pop()
            if not inner:
                raise InvalidScope("There is nothing between two brackets of the scope.")
            owner = owners.pop()
            owner.merge(Scope(owner.name, owner.optional, inner))
            last = None
        elif part == "*":
            if optional or len(levels) == 1:
                raise InvalidScope("A star in the scope must stand before a dependency, inside brackets.")
            optional = True
        elif part == " ":
            if optional:
                raise InvalidScope("A star in the scope is followed by a space.")
            last = None
        else:
            count += 1
            if count > MAX_SCOPES:
                raise InvalidScope(f"The request names more than {MAX_SCOPES} scopes.")
            last = _add(levels[-1], Scope(part, optional))
            optional = False
    if len(levels) > 1 or optional:
        raise InvalidScope("A bracket of the scope is not closed, or a star stands at its end.")
    return levels[0]


def _parts(text: str) -> list[str]:
    parts, end = [], 0
    while end < len(text):
        match = _PART.match(text, end)
        if match is None:
            raise InvalidScope("The scope contains a character that no scope may have.")
        parts.append(match.group())
        end = match.end()
    return parts


def _add(into: dict[str, Scope], scope: Scope) -> Scope:
    present = into.get(scope.name)
    if present is None:
        into[scope.name] = scope
        return scope
    present.merge(scope)
    return present


def resource_server_of(name: str) -> str | None:
    """The service a scope is for, or None when this relay does not know the scope.

    Scopes of one endpoint or collection (``manage_collections``, ``https``, ``data_access``, flows) name it as their
    resource server; whether it exists is for the caller to find out (`unknown_ids`).
    """
    if name in OPENID_SCOPES:
        return AUTH_SERVER
    if match := _URN.fullmatch(name):
        server, word = match.groups()
        if word in _URN_NAMES.get(server, ()):
            return server
        return server if word == "manage_collections" and _UUID.fullmatch(server) else None
    if match := _URL.fullmatch(name):
        owner, word = match.groups()
        if owner in _URL_NAMES:
            server, words = _URL_NAMES[owner]
            return server if word in words else None
        if _UUID.fullmatch(owner) and word in ("https", "data_access", f"flow_{owner.replace('-', '_')}_user"):
            return owner
    return None


def object_ids(servers: Iterable[str]) -> set[str]:
    """Those resource servers that are endpoints, collections or flows rather than services."""
    return {server for server in servers if _UUID.fullmatch(server) and server != TIMERS_ID}
