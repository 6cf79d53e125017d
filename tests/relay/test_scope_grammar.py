"""The grammar of scope strings: round trips, merging, refusal of everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.auth.scopes import (
    AUTH_SERVER,
    COMPUTE_SERVER,
    FLOWS_ID,
    FLOWS_SERVER,
    MAX_DEPTH,
    TIMERS_ID,
    TRANSFER_ALL,
    InvalidScope,
    Scope,
    object_ids,
    parse_untrusted,
    resource_server_of,
)

ID = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"

names = st.from_regex(r"[a-z][a-z:/._-]{0,12}", fullmatch=True)
trees = st.recursive(
    st.builds(Scope, names, st.booleans()),
    lambda inner: st.builds(
        lambda name, optional, parts: Scope(name, optional, {part.name: part for part in parts}),
        names,
        st.booleans(),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


@given(st.lists(trees, max_size=4))
def test_what_is_written_is_read_back(requested: list[Scope]) -> None:
    for scope in requested:
        scope.optional = False
    top = {scope.name: scope for scope in requested}
    assert parse_untrusted(" ".join(str(scope) for scope in top.values())) == top


@given(st.text(alphabet="ab*[] ", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parsed = parse_untrusted(text)
    except InvalidScope:
        return
    # What was accepted means the same when it is written again in the one normal form.
    assert parse_untrusted(" ".join(str(scope) for scope in parsed.values())) == parsed


@given(st.text(max_size=60))
def test_hostile_text_raises_only_the_one_error(text: str) -> None:
    try:
        parse_untrusted(text)
    except InvalidScope:
        pass


def test_repetitions_merge_and_required_wins() -> None:
    parsed = parse_untrusted("a[*b] c a[b[d] *e] a")
    assert " ".join(str(scope) for scope in parsed.values()) == "a[b[d] *e] c"


@pytest.mark.parametrize(
    "text",
    ["a[", "a]", "a[]", "*a", "a[*]", "a[* b]", "[a]", "a [b]", "a[b]]", "a**", "a[**b]", "a\nb", 'a"b', "a\x00"],
)
def test_malformed_scopes_are_refused(text: str) -> None:
    with pytest.raises(InvalidScope):
        parse_untrusted(text)


def test_bounds() -> None:
    parse_untrusted("a[" * MAX_DEPTH + "a" + "]" * MAX_DEPTH)
    for text in ("a[" * (MAX_DEPTH + 1) + "a" + "]" * (MAX_DEPTH + 1), "a" * 20_000, " ".join("ab" * 2000)):
        with pytest.raises(InvalidScope):
            parse_untrusted(text)


@pytest.mark.parametrize(
    ("name", "server"),
    [
        ("openid", AUTH_SERVER),
        ("urn:globus:auth:scope:auth.globus.org:view_identity_set", AUTH_SERVER),
        (TRANSFER_ALL, "transfer.api.globus.org"),
        ("urn:globus:auth:scope:groups.api.globus.org:view_my_groups", "groups.api.globus.org"),
        ("urn:globus:auth:scope:search.api.globus.org:all", "search.api.globus.org"),
        (f"https://auth.globus.org/scopes/{TIMERS_ID}/timer", TIMERS_ID),
        (f"https://auth.globus.org/scopes/{FLOWS_ID}/run_status", FLOWS_SERVER),
        ("https://auth.globus.org/scopes/facd7ccc-c5f4-42aa-916b-a0e270e2c2a9/all", COMPUTE_SERVER),
        (f"https://auth.globus.org/scopes/{ID}/https", ID),
        (f"https://auth.globus.org/scopes/{ID}/data_access", ID),
        (f"https://auth.globus.org/scopes/{ID}/flow_{ID.replace('-', '_')}_user", ID),
        (f"urn:globus:auth:scope:{ID}:manage_collections", ID),
        ("urn:globus:auth:scope:transfer.api.globus.org:everything", None),
        (f"https://auth.globus.org/scopes/{FLOWS_ID}/https", None),
        (f"https://auth.globus.org/scopes/{ID}/anything", None),
        ("https://elsewhere.org/scopes/a/https", None),
        ("offline_access", None),
    ],
)
def test_literal_scopes_belong_to_their_services(name: str, server: str | None) -> None:
    assert resource_server_of(name) == server


def test_objects_are_told_from_services() -> None:
    assert object_ids([ID, TIMERS_ID, AUTH_SERVER, FLOWS_SERVER]) == {ID}
