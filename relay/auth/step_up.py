"""What a browser session lacks for a request: pure decisions over who has shown who they are, when, and how."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from relay.auth.authorization import StepUp
from relay.auth.browser_sessions import MULTI_FACTOR, Authentication
from relay.auth.identities import Identity


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An authentication policy of an application, or what a request itself demands. ``max_age`` in seconds.

    One identity of the person must satisfy all of it. An entry of ``include`` or ``exclude`` is a domain, or ``*.``
    and a domain for all below it.
    """

    max_age: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multi_factor: bool = False


@dataclass(frozen=True)
class Lacking:
    """Somebody has to sign in again. ``sentence`` says as whom or how; ``hint`` is a username, when one is needed."""

    sentence: str
    hint: str = ""


class Unsatisfiable(Exception):
    """No sign-in of this person can satisfy the request; the sentence says why."""


def lacking(
    wanted: StepUp,
    rules: Sequence[Rule],
    person: Sequence[Identity],
    shown: Mapping[str, Authentication],
    *,
    not_before: float,
    now: float,
) -> Lacking | None:
    """The first thing that the session lacks, or None. ``person`` are all identities of who is signed in.

    Only authentications of ``not_before`` and later count. Raises `Unsatisfiable`.
    """
    fresh = {
        key: item
        for key, item in shown.items()
        if item.authenticated >= not_before and (wanted.max_age is None or now - item.authenticated <= wanted.max_age)
    }
    by_name = {identity.username: identity for identity in person} | {identity.id: identity for identity in person}
    for name in wanted.identities:
        identity = by_name.get(name)
        if identity is None:
            raise Unsatisfiable(f"The identity {name} is asked for, and it is not linked to yours.")
        if identity.id not in fresh:
            return Lacking(f"Sign in as {identity.username}.", identity.username)
    if wanted.domains:
        own = [identity for identity in person if in_domains(identity, wanted.domains)]
        if not own:
            raise Unsatisfiable(f"An identity of {' or '.join(wanted.domains)} is asked for; you have none here.")
        if not any(identity.id in fresh for identity in own):
            return Lacking(f"Sign in with your identity of {' or '.join(wanted.domains)}.", own[0].username)
    if wanted.multi_factor and not any(MULTI_FACTOR in item.methods for item in fresh.values()):
        return Lacking("Sign in with a passkey, or at a provider that asks for a second factor.")
    for rule in rules:
        missing = _by_rule(rule, person, fresh, now)
        if missing is not None:
            return missing
    if not fresh:
        return Lacking("Sign in again.")
    return None


def _by_rule(rule: Rule, person: Sequence[Identity], fresh: Mapping[str, Authentication], now: float) -> Lacking | None:
    allowed = [
        identity
        for identity in person
        if (not rule.include or in_domains(identity, rule.include)) and not in_domains(identity, rule.exclude)
    ]
    if not allowed:
        raise Unsatisfiable("The application's policy admits none of your identities.")
    for identity in allowed:
        item = fresh.get(identity.id)
        if (
            item is not None
            and (rule.max_age is None or now - item.authenticated <= rule.max_age)
            and (not rule.multi_factor or MULTI_FACTOR in item.methods)
        ):
            return None
    how = " with a passkey or a second factor" if rule.multi_factor else ""
    return Lacking(
        f"The application's policy asks you to sign in again as {allowed[0].username}{how}.", allowed[0].username
    )


def in_domains(identity: Identity, domains: Collection[str]) -> bool:
    """Whether the identity's username is of one of the domains."""
    domain = identity.username.rpartition("@")[2]
    return any(domain == wanted or (wanted.startswith("*.") and domain.endswith(wanted[1:])) for wanted in domains)
