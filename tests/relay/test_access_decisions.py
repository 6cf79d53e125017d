"""Access decisions equal a small reference, whatever the facts; the search shows exactly what may be seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.names import CollectionPath
from relay.access.decisions import (
    ROLES,
    Ability,
    CollectionFacts,
    Held,
    RoleGrant,
    Rule,
    Spot,
    Subject,
    TaskNeeds,
    abilities,
    decide,
    effective_roles,
    may_run,
    reach,
)
from relay.transfer import entitlement

PEOPLE, GROUPS = ("ann", "bob", "cat"), ("lab", "team")
people = st.sampled_from(PEOPLE)
groups = st.sampled_from(GROUPS)
paths: st.SearchStrategy[CollectionPath] = st.lists(st.sampled_from([b"a", b"b", b"~"]), max_size=3).map(tuple)
spots: st.SearchStrategy[Spot] = st.none() | paths
# Words that no rule or role should hold: they must grant nothing.
principal_types = st.sampled_from(["identity", "group", "all_authenticated_users", "anonymous", "everybody", ""])
grants = st.builds(
    RoleGrant, principal_types, people | groups | st.just(""), st.sampled_from([*ROLES, "no_such_role", ""])
)
rules = st.builds(
    Rule,
    principal_types,
    people | groups | st.just(""),
    paths,
    st.sampled_from(["r", "rw", "w", "", "R"]),
    st.none() | st.sampled_from([99.0, 100.0, 101.0]),
)
facts = st.builds(
    CollectionFacts,
    owner_id=people,
    public=st.booleans(),
    deleted=st.booleans(),
    granted=st.frozensets(grants, max_size=4),
    rules=st.lists(rules, max_size=4).map(tuple),
    shareable=st.booleans(),
    anonymous_writes=st.booleans(),
)
subjects = st.builds(Subject, st.frozensets(people, max_size=2), st.frozensets(groups, max_size=2), st.just(100.0))


def reference(facts: CollectionFacts | None, who: Subject, wanted: Ability, spots: list[Spot]) -> str:
    """The rules of access once more, as plainly as they can be said."""
    if facts is None:
        return "unknown"
    names = {("identity", i) for i in who.identities} | {("group", g) for g in who.groups}
    roles = {role for kind, one, role in facts.granted if (kind, one) in names and role in ROLES}
    roles |= {"administrator"} if facts.owner_id in who.identities else set()
    if facts.deleted:
        return "deleted" if roles else "unknown"
    open_, sees = set(), bool(roles) or (facts.public and bool(who.identities))
    for kind, one, folder, may, end in facts.rules if facts.shareable else ():
        anybody = kind == "anonymous" or (kind == "all_authenticated_users" and who.identities)
        if ((kind, one) in names or anybody) and (end is None or end > who.now) and may in ("r", "rw"):
            sees = True
            open_.add(("read", folder))
            if may == "rw" and (kind != "anonymous" or facts.anonymous_writes):
                open_.add(("write", folder))
    if "administrator" in roles:
        return "allowed"
    if wanted in (Ability.READ, Ability.WRITE):
        yes = all(any(do == wanted.value and (s or ())[: len(f)] == f for do, f in open_) for s in spots or [()])
    elif wanted is Ability.SEE:
        yes = sees
    elif wanted is Ability.SEE_TASKS:
        yes = bool(roles & {"activity_manager", "activity_monitor"})
    else:
        yes = wanted in (Ability.SEE_RULES, Ability.CHANGE_RULES) and "access_manager" in roles
    return "allowed" if yes else "forbidden" if sees else "unknown"


@settings(max_examples=600)
@given(st.none() | facts, subjects, st.sampled_from(Ability), st.lists(spots, max_size=3))
def test_decisions_equal_the_reference(
    facts: CollectionFacts | None, who: Subject, wanted: Ability, places: list[Spot]
) -> None:
    assert decide(facts, who, wanted, places) == reference(facts, who, wanted, places)


@given(facts, subjects, spots)
def test_what_is_held_is_what_is_allowed(facts: CollectionFacts, who: Subject, spot: Spot) -> None:
    assert set(effective_roles(facts, who)) <= set(ROLES)
    if not facts.deleted:
        assert abilities(facts, who, spot) == {one for one in Ability if decide(facts, who, one, [spot]) == "allowed"}


@given(facts, subjects, paths, paths)
def test_what_is_allowed_in_a_folder_is_allowed_below_it(
    facts: CollectionFacts, who: Subject, folder: CollectionPath, below: CollectionPath
) -> None:
    assert abilities(facts, who, folder) <= abilities(facts, who, folder + below)
    # What only the agent can locate is allowed exactly where everything is.
    assert abilities(facts, who, None) == abilities(facts, who, ())


@given(facts, subjects, rules)
def test_a_further_rule_only_adds_and_one_less_only_takes(facts: CollectionFacts, who: Subject, rule: Rule) -> None:
    import dataclasses

    more = dataclasses.replace(facts, rules=(*facts.rules, rule))
    for spot in (None, (), rule.path, (*rule.path, b"x")):
        assert abilities(facts, who, spot) <= abilities(more, who, spot)


@given(facts)
def test_nobody_who_is_not_signed_in_gets_more_than_rules_for_anybody_give(facts: CollectionFacts) -> None:
    nobody = Subject(frozenset())
    held = abilities(facts, nobody)
    assert held <= {Ability.SEE, Ability.READ, Ability.WRITE}
    assert not held or any(rule.principal_type == "anonymous" for rule in facts.rules)


@given(
    st.none() | facts,
    st.none() | facts,
    subjects,
    st.lists(spots, max_size=2),
    st.lists(spots, max_size=2),
    st.booleans(),
)
def test_a_task_runs_only_with_what_its_tickets_name(
    source: CollectionFacts | None,
    destination: CollectionFacts | None,
    who: Subject,
    read: list[Spot],
    written: list[Spot],
    delete: bool,
) -> None:
    needs = TaskNeeds(None if delete else tuple(read), tuple(written))
    wanted = reference(destination, who, Ability.WRITE, written) == "allowed"
    if not delete:
        wanted = wanted and reference(source, who, Ability.READ, read) == "allowed"
    assert may_run(needs, Held(source, who), Held(destination, who)) == wanted


def test_every_role_and_ability_by_hand() -> None:
    table = {
        "administrator": set(Ability),
        "access_manager": {Ability.SEE, Ability.SEE_RULES, Ability.CHANGE_RULES},
        "activity_manager": {Ability.SEE, Ability.SEE_TASKS},
        "activity_monitor": {Ability.SEE, Ability.SEE_TASKS},
    }
    for (role, expected), (kind, subject) in product(
        table.items(),
        (("identity", Subject(frozenset({"ann"}))), ("group", Subject(frozenset({"bob"}), frozenset({"lab"})))),
    ):
        principal = "ann" if kind == "identity" else "lab"
        facts = CollectionFacts(
            owner_id="cat", public=False, deleted=False, granted=frozenset({RoleGrant(kind, principal, role)})
        )
        assert abilities(facts, subject) == expected
        assert abilities(facts, Subject(frozenset({"stranger"}))) == set()


def test_every_kind_of_rule_by_hand() -> None:
    """All rules of one folder against all kinds of people, at the folder, below it and beside it."""
    ann, of_the_lab = Subject(frozenset({"ann"}), now=100.0), Subject(frozenset({"bob"}), frozenset({"lab"}), 100.0)
    nobody, stranger = Subject(frozenset(), now=100.0), Subject(frozenset({"stranger"}), now=100.0)
    meant = {
        ("identity", "ann"): [ann],
        ("group", "lab"): [of_the_lab],
        ("all_authenticated_users", ""): [ann, of_the_lab, stranger],
        ("anonymous", ""): [ann, of_the_lab, stranger, nobody],
        ("everybody", ""): [],
    }
    looked_at = 0
    for (kind, principal), may, end, shareable, strangers_write, who in product(
        meant, ("r", "rw", "w"), (None, 99.0, 100.0, 101.0), (True, False), (True, False),
        (ann, of_the_lab, stranger, nobody),
    ):  # fmt: skip
        found = CollectionFacts(
            owner_id="cat",
            public=False,
            deleted=False,
            rules=(Rule(kind, principal, (b"a",), may, end),),
            shareable=shareable,
            anonymous_writes=strangers_write,
        )
        counts = shareable and may in ("r", "rw") and end in (None, 101.0) and who in meant[kind, principal]
        inside = {Ability.SEE, Ability.READ} if counts else set()
        if counts and may == "rw" and (kind != "anonymous" or strangers_write):
            inside = inside | {Ability.WRITE}
        for place, expected in (((b"a",), inside), ((b"a", b"b"), inside), ((b"b",), inside & {Ability.SEE})):
            assert abilities(found, who, place) == expected, (kind, may, end, shareable, strangers_write, who, place)
            looked_at += bool(expected)
    assert looked_at > 100


@given(facts, subjects, st.sampled_from([Ability.READ, Ability.WRITE]), paths)
def test_links_reach_exactly_what_may_be_read_or_written(
    facts: CollectionFacts, who: Subject, wanted: Ability, place: CollectionPath
) -> None:
    folders = reach(facts, who, wanted)
    within = folders is None or any(place[: len(folder)] == folder for folder in folders)
    assert within == (wanted in abilities(facts, who, place))


def test_what_began_at_home_in_an_older_task_could_be_anywhere() -> None:
    """Where home was is not known any more: only who may do it everywhere may do it there."""
    assert entitlement.spots(["/a/b/", "~/a", "/~/a", "a", ""]) == [(b"a", b"b"), None, None, None, None]


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called for something."""
    counted = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize("principal", [("identity", "ann"), ("all_authenticated_users", "")])
@pytest.mark.parametrize("who", ["ann", "owner"])
def test_the_work_grows_with_the_rules_and_not_with_their_square(principal: tuple[str, str], who: str) -> None:
    """Anybody may give a collection of theirs a thousand rules; each call to it, and each second that one waits, is
    decided about by all of them, beside the calls of others."""
    many = 1000
    rules = tuple(Rule(*principal, (b"d%d" % number,), "r") for number in range(many))
    facts = CollectionFacts(owner_id="owner", public=False, deleted=False, rules=rules, shareable=True)
    subject = Subject(frozenset({who}), now=1.0)
    places = [(b"d%d" % number, b"x") for number in range(many)]
    assert calls_of(lambda: reach(facts, subject, Ability.READ)) < 20 * many
    assert calls_of(lambda: decide(facts, subject, Ability.READ, places)) < 20 * many
    assert decide(facts, subject, Ability.READ, places) == "allowed"
    assert len(reach(facts, subject, Ability.READ) or places) == many
