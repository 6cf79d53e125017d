"""The owner's policy against a reference that can be read at a glance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config.keys import CollectionConfig
from agent.policy import LINK_OPERATIONS, Policy
from protocol.errors import NeedsPerson, RetryLater, TowpathError

IDS = [f"00000000-0000-4000-8000-00000000000{n}" for n in range(4)]
COLLECTIONS = st.lists(
    st.builds(
        CollectionConfig, id=st.sampled_from(IDS), name=st.just("c"), root=st.just("/r"), read_only=st.booleans()
    ),
    max_size=3,
    unique_by=lambda collection: collection.id,
)
COMPONENTS = st.sampled_from([b"a", b"..", b".", b"", b"a/b", b"a\0", b"...", b".towpath.x", b"\xff", b".ssh"])
PATHS = st.lists(COMPONENTS, max_size=4).map(tuple)


def reference(collections: list[CollectionConfig], collection_id: str, path: tuple[bytes, ...], access: str) -> str:
    for collection in collections:
        if collection.id == collection_id:
            for name in path:
                if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or name.startswith(b".towpath."):
                    return "PERMISSION_DENIED"
            if access == "r":
                return ""
            if access == "rw":
                return "READ_ONLY" if collection.read_only else ""
            return "PERMISSION_DENIED"
    return "UNKNOWN_COLLECTION"


@given(COLLECTIONS, st.sampled_from([*IDS, "", "../x"]), PATHS, st.sampled_from(["r", "rw", "w", ""]))
def test_the_policy_decides_like_the_reference(
    collections: list[CollectionConfig], collection_id: str, path: tuple[bytes, ...], access: str
) -> None:
    policy = Policy(collections)
    try:
        found = policy.check(collection_id, path, access)  # type: ignore[arg-type]
    except TowpathError as error:
        assert error.code == reference(collections, collection_id, path, access)
    else:
        assert reference(collections, collection_id, path, access) == ""
        assert found.id == collection_id


def test_a_replaced_configuration_counts_at_once() -> None:
    policy = Policy([CollectionConfig(id=IDS[0], name="a", root="/a")])
    assert policy.check(IDS[0], (b"x",), "rw").root == "/a"
    policy.replace([CollectionConfig(id=IDS[0], name="a", root="/a", read_only=True)])
    with pytest.raises(TowpathError) as caught:
        policy.check(IDS[0], (b"x",), "rw")
    assert caught.value.code == "READ_ONLY"
    policy.replace([])
    with pytest.raises(TowpathError) as caught:
        policy.check(IDS[0], (b"x",), "r")
    assert caught.value.code == "UNKNOWN_COLLECTION"


@given(st.text(max_size=20))
def test_only_the_known_operations_are_the_relays(operation: str) -> None:
    policy = Policy([])
    if operation in LINK_OPERATIONS:
        policy.check_operation(operation)
    else:
        with pytest.raises(TowpathError) as caught:
            policy.check_operation(operation)
        assert caught.value.code == "PERMISSION_DENIED"


def test_a_paused_machine_serves_no_new_session_and_everything_else() -> None:
    policy = Policy([])
    policy.pause = "all"
    with pytest.raises(NeedsPerson) as caught:
        policy.check_operation("sessions")
    assert caught.value.code == "PAUSED_BY_OWNER"
    for operation in LINK_OPERATIONS - {"sessions"}:
        policy.check_operation(operation)


def test_a_machine_that_holds_back_says_why_and_serves_everything_but_sessions() -> None:
    policy = Policy([])
    policy.held_back = "it runs on battery"
    with pytest.raises(RetryLater, match="it runs on battery") as caught:
        policy.check_operation("sessions")
    assert caught.value.code == "SOURCE_BUSY"
    for operation in LINK_OPERATIONS - {"sessions"}:
        policy.check_operation(operation)
