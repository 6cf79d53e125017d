"""Consents: what a person has allowed an application to do, as a tree for each application.

A node is a scope; below it stands what that scope's service may in turn use. Globus's clients rebuild the tree from
each node's path and look whether what they need is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, func, insert, literal, select, update

from relay.auth.known_scopes import facts_of
from relay.auth.scopes import Scope
from relay.store.auth_tables import clients, sessions, tokens
from relay.store.sign_in_tables import consents
from relay.times import iso


@dataclass(frozen=True)
class Consent:
    """One node. Times are Unix seconds; ``path`` are the ids from the root of the tree to this node."""

    id: int
    client_id: str
    client_name: str
    scope: str
    path: tuple[int, ...]
    optional: bool
    allows_refresh: bool
    created: float
    updated: float
    last_used: float


def covers(connection: Connection, identity_id: str, client_id: str, wanted: Iterable[Scope], *, offline: bool) -> bool:
    """Whether everything wanted was allowed before; ``offline`` asks for refresh tokens as well."""
    return all(_covered(connection, identity_id, client_id, None, scope, offline=offline) for scope in wanted)


def _covered(
    connection: Connection, identity_id: str, client_id: str, parent: int | None, scope: Scope, *, offline: bool
) -> bool:
    row = _node(connection, identity_id, client_id, parent, scope.name)
    lasting = scope.lasting or (offline and parent is None)
    if row is None or (lasting and not row.allows_refresh):
        return False
    return all(
        _covered(connection, identity_id, client_id, row.id, dependency, offline=offline)
        for dependency in scope.dependencies.values()
    )


def _node(connection: Connection, identity_id: str, client_id: str, parent: int | None, scope: str) -> Any:
    table = consents.c
    return connection.execute(
        select(table.id, table.allows_refresh).where(
            table.identity_id == identity_id,
            table.client_id == client_id,
            table.parent_id.is_not_distinct_from(parent),
            table.scope == scope,
        )
    ).first()


def record(
    connection: Connection, identity_id: str, client_id: str, allowed: Iterable[Scope], *, offline: bool, now: float
) -> None:
    """Remember what was allowed, beside what was before."""
    for scope in allowed:
        _record(connection, identity_id, client_id, None, scope, offline=offline, now=now)


def _record(
    connection: Connection,
    identity_id: str,
    client_id: str,
    parent: int | None,
    scope: Scope,
    *,
    offline: bool,
    now: float,
) -> None:
    row = _node(connection, identity_id, client_id, parent, scope.name)
    lasting = offline or scope.lasting
    if row is None:
        made = connection.execute(
            insert(consents).values(
                identity_id=identity_id,
                client_id=client_id,
                parent_id=parent,
                scope=scope.name,
                optional=scope.optional,
                allows_refresh=lasting,
                created=now,
                updated=now,
                last_used=now,
            )
        )
        key = made.inserted_primary_key
        assert key is not None
        node: int = key[0]
    else:
        node = row.id
        changed: dict[str, Any] = {"last_used": now}
        if lasting and not row.allows_refresh:
            changed |= {"allows_refresh": True, "updated": now}
        connection.execute(update(consents).where(consents.c.id == node).values(changed))
    for dependency in scope.dependencies.values():
        _record(connection, identity_id, client_id, node, dependency, offline=offline, now=now)


def forget_refused(
    connection: Connection, identity_id: str, client_id: str, refused: Iterable[tuple[str, str]]
) -> None:
    """Forget what somebody allowed before and has refused now: scopes, each with the one that it stands below. Tokens
    that a service has got by it end."""
    for above, below_it in refused:
        root = _node(connection, identity_id, client_id, None, above)
        if root is None:
            continue
        this = (consents.c.parent_id == root.id) & (consents.c.scope == below_it)
        of_program = (sessions.c.identity_id == identity_id) & (sessions.c.client_id == client_id)
        theirs = tokens.c.session_id.in_(select(sessions.c.id).where(of_program))
        connection.execute(delete(tokens).where(theirs, _got_by(this)))
        connection.execute(delete(consents).where(this))


def forget_scope(connection: Connection, scope: str) -> None:
    """Forget that anybody allowed a scope, which is about to be no more. Tokens that its service has got by it end."""
    above = consents.alias().c
    connection.execute(
        delete(tokens).where(_got_by(consents.c.parent_id.in_(select(above.id).where(above.scope == scope))))
    )
    connection.execute(delete(consents).where(consents.c.scope == scope))


def _got_by(these: ColumnElement[bool]) -> ColumnElement[bool]:
    """Tokens that services have got in people's names because of these consents, each below another one: in the
    session of the program that it was given to, and for that scope."""
    above = consents.alias().c
    words = literal(" ").concat(tokens.c.scope).concat(" ")
    return (
        exists()
        .where(
            these,
            sessions.c.id == tokens.c.session_id,
            sessions.c.identity_id == consents.c.identity_id,
            sessions.c.client_id == consents.c.client_id,
            func.instr(words, literal(" ").concat(consents.c.scope).concat(" ")) > 0,
            # A scope's string names its service.
            above.id == consents.c.parent_id,
            func.instr(above.scope, tokens.c.client_id) > 0,
        )
        .correlate(tokens)
    )


def consents_of(connection: Connection, identity_id: str, client_id: str | None = None) -> list[Consent]:
    """All consents of an identity, or those for one application; parents before their children."""
    query = (
        select(consents, clients.c.name.label("client_name"))
        .join(clients, clients.c.id == consents.c.client_id)
        .where(consents.c.identity_id == identity_id)
        .order_by(consents.c.id)
    )
    if client_id is not None:
        query = query.where(consents.c.client_id == client_id)
    paths: dict[int, tuple[int, ...]] = {}
    found = []
    for row in connection.execute(query):
        # A child is made after its parent, so the parent's path is known.
        path = (*paths.get(row.parent_id, ()), row.id)
        paths[row.id] = path
        found.append(
            Consent(
                id=row.id,
                client_id=row.client_id,
                client_name=row.client_name,
                scope=row.scope,
                path=path,
                optional=row.optional,
                allows_refresh=row.allows_refresh,
                created=row.created,
                updated=row.updated,
                last_used=row.last_used,
            )
        )
    return found


def below(connection: Connection, identity_id: str, client_id: str, scopes: Iterable[str]) -> dict[str, bool]:
    """Scopes that the services behind these scopes may use in the person's name, one level down, and whether while the
    person is away."""
    roots = select(consents.c.id).where(
        consents.c.identity_id == identity_id,
        consents.c.client_id == client_id,
        consents.c.parent_id.is_(None),
        consents.c.scope.in_(list(scopes)),
    )
    table = consents.c
    query = select(table.scope, table.allows_refresh).where(table.parent_id.in_(roots)).order_by(table.id)
    found: dict[str, bool] = {}
    for scope, lasting in connection.execute(query):
        found[scope] = found.get(scope, False) or lasting
    return found


def withdraw(connection: Connection, identity_id: str, client_id: str) -> bool:
    """Forget all that an application was allowed and end every token it holds for the person, dependent ones too.

    Returns whether there was anything.
    """
    mine = (consents.c.identity_id == identity_id) & (consents.c.client_id == client_id)
    gone = connection.execute(delete(consents).where(mine)).rowcount
    of_client = (sessions.c.identity_id == identity_id) & (sessions.c.client_id == client_id)
    gone += connection.execute(delete(sessions).where(of_client)).rowcount
    return gone > 0


def document(connection: Connection, consent: Consent, identity_id: str) -> Mapping[str, Any]:
    """A consent as Globus's clients read it; they need every field."""
    facts = facts_of(connection, consent.scope)
    return {
        "id": consent.id,
        "client": consent.client_id,
        "scope": None if facts is None else facts.id,
        "scope_name": consent.scope,
        "effective_identity": identity_id,
        "dependency_path": list(consent.path),
        "created": iso(consent.created),
        "updated": iso(consent.updated),
        "last_used": iso(consent.last_used),
        "status": "approved",
        "allows_refresh": consent.allows_refresh,
        "auto_approved": False,
        "atomically_revocable": consent.optional,
    }
