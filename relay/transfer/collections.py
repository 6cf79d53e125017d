"""Collections: what the relay knows of them, who may reach them, and how their descriptions change.

A collection is what Globus shows as a `GCP_mapped_collection`. Its row is made with a setup key
(`relay.transfer.enrolment`) and gets a node when an agent redeems the key. Deleting marks the row; nothing is removed.
All functions work on a connection inside the store's transaction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from sqlalchemy import Connection, select, update

from protocol.errors import ProtocolError
from protocol.names import CollectionPath, format_path, parse_path_untrusted
from relay.access.decisions import (
    ROOT,
    Ability,
    CollectionFacts,
    Held,
    RoleGrant,
    Rule,
    Spot,
    Subject,
    reach,
)
from relay.access.principals import subject_of
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer import rules
from relay.transfer.fields import Fields, bad_request, is_uuid
from relay.transfer.scopes import reach_text

# Longest value of each text field that the owner may describe a collection with.
TEXT_FIELDS: dict[str, int] = {
    "description": 4096,
    "organization": 256,
    "department": 256,
    "keywords": 1024,
    "contact_email": 320,
    "contact_info": 1024,
    "info_link": 1024,
    "user_message": 1024,
    "user_message_link": 1024,
    "location": 256,
    "default_directory": 4096,
}
SWITCHES = ("public", "force_encryption", "disable_verify", "force_verify", "disable_anonymous_writes")
NETWORK_USE = frozenset({"normal", "minimal", "aggressive", "custom"})
MAX_NAME = 128
MAX_POLICY = 4096


@dataclass(frozen=True, kw_only=True)
class Collection:
    """One row of the table of collections, with the roles and access rules on it."""

    id: str
    owner_id: str
    endpoint_id: str | None
    node_id: str | None
    display_name: str
    public: bool
    description: str | None
    organization: str | None
    department: str | None
    keywords: str | None
    contact_email: str | None
    contact_info: str | None
    info_link: str | None
    user_message: str | None
    user_message_link: str | None
    location: str | None
    default_directory: str | None
    network_use: str | None
    force_encryption: bool
    disable_verify: bool
    force_verify: bool
    disable_anonymous_writes: bool
    subscription_id: str | None
    subscription_admin_verified: bool
    notification_policy: str | None
    read_only: bool
    shareable: bool
    available: bool
    reported_directory: str | None
    home: str | None
    created: float
    last_accessed: float | None
    deleted: float | None
    granted: frozenset[RoleGrant]
    rules: tuple[Rule, ...]

    @property
    def facts(self) -> CollectionFacts:
        """What access decisions rest on."""
        return CollectionFacts(
            owner_id=self.owner_id,
            public=self.public,
            deleted=self.deleted is not None,
            granted=self.granted,
            rules=self.rules,
            shareable=self.shareable,
            anonymous_writes=not self.disable_anonymous_writes,
        )

    @property
    def home_path(self) -> CollectionPath | None:
        """Where ``~`` is, or None while no agent serves the collection."""
        if self.home is None:
            # One whose agent has not been back since relays began to ask.
            return None if self.node_id is None else ()
        return parse_path_untrusted(self.home)

    @property
    def directory(self) -> str:
        """Where a listing begins when the client names no path."""
        return self.default_directory or self.reported_directory or "/~/"


_COLUMNS = [tables.collections.c[field.name] for field in fields(Collection) if field.name not in ("granted", "rules")]
# SQLite bounds the number of values in one statement.
_BATCH = 500


def load_many(connection: Connection, ids: Iterable[str]) -> dict[str, Collection]:
    """Collections by id, deleted ones included; unknown ids are left out."""
    wanted = sorted(set(ids))
    found: dict[str, Collection] = {}
    for start in range(0, len(wanted), _BATCH):
        batch = wanted[start : start + _BATCH]
        granted: dict[str, set[RoleGrant]] = {}
        role = tables.roles.c
        for row in connection.execute(
            select(role.collection_id, role.principal_type, role.principal, role.role).where(
                role.collection_id.in_(batch)
            )
        ):
            granted.setdefault(row.collection_id, set()).add(RoleGrant(row.principal_type, row.principal, row.role))
        opened = rules.of_collections(connection, batch)
        for row in connection.execute(select(*_COLUMNS).where(tables.collections.c.id.in_(batch))):
            found[row.id] = Collection(
                **row._mapping, granted=frozenset(granted.get(row.id, ())), rules=tuple(opened.get(row.id, ()))
            )
    return found


def load(connection: Connection, collection_id: str) -> Collection | None:
    """One collection, deleted or not."""
    return load_many(connection, [collection_id]).get(collection_id)


# What is told of a deed that concerns a place.
DEEDS: Final = {Ability.READ: "read", Ability.WRITE: "change"}


class Sight:
    """A collection, None for an unknown one, and somebody who asks for it: read once for all that is decided in one
    transaction. This is the one place where the API decides about collections."""

    def __init__(self, asked_for: str, collection: Collection | None, subject: Subject) -> None:
        self._asked_for = asked_for
        self._collection = collection
        self._held = Held(None if collection is None else collection.facts, subject)
        self._reach: dict[Ability, list[str] | None] = {}

    def require(self, ability: Ability, spots: Iterable[Spot] = (ROOT,)) -> Collection:
        """The collection, if they may do that with it now, at all these places of it.

        Raises `ApiError`: 404 EndpointNotFound or EndpointDeleted, 403 PermissionDenied.
        """
        spots = list(spots)
        verdict = self._held.decide(ability, spots)
        if self._collection is not None and verdict == "allowed":
            return self._collection
        raise refusal(self._asked_for, verdict, self._denied(ability, spots))

    def _denied(self, ability: Ability, spots: Iterable[Spot]) -> str:
        """What they may not do, with the place; no place for those who may look into none, since it may be the home."""
        word = DEEDS.get(ability)
        if word is None or self._held.reach(Ability.READ) == ():
            return "do this"
        place = next((spot for spot in spots if ability not in self._held.at(spot)), None)
        return "do this" if place is None else f"{word} {format_path(place)}"

    def reach(self, ability: Ability) -> list[str] | None:
        """The folders in which they may do that, None for everywhere: where symlinks may lead them."""
        if ability not in self._reach:
            self._reach[ability] = reach_text(self._held.reach(ability))
        return self._reach[ability]


def look(connection: Connection, collection_id: str, identity_id: str, now: float) -> Sight:
    """A collection, and an identity as it is at a moment (Unix seconds)."""
    collection = load(connection, collection_id.lower()) if is_uuid(collection_id) else None
    return Sight(collection_id, collection, subject_of(connection, identity_id, now))


def require(
    connection: Connection,
    collection_id: str,
    identity_id: str,
    ability: Ability,
    *,
    now: float,
    spots: Iterable[Spot] = (ROOT,),
) -> Collection:
    """What `Sight.require` says where nothing else is asked. Raises `ApiError` as it does."""
    return look(connection, collection_id, identity_id, now).require(ability, spots)


# Where somebody may do what they want to, and the folders they may come to by symlinks there (None: anywhere).
Decision = tuple[Collection, list[str] | None]


@dataclass(frozen=True)
class Question:
    """What an identity wants of a collection; ``decide`` raises `ApiError` where they may not."""

    collection_id: str
    identity_id: str
    decide: Callable[[Sight], Decision]


def decide_all(connection: Connection, questions: Sequence[Question], now: float) -> list[Decision | ApiError]:
    """What is decided of each, or why it is refused; each collection and each identity is read once for all, and so is
    what one holds in the other: a thousand calls of one person that wait cost the others little."""
    known = load_many(connection, {one.collection_id.lower() for one in questions if is_uuid(one.collection_id)})
    people = {identity: subject_of(connection, identity, now) for identity in {one.identity_id for one in questions}}
    sights: dict[tuple[str, str], Sight] = {}
    answers: list[Decision | ApiError] = []
    for one in questions:
        key = one.collection_id, one.identity_id
        if key not in sights:
            sights[key] = Sight(one.collection_id, known.get(one.collection_id.lower()), people[one.identity_id])
        try:
            answers.append(one.decide(sights[key]))
        except ApiError as error:
            answers.append(error)
    return answers


def homes(connection: Connection, ids: Iterable[str], identity_id: str, now: float) -> dict[str, CollectionPath | None]:
    """Where ``~`` is in each collection that the identity may look into somewhere. Of others nothing is said."""
    subject = subject_of(connection, identity_id, now)
    return {
        key: collection.home_path
        for key, collection in load_many(connection, ids).items()
        if collection.deleted is None and reach(collection.facts, subject, Ability.READ) != ()
    }


def refusal(collection_id: str, verdict: str, what: str = "do this") -> ApiError:
    """The answer to a request that was not allowed; it says no more than the verdict and, if forbidden, ``what``."""
    shown = collection_id[:64]
    if verdict == "forbidden":
        return ApiError(403, "PermissionDenied", f"You do not have permission to {what} on endpoint '{shown}'.")
    if verdict == "deleted":
        return ApiError(404, "EndpointDeleted", f"Endpoint '{shown}' has been deleted.")
    return ApiError(404, "EndpointNotFound", f"No such endpoint '{shown}'.")


def read_description(document: Fields, *, creating: bool) -> dict[str, Any]:
    """The columns that a create or update document sets. Raises `ApiError` 400.

    On update only keys that are present count, and null clears a text.
    """
    values: dict[str, Any] = {}
    if creating or "display_name" in document:
        values["display_name"] = document.required_name("display_name", longest=MAX_NAME)
    for key, longest in TEXT_FIELDS.items():
        if key in document:
            values[key] = document.text(key, longest=longest)
    if values.get("default_directory"):
        try:
            parse_path_untrusted(values["default_directory"])
        except ProtocolError as error:
            raise bad_request(f"default_directory: {error.sentence}") from error
    for key in SWITCHES:
        if creating or (key in document and document.raw(key) is not None):
            values[key] = document.boolean(key, False)
    if document.raw("network_use") is not None:
        values["network_use"] = document.choice("network_use", NETWORK_USE, "normal")
    if "subscription_id" in document:
        values["subscription_id"] = read_subscription(document)
    if document.raw("subscription_admin_verified") is not None:
        values["subscription_admin_verified"] = document.boolean("subscription_admin_verified", False)
    if "guest_collection_activity_notification_policy" in document:
        values["notification_policy"] = _notification_policy(document)
    if values.get("disable_verify") and values.get("force_verify"):
        raise bad_request("disable_verify and force_verify cannot both be true.")
    return values


def read_subscription(document: Fields) -> str | None:
    """A subscription id. Nothing depends on it here, so DEFAULT simply means none."""
    value = document.raw("subscription_id")
    if value is None or value == "DEFAULT":
        return None
    return document.identifier("subscription_id")


def _notification_policy(document: Fields) -> str | None:
    value = document.raw("guest_collection_activity_notification_policy")
    if value is None:
        return None
    text = json.dumps(value)
    if not isinstance(value, dict) or len(text) > MAX_POLICY:
        raise bad_request("guest_collection_activity_notification_policy must be a small JSON object.")
    return text


def change(connection: Connection, collection_id: str, values: dict[str, Any]) -> None:
    """Set columns of one collection."""
    if values:
        connection.execute(update(tables.collections).where(tables.collections.c.id == collection_id).values(**values))


def mark_deleted(connection: Connection, collection_id: str, now: float) -> None:
    """Delete a collection; a setup key that was not used yet dies with it."""
    connection.execute(
        update(tables.collections)
        .where(tables.collections.c.id == collection_id, tables.collections.c.deleted.is_(None))
        .values(deleted=now)
    )
    connection.execute(
        update(tables.setup_keys)
        .where(tables.setup_keys.c.collection_id == collection_id, tables.setup_keys.c.redeemed.is_(None))
        .values(expires=now)
    )


def in_use_by(connection: Connection, identity_id: str, ids: Iterable[str]) -> set[str]:
    """Which of these collections the identity's own active tasks use."""
    task = tables.tasks.c
    wanted = set(ids)
    used: set[str] = set()
    for row in connection.execute(
        select(task.source_id, task.destination_id).where(task.owner_id == identity_id, task.status == "ACTIVE")
    ):
        used.update(id_ for id_ in row if id_ in wanted)
    return used
