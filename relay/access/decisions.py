"""Who may do what with a collection and with a task: pure functions over facts, no database, no network.

Everything not granted here is refused. The rules:

- the owner of a collection, and identities with the role ``administrator`` on it, may read, write and manage it;
- ``access_manager`` may see the collection and its access rules;
- ``activity_manager`` and ``activity_monitor`` may see the collection and the tasks on it;
- everybody who is signed in may see that a *public* collection exists and how it is described, nothing more;
- a task belongs to the identity that submitted it.

A refusal never tells more than the caller may know: what they may not see does not exist (404), what they may see
but not use is forbidden (403).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

Role = Literal["administrator", "access_manager", "activity_manager", "activity_monitor"]
Verdict = Literal["allowed", "forbidden", "unknown", "deleted"]

ROLES: Final[tuple[Role, ...]] = ("administrator", "access_manager", "activity_manager", "activity_monitor")


class Ability(Enum):
    """What a caller wants to do with a collection."""

    SEE = "see"
    READ = "read"
    WRITE = "write"
    MANAGE = "manage"
    SEE_RULES = "see rules"
    SEE_TASKS = "see tasks"


_OF_ROLE: Final[dict[Role, frozenset[Ability]]] = {
    "administrator": frozenset(Ability),
    "access_manager": frozenset({Ability.SEE, Ability.SEE_RULES}),
    "activity_manager": frozenset({Ability.SEE, Ability.SEE_TASKS}),
    "activity_monitor": frozenset({Ability.SEE, Ability.SEE_TASKS}),
}


@dataclass(frozen=True, kw_only=True)
class CollectionFacts:
    """What decisions about one collection rest on. ``granted`` are (identity id, role) pairs."""

    owner_id: str
    public: bool
    deleted: bool
    granted: frozenset[tuple[str, str]]


def effective_roles(facts: CollectionFacts, identity_id: str) -> list[Role]:
    """The roles of an identity in the order of `ROLES`; the owner is an administrator."""
    return [
        role
        for role in ROLES
        if (identity_id, role) in facts.granted or (role == "administrator" and identity_id == facts.owner_id)
    ]


def abilities(facts: CollectionFacts, identity_id: str) -> frozenset[Ability]:
    """All that an identity may do with a collection that exists."""
    held: frozenset[Ability] = frozenset({Ability.SEE}) if facts.public else frozenset()
    for role in effective_roles(facts, identity_id):
        held |= _OF_ROLE[role]
    return held


def decide(facts: CollectionFacts | None, identity_id: str, wanted: Ability) -> Verdict:
    """One question about one collection (None: there is no such collection).

    ``deleted`` is told only to those who had a role on the collection; to others it never existed.
    """
    if facts is None:
        return "unknown"
    if facts.deleted:
        return "deleted" if effective_roles(facts, identity_id) else "unknown"
    held = abilities(facts, identity_id)
    if wanted in held:
        return "allowed"
    return "forbidden" if Ability.SEE in held else "unknown"


def may_keep_running(
    owner_id: str, type_: str, source: CollectionFacts | None, destination: CollectionFacts | None
) -> bool:
    """Whether a task may go on: its owner must still be allowed what the submission needed."""
    if type_ == "DELETE":
        return decide(source, owner_id, Ability.WRITE) == "allowed"
    return (
        decide(source, owner_id, Ability.READ) == "allowed"
        and decide(destination, owner_id, Ability.WRITE) == "allowed"
    )
