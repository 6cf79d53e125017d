"""Finding collections: which of them a caller may know of, within a scope, by words and fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, false, func, or_, select

from relay.access.decisions import Subject
from relay.store import transfer_tables as tables
from relay.store.auth_tables import identities
from relay.transfer.collection_documents import ENTITY_TYPE
from relay.transfer.collections import Collection, load_many
from relay.transfer.fields import bad_request, is_uuid, query_boolean

SCOPES = frozenset(
    {
        "all",
        "my-endpoints",
        "my-gcp-endpoints",
        "recently-used",
        "in-use",
        "shared-by-me",
        "shared-with-me",
        "administered-by-me",
        "hide-no-permissions",
    }
)
MAX_LIMIT = 100
MAX_OFFSET = 1_000_000
MAX_TEXT = 1000
MAX_WORDS = 16
TEXT_COLUMNS = ("display_name", "description", "keywords", "organization", "department")

_collection = tables.collections.c
Condition = ColumnElement[bool]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One search. Build it with `read`, which checks everything."""

    scope: str = "all"
    text: str = ""
    owner_id: str | None = None
    entity_type: str | None = None
    host_endpoint: str | None = None
    non_functional: bool | None = None
    limit: int = MAX_LIMIT
    offset: int = 0


def read(parameters: Any, *, limit: int, offset: int) -> Query:
    """A query from the parameters of a request. Raises `ApiError` 400."""
    scope = parameters.get("filter_scope") or "all"
    if scope not in SCOPES:
        raise bad_request(f"filter_scope must be one of {', '.join(sorted(SCOPES))}.")
    text = parameters.get("filter_fulltext") or ""
    if len(text) > MAX_TEXT or len(text.split()) > MAX_WORDS:
        raise bad_request(f"filter_fulltext has more than {MAX_TEXT} characters or {MAX_WORDS} words.")
    for name in ("filter_owner_id", "filter_host_endpoint"):
        if parameters.get(name) and not is_uuid(parameters[name]):
            raise bad_request(f"{name} must be a UUID.")
    return Query(
        scope=scope,
        text=text,
        owner_id=(parameters.get("filter_owner_id") or "").lower() or None,
        entity_type=parameters.get("filter_entity_type") or None,
        host_endpoint=parameters.get("filter_host_endpoint") or None,
        non_functional=query_boolean(parameters.get("filter_non_functional"), "filter_non_functional"),
        limit=limit,
        offset=offset,
    )


def find(connection: Connection, query: Query, subject: Subject, identity_id: str) -> tuple[list[Collection], bool]:
    """Collections that match and that the identity may know of, and whether there are more after this page."""
    statement = select(_collection.id).where(
        _collection.deleted.is_(None), _visible(subject), *_filters(query), _in_scope(query.scope, subject, identity_id)
    )
    statement = _ordered(statement, query, identity_id).limit(query.limit + 1).offset(query.offset)
    ids = list(connection.execute(statement).scalars())
    known = load_many(connection, ids)
    return [known[id_] for id_ in ids[: query.limit]], len(ids) > query.limit


def _has_role(subject: Subject, *roles: str) -> Condition:
    role = tables.roles.c
    held = select(role.id).where(
        role.collection_id == _collection.id, _concerns(role.principal_type, role.principal, subject)
    )
    return exists(held.where(role.role.in_(roles)) if roles else held)


def _concerns(principal_type: Any, principal: Any, subject: Subject) -> Condition:
    return or_(
        and_(principal_type == "identity", principal.in_(subject.identities)),
        and_(principal_type == "group", principal.in_(subject.groups)),
    )


def _has_rule(subject: Subject) -> Condition:
    rule = tables.access_rules.c
    held = select(rule.id).where(
        rule.collection_id == _collection.id,
        or_(rule.expires.is_(None), rule.expires > subject.now),
        or_(
            _concerns(rule.principal_type, rule.principal, subject),
            rule.principal_type.in_(("all_authenticated_users", "anonymous")),
        ),
    )
    return and_(_collection.shareable, exists(held))


def _visible(subject: Subject) -> Condition:
    """The same rule as `relay.access.decisions` for seeing a collection, as a condition."""
    return or_(_collection.public, _collection.owner_id.in_(subject.identities), _reaches(subject))


def _reaches(subject: Subject) -> Condition:
    return or_(_has_role(subject), _has_rule(subject))


def _uses(identity_id: str) -> Select[Any]:
    task = tables.tasks.c
    return select(task.id).where(
        task.owner_id == identity_id, or_(task.source_id == _collection.id, task.destination_id == _collection.id)
    )


def _in_scope(scope: str, subject: Subject, identity_id: str) -> Condition:
    mine = _collection.owner_id.in_(subject.identities)
    if scope in ("my-endpoints", "my-gcp-endpoints"):
        return mine
    if scope == "administered-by-me":
        return or_(mine, _has_role(subject, "administrator"))
    if scope == "shared-with-me":
        # There are no guest collections yet; what others have opened by a role or a rule is shared all the same.
        return and_(~mine, _reaches(subject))
    if scope == "shared-by-me":
        return false()
    if scope == "hide-no-permissions":
        return or_(mine, _reaches(subject))
    if scope == "in-use":
        return exists(_uses(identity_id).where(tables.tasks.c.status == "ACTIVE"))
    if scope == "recently-used":
        return exists(_uses(identity_id))
    return _collection.id.is_not(None)


def _filters(query: Query) -> list[Condition]:
    held: list[Condition] = [_matches(word) for word in query.text.split()]
    if query.owner_id is not None:
        held.append(_collection.owner_id == query.owner_id)
    if query.entity_type is not None and ENTITY_TYPE not in query.entity_type.split(","):
        held.append(false())
    # Nothing is hosted on another collection yet, and every collection functions.
    if query.host_endpoint is not None or query.non_functional:
        held.append(false())
    return held


def _matches(word: str) -> Condition:
    escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    pattern = f"%{escaped}%"
    owners = select(identities.c.id).where(identities.c.username.ilike(pattern, escape="\\"))
    return or_(
        *(_collection[name].ilike(pattern, escape="\\") for name in TEXT_COLUMNS),
        _collection.owner_id.in_(owners),
        _collection.id == word.lower(),
    )


def _ordered(statement: Select[Any], query: Query, identity_id: str) -> Select[Any]:
    if query.scope == "recently-used":
        task = tables.tasks.c
        latest = (
            select(func.max(task.requested))
            .where(
                task.owner_id == identity_id,
                or_(task.source_id == _collection.id, task.destination_id == _collection.id),
            )
            .scalar_subquery()
        )
        return statement.order_by(latest.desc(), _collection.id)
    return statement.order_by(func.lower(_collection.display_name), _collection.id)
