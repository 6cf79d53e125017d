"""Who may do what with a collection and with a task: pure functions over facts, no database, no network, no clock.

Everything not granted here is refused. The rules:

- the owner of a collection, and those with the role ``administrator`` on it, may read, write and manage it;
- ``access_manager`` may see the collection and see and change its access rules;
- ``activity_manager`` and ``activity_monitor`` may see the collection and the tasks on it;
- an access rule opens one folder and all below it, to read (``r``) or to read and write (``rw``), for an identity, a
  group, everybody who is signed in, or anybody; rules only add, and count only while the owner's own configuration
  says that the collection may be shared;
- everybody who is signed in may see that a *public* collection exists and how it is described, nothing more;
- a task belongs to the identity that submitted it.

A person may have several identities and be in several groups; what any of them is granted counts. Facts of a kind that
is not known here (an unknown role, permission or principal type) grant nothing.

A refusal never tells more than the caller may know: what they may not see does not exist (404), what they may see
but not use is forbidden (403).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, NamedTuple, TypeAlias

from protocol.names import CollectionPath

Role = Literal["administrator", "access_manager", "activity_manager", "activity_monitor"]
Verdict = Literal["allowed", "forbidden", "unknown", "deleted"]
# A place in a collection, from its root. None: nobody can tell where; only a rule for the whole collection covers it.
Spot: TypeAlias = CollectionPath | None

ROLES: Final[tuple[Role, ...]] = ("administrator", "access_manager", "activity_manager", "activity_monitor")
ROOT: Final[CollectionPath] = ()


class Ability(Enum):
    """What a caller wants to do with a collection."""

    SEE = "see"
    READ = "read"
    WRITE = "write"
    MANAGE = "manage"
    SEE_RULES = "see rules"
    CHANGE_RULES = "change rules"
    SEE_TASKS = "see tasks"


_OF_ROLE: Final[dict[str, frozenset[Ability]]] = {
    "administrator": frozenset(Ability),
    "access_manager": frozenset({Ability.SEE, Ability.SEE_RULES, Ability.CHANGE_RULES}),
    "activity_manager": frozenset({Ability.SEE, Ability.SEE_TASKS}),
    "activity_monitor": frozenset({Ability.SEE, Ability.SEE_TASKS}),
}
_OF_RULE: Final[dict[str, frozenset[Ability]]] = {
    "r": frozenset({Ability.SEE, Ability.READ}),
    "rw": frozenset({Ability.SEE, Ability.READ, Ability.WRITE}),
}
_SEEN: Final = frozenset({Ability.SEE})


@dataclass(frozen=True)
class Subject:
    """Who asks, and when (Unix seconds): all identities and groups of one person. No identities: nobody signed in."""

    identities: frozenset[str]
    groups: frozenset[str] = frozenset()
    now: float = 0.0


class RoleGrant(NamedTuple):
    """One role given to an ``identity`` or a ``group``."""

    principal_type: str
    principal: str
    role: str


class Rule(NamedTuple):
    """One access rule. ``expires`` in Unix seconds; ``principal`` is empty for whole classes of people."""

    principal_type: str
    principal: str
    path: CollectionPath
    permissions: str
    expires: float | None = None


@dataclass(frozen=True, kw_only=True)
class CollectionFacts:
    """What decisions about one collection rest on.

    ``shareable`` is what the owner's configuration says, ``anonymous_writes`` whether people who are not signed in may
    write where a rule lets anybody write.
    """

    owner_id: str
    public: bool
    deleted: bool
    granted: frozenset[RoleGrant] = frozenset()
    rules: tuple[Rule, ...] = field(default=())
    shareable: bool = False
    anonymous_writes: bool = False


def effective_roles(facts: CollectionFacts, subject: Subject) -> list[Role]:
    """The roles of a person in the order of `ROLES`; the owner is an administrator."""
    held = {grant.role for grant in facts.granted if _concerns(grant.principal_type, grant.principal, subject)}
    if facts.owner_id in subject.identities:
        held.add("administrator")
    return [role for role in ROLES if role in held]


class Held:
    """What a person holds in one collection (None: there is no such one), gathered once for all that is asked about it:
    there may be a thousand rules, as many places, and as many calls that wait."""

    def __init__(self, facts: CollectionFacts | None, subject: Subject) -> None:
        self._facts, self._subject = facts, subject
        self.everywhere: frozenset[Ability] = frozenset()
        self.in_folders: dict[CollectionPath, frozenset[Ability]] = {}
        if facts is not None:
            self._gather(facts, subject)
        self._depths = sorted({len(folder) for folder in self.in_folders})

    def _gather(self, facts: CollectionFacts, subject: Subject) -> None:
        if facts.public and subject.identities:
            self.everywhere = _SEEN
        for role in effective_roles(facts, subject):
            self.everywhere |= _OF_ROLE[role]
        for rule in live_rules(facts, subject):
            allowed = _OF_RULE.get(rule.permissions, frozenset())
            if rule.principal_type == "anonymous" and not facts.anonymous_writes:
                allowed -= {Ability.WRITE}
            self.everywhere |= allowed & _SEEN
            self.in_folders[rule.path] = self.in_folders.get(rule.path, frozenset()) | allowed

    def at(self, spot: Spot) -> frozenset[Ability]:
        """All that they may do at one place."""
        place = ROOT if spot is None else spot
        held = self.everywhere
        for depth in self._depths:
            if depth > len(place):
                break
            held |= self.in_folders.get(place[:depth], frozenset())
        return held

    def decide(self, wanted: Ability, spots: Iterable[Spot] = (ROOT,)) -> Verdict:
        """May this be done at all these places? No places at all means the whole collection.

        ``deleted`` is told only to those who had a role on the collection; to others it never existed.
        """
        if self._facts is None:
            return "unknown"
        if self._facts.deleted:
            return "deleted" if effective_roles(self._facts, self._subject) else "unknown"
        if all(wanted in self.at(spot) for spot in list(spots) or [ROOT]):
            return "allowed"
        return "forbidden" if Ability.SEE in self.everywhere else "unknown"

    def reach(self, wanted: Ability) -> tuple[CollectionPath, ...] | None:
        """The folders in which they may do something at all; None is the whole collection.

        What lies there by name may be a symlink to somewhere else: this says how far it counts.
        """
        if wanted in self.at(ROOT):
            return None
        return tuple(sorted(folder for folder, allowed in self.in_folders.items() if wanted in allowed))


def abilities(facts: CollectionFacts, subject: Subject, spot: Spot = ROOT) -> frozenset[Ability]:
    """All that a person may do at one place of a collection that exists; by default at its root, so everywhere."""
    return Held(facts, subject).at(spot)


def decide(
    facts: CollectionFacts | None, subject: Subject, wanted: Ability, spots: Iterable[Spot] = (ROOT,)
) -> Verdict:
    """One question about one collection: `Held.decide`."""
    return Held(facts, subject).decide(wanted, spots)


def reach(facts: CollectionFacts, subject: Subject, wanted: Ability) -> tuple[CollectionPath, ...] | None:
    """One question about one collection: `Held.reach`."""
    return Held(facts, subject).reach(wanted)


def live_rules(facts: CollectionFacts, subject: Subject) -> list[Rule]:
    """The rules that count for a person now."""
    if not facts.shareable:
        return []
    return [
        rule
        for rule in facts.rules
        if (rule.expires is None or rule.expires > subject.now)
        and (_concerns(rule.principal_type, rule.principal, subject) or _includes(rule.principal_type, subject))
    ]


def _concerns(principal_type: str, principal: str, subject: Subject) -> bool:
    if principal_type == "identity":
        return principal in subject.identities
    return principal_type == "group" and principal in subject.groups


def _includes(principal_type: str, subject: Subject) -> bool:
    return principal_type == "anonymous" or (principal_type == "all_authenticated_users" and bool(subject.identities))


@dataclass(frozen=True)
class TaskNeeds:
    """Where a task reads in its source and writes in its destination. ``source`` is None for deletes."""

    source: tuple[Spot, ...] | None
    destination: tuple[Spot, ...]


def may_run(needs: TaskNeeds, source: Held, destination: Held) -> bool:
    """Whether a task may run (on): its owner, who holds this, must be allowed now all that it does."""
    if destination.decide(Ability.WRITE, needs.destination) != "allowed":
        return False
    return needs.source is None or source.decide(Ability.READ, needs.source) == "allowed"
