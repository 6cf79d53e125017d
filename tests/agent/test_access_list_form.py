"""Access lists as bytes and as rights: what is one, and that a kept one never gives more than the mode policy."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.storage import access_lists
from agent.storage.access_lists import (
    AccessList,
    FoundLists,
    narrowed,
    of_mode,
    parse_untrusted,
    with_owner,
)
from agent.transfer.basis.jobs import ListFate
from agent.transfer.basis.kept_attributes import check_attributes_untrusted
from agent.transfer.basis.kept_lists import ListPolicy
from protocol.errors import ProtocolError
from protocol.session import FileAttributes
from tests.agent.access_list_scene import (
    ACCESS,
    DEFAULT,
    READS,
    any_list,
    effective,
)


@given(any_list())
def test_what_is_packed_is_parsed(found: AccessList) -> None:
    assert parse_untrusted(found.packed()) == found
    assert parse_untrusted(with_owner(found.packed(), 6)) == replace(found, owner=found.owner | 6)


rows = st.lists(
    st.tuples(
        st.sampled_from([0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0, 0x40, 0xFFFF]),
        st.integers(0, 9) | st.integers(0, 0xFFFF),
        st.sampled_from([0, 1, 2, 2**32 - 1]) | st.integers(0, 2**32 - 1),
    ),
    max_size=8,
)


def in_bytes(version: int, found: list[tuple[int, int, int]]) -> bytes:
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *row) for row in found)


@given(
    st.binary(max_size=60) | st.builds(in_bytes, st.sampled_from([2, 1, 3]), rows) | any_list().map(AccessList.packed),
    st.integers(0, 100),
    st.integers(0, 255),
)
@example(in_bytes(2, [(1, 6, 2**32 - 1), (1, 6, 2**32 - 1), (4, 4, 2**32 - 1), (32, 4, 2**32 - 1)]), 0, 0)
@example(in_bytes(2, [(1, 6, 0), (4, 4, 2**32 - 1), (32, 4, 2**32 - 1)]), 0, 0)
@example(in_bytes(2, [(4, 4, 2**32 - 1), (1, 6, 2**32 - 1), (32, 4, 2**32 - 1)]), 0, 0)
def test_a_hostile_list_is_refused_or_is_one(data: bytes, place: int, bits: int) -> None:
    """Whatever comes, one bit pattern of it changed: `ProtocolError`, or a list that the kernel would take as it is."""
    changed = bytearray(data)
    if place < len(changed):
        changed[place] ^= bits
    try:
        found = parse_untrusted(bytes(changed))
    except ProtocolError:
        return
    assert found.packed() == changed
    assert all(0 <= may <= 7 for may in (found.owner, found.group, found.other, found.mask or 0))
    assert not found.names_accounts or found.mask is not None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "length"),
        (b"\x02\0\0", "length"),
        (READS.packed()[:-1], "length"),
        (b"\x03" + READS.packed()[1:], "version"),
        (in_bytes(2, []), "lacks"),
        (in_bytes(2, [(1, 8, 2**32 - 1), (4, 0, 2**32 - 1), (32, 0, 2**32 - 1)]), "permission"),
        (in_bytes(2, [(1, 6, 2**32 - 1), (2, 6, 1), (4, 0, 2**32 - 1), (32, 0, 2**32 - 1)]), "mask"),
        (AccessList(6, 4, 0, ((1, 4), (1, 6)), mask=4).packed(), "twice"),
        (AccessList(6, 4, 0, ((2, 4), (1, 6)), mask=4).packed(), "twice"),
        (AccessList(6, 4, 0, ((2**32 - 1, 4),), mask=4).packed(), "cannot be"),
        (AccessList(6, 4, 0, tuple((n, 4) for n in range(1100)), mask=4).packed(), "length"),
        (in_bytes(2, [(1, 6, 2**32 - 1), (4, 0, 2**32 - 1), (64, 0, 0), (32, 0, 2**32 - 1)]), "order"),
    ],
)
def test_impossible_lists_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        check_attributes_untrusted([FileAttributes([], access=data)], 1) if data else parse_untrusted(data)
    if data:
        with pytest.raises(ProtocolError, match=why):
            check_attributes_untrusted([FileAttributes([], default=data)], 1)


def test_an_impossible_count_is_refused() -> None:
    with pytest.raises(ProtocolError):
        check_attributes_untrusted([FileAttributes([], lists_left_out=-1)], 1)


@pytest.mark.parametrize(
    ("names", "value", "found"),
    [
        (["system.nfs4_acl"], b"", FoundLists(left_out=1)),
        (["user.a"], b"", FoundLists()),
        ([ACCESS], READS.packed(), FoundLists(access=READS.packed())),
        ([DEFAULT], READS.packed(), FoundLists(default=READS.packed())),
        # An account that has no number in this user namespace; a form of some later kernel.
        ([ACCESS], AccessList(6, 4, 0, ((2**32 - 1, 4),), mask=4).packed(), FoundLists(left_out=1)),
        ([ACCESS, DEFAULT], b"\x03" + READS.packed()[1:], FoundLists(left_out=2)),
        ([ACCESS], OSError(errno.ENODATA, ""), FoundLists()),
        ([ACCESS], OSError(errno.EACCES, ""), FoundLists(left_out=1)),
        (OSError(errno.ENOTSUP, ""), b"", FoundLists()),
    ],
)
def test_what_is_no_list_to_be_kept_is_counted(
    monkeypatch: pytest.MonkeyPatch, names: list[str] | OSError, value: bytes | OSError, found: FoundLists
) -> None:
    def answer(given: list[str] | bytes | OSError) -> Any:
        if isinstance(given, OSError):
            raise given
        return given

    monkeypatch.setattr(os, "listxattr", lambda _fd: answer(names))
    monkeypatch.setattr(os, "getxattr", lambda _fd, _name: answer(value))
    assert access_lists.read(0) == found


@given(any_list(), st.integers(0, 0o777), st.integers(0, 0o777))
def test_a_list_never_gives_more_than_the_mode_policy(found: AccessList, mode: int, permitted: int) -> None:
    given_list = narrowed(found, mode, permitted)
    before, after = effective(found), effective(given_list)
    assert before.keys() == after.keys()
    bound = {"owner": mode & permitted, "other": mode & permitted, "group": mode & permitted}
    shift = {"owner": 6, "other": 0}
    for who, may in after.items():
        assert may & ~before[who] == 0
        bits = bound.get(str(who), permitted) >> shift.get(str(who), 3) & 7
        assert may & ~bits == 0, who
    # Nor after a chmod that opens the mask again.
    assert all(bits & ~(permitted >> 3) == 0 for _, bits in (*given_list.users, *given_list.groups))
    assert given_list.mode & ~permitted == 0


@given(any_list())
def test_an_honest_list_is_kept_whole_where_nothing_is_taken_from_modes(found: AccessList) -> None:
    assert narrowed(found, found.mode_of_groups_own, 0o777) == found


@given(any_list(), st.integers(0, 0o777), st.booleans())
def test_what_becomes_of_a_list_is_counted_rightly(found: AccessList, permitted: int, numbers: bool) -> None:
    policy = ListPolicy(permitted, numbers=numbers)
    mode = found.mode_of_groups_own
    wanted, fate = policy.of_file(FileAttributes([], access=found.packed()), mode)
    there = parse_untrusted(wanted.packed)
    assert (fate == ListFate.KEPT) == (there == found and (numbers or not found.names_accounts))
    if found.names_accounts and not numbers:
        assert (there, wanted.extended) == (of_mode(mode & permitted), False)
    assert wanted.mode == there.mode
    # As root of the destination, with bytes that say nothing.
    assert policy.of_file(FileAttributes([]), mode)[1] == ListFate.NONE
    assert policy.of_file(FileAttributes([], lists_left_out=1), mode)[1] == ListFate.NOT_KEPT


def test_a_folder_stays_open_to_its_owner_who_works_in_it() -> None:
    closed = AccessList(5, 5, 0, mask=5)
    file = FileAttributes([], access=closed.packed(), default=closed.packed())
    opened = replace(closed, owner=7)
    assert ListPolicy(0o755, numbers=False).of_folder(file) == (opened, opened, ListFate.KEPT)
    assert ListPolicy(0o700, numbers=False).of_folder(file)[2] == ListFate.NOT_KEPT
