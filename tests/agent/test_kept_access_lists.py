"""Access lists that a task keeps: with their file, before its name, over crashes; never more rights than the mode
policy gives, and accounts only where the destination's owner lets numbers count. What is not kept is counted, and said.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from agent.storage import access_lists, attributes
from agent.storage.access_lists import (
    AccessList,
    FoundLists,
    narrowed,
    of_mode,
    parse_untrusted,
    with_owner,
)
from agent.storage.faulty import Call, Plan
from agent.storage.posix import PosixDirectory, PosixRoot, open_root
from agent.transfer.attributes import check_attributes_untrusted
from agent.transfer.jobs import ListFate
from agent.transfer.kept_lists import ListPolicy, within_folder
from agent.transfer.patience import ATTEMPTS
from protocol import session
from protocol.control import TaskItem
from protocol.errors import ProtocolError
from protocol.session import FileAttributes
from tests.agent.engine_inside import CHECKED, WHOLE, Crashed, Engine, contents, quick_path
from tests.agent.engine_world import World
from tests.agent.small_disks import Disk, needs_root, unmounting

__all__ = ["quick_path"]

MIB = 1024 * 1024
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
WANTED = msgspec.structs.replace(CHECKED, preserve_acls=True)
# No accounts of this machine.
BOB, STAFF = 54321, 54322
READS = AccessList(6, 4, 0, users=((BOB, 4),), mask=4)

rights = st.integers(0, 7)
named = st.dictionaries(st.integers(0, 2**32 - 2), rights, max_size=5).map(lambda found: tuple(sorted(found.items())))


@st.composite
def any_list(draw: st.DrawFn) -> AccessList:
    users, groups = draw(named), draw(named)
    mask = draw(rights if users or groups else st.none() | rights)
    return AccessList(draw(rights), draw(rights), draw(rights), users, groups, mask)


# --- the form ----------------------------------------------------------------------------------------------------


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


# --- how far it goes ---------------------------------------------------------------------------------------------


def effective(found: AccessList) -> dict[object, int]:
    """What everybody may do whom a list tells apart (acl(5), access check)."""
    mask = 7 if found.mask is None else found.mask
    may: dict[object, int] = {"owner": found.owner, "group": found.group & mask, "other": found.other}
    may |= {("user", account): bits & mask for account, bits in found.users}
    return may | {("group", account): bits & mask for account, bits in found.groups}


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


# --- transfers ---------------------------------------------------------------------------------------------------


def give(path: Path, found: AccessList, name: str = ACCESS) -> None:
    try:
        os.setxattr(path, name, found.packed())
    except OSError as error:
        pytest.skip(f"this file system keeps no access lists: {error}")


def list_of(path: Path, name: str = ACCESS) -> AccessList | None:
    return parse_untrusted(os.getxattr(path, name)) if name in os.listxattr(path) else None


def lists(root: Path) -> dict[str, tuple[AccessList | None, AccessList | None, int]]:
    """Of all files and folders below: their lists, and the mode of files."""
    paths = (path for path in root.rglob("*") if not path.is_symlink())
    return {
        str(path.relative_to(root)): (
            list_of(path),
            list_of(path, DEFAULT),
            path.stat().st_mode & 0o777 if path.is_file() else 0,
        )
        for path in paths
    }


def scene(engine: Engine) -> int:
    """Small and large files and folders with and without lists; how many have some."""
    (engine.source / "folder" / "inner").mkdir(parents=True)
    sizes = {"large": 3 * MIB + 5, "empty": 0}
    for name in ("small", "folder/small", "folder/large", "folder/inner/empty", "plain", "folder/plain"):
        path = engine.source / name
        path.write_bytes(os.urandom(sizes.get(path.name, 100)))
        path.chmod(0o640)
    give(engine.source / "small", READS)
    give(engine.source / "folder/small", AccessList(4, 0, 0, ((0, 5), (BOB, 7)), ((STAFF, 1),), mask=5))
    give(engine.source / "folder/large", AccessList(4, 4, 4, groups=((STAFF, 4),), mask=4))
    give(engine.source / "folder/inner/empty", AccessList(6, 6, 0, mask=4))
    # Of the default list, files that were there before have nothing.
    give(engine.source / "folder", AccessList(7, 5, 0, ((BOB, 5),), mask=5), DEFAULT)
    return 5


def kept(engine: Engine, numbers: bool = True, permitted: int = 0o777) -> Engine:
    engine.numbers, engine.permitted = numbers, permitted
    return engine


@pytest.mark.parametrize("by_items", [False, True])
async def test_lists_come_with_their_files_and_folders(quick_path: Path, *, by_items: bool) -> None:
    engine = kept(Engine(quick_path, WANTED))
    count = scene(engine)
    if by_items:
        engine.items = [
            TaskItem(source_path=f"/{name}", destination_path=f"/{name}") for name in ("small", "folder", "plain")
        ]
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert lists(engine.destination) == lists(engine.source)
    counters = observed.counters
    assert (counters.acls_kept, counters.acls_not_kept, counters.acls_refused) == (count, 0, 0)
    assert "ACCESS_LISTS_NOT_KEPT" not in engine.codes()
    print(f"files and folders with lists: {count}, all kept")


async def test_nothing_is_asked_for_unless_the_task_wants_it(quick_path: Path) -> None:
    engine = kept(Engine(quick_path))
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert not any(access or default for access, default, _ in lists(engine.destination).values())
    assert not [call for call in engine.calls if "access_list" in call.operation]


async def test_accounts_need_the_word_of_the_destinations_owner(quick_path: Path) -> None:
    """Without it the mode alone holds, with the group's own rights; a list that names nobody is kept."""
    engine = kept(Engine(quick_path, WANTED), numbers=False)
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    found = lists(engine.destination)
    assert {name: access for name, (access, default, _) in found.items() if access or default} == {
        "folder/inner/empty": AccessList(6, 6, 0, mask=4)
    }
    assert {name: oct(mode) for name, (_, _, mode) in found.items() if mode} == {
        "small": "0o640",
        "plain": "0o640",
        "folder/plain": "0o640",
        "folder/small": "0o400",
        "folder/large": "0o444",
        "folder/inner/empty": "0o640",
    }
    counters = observed.counters
    assert (counters.acls_kept, counters.acls_not_kept, counters.acls_refused) == (1, 4, 0)
    (event,) = [event for event in engine.events if event.code == "ACCESS_LISTS_NOT_KEPT"]
    assert "access_lists: numbers" in event.details


async def test_no_list_opens_more_than_the_umask_lets_a_mode(quick_path: Path) -> None:
    engine = kept(Engine(quick_path, WANTED), permitted=0o750)
    path = engine.source / "file"
    path.write_bytes(b"content")
    give(path, AccessList(6, 6, 4, ((BOB, 6),), mask=6))
    (engine.source / "folder").mkdir()
    give(engine.source / "folder", AccessList(7, 7, 7), DEFAULT)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert list_of(engine.destination / "file") == AccessList(6, 4, 0, ((BOB, 4),), mask=4)
    assert list_of(engine.destination / "folder", DEFAULT) == AccessList(7, 5, 0)
    assert (observed.counters.acls_kept, observed.counters.acls_not_kept) == (0, 2)
    (event,) = [event for event in engine.events if event.code == "ACCESS_LISTS_NOT_KEPT"]
    assert "umask is 027" in event.details


@pytest.mark.parametrize("size", [100, 3 * MIB])
async def test_a_folder_does_not_open_what_has_no_list(quick_path: Path, size: int) -> None:
    """The default list of a folder, brought by this task or one before, gives nothing to a file or folder that has no
    list at the source, not even while it is written."""
    engine = kept(Engine(quick_path, WANTED))
    (engine.source / "folder").mkdir()
    give(engine.source / "folder", AccessList(7, 7, 7, ((BOB, 7),), mask=7), DEFAULT)
    assert (await engine.run()).state == "SUCCEEDED"
    assert list_of(engine.destination / "folder", DEFAULT)

    # Made later, without the list that a shell would give them.
    for name in ("secret", "inner"):
        path = engine.source / "folder" / name
        path.mkdir() if name == "inner" else path.write_bytes(os.urandom(size))
        os.removexattr(path, ACCESS)
        path.chmod(0o700 if name == "inner" else 0o640)
    os.removexattr(engine.source / "folder" / "inner", DEFAULT)
    (engine.source / "folder" / "inner" / "hidden").write_bytes(b"content")
    (engine.source / "folder" / "inner" / "hidden").chmod(0o660)

    opened: list[str] = []

    def look(call: Call) -> None:
        for path in engine.destination.rglob("*"):
            access = list_of(path)
            if access is not None and effective(access).get(("user", BOB), 0) and path.is_file():
                opened.append(f"{path.name} at {call.operation}")
        inner = engine.destination / "folder" / "inner"
        if inner.is_dir() and list_of(inner) and any(inner.iterdir()):
            opened.append(f"inner at {call.operation}")

    again = kept(Engine(quick_path / "again", WANTED, plan=look))
    again.source, again.destination = engine.source, engine.destination
    engine = again
    observed = await again.run()
    assert observed.state == "SUCCEEDED", observed
    assert not opened
    assert lists(again.destination) == lists(again.source)
    assert observed.counters.acls_kept == 1


@pytest.mark.parametrize("size", [100, 3 * MIB])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.E2BIG])
async def test_a_list_that_is_refused_does_not_leave_that_of_the_folder(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, code: int
) -> None:
    """An account that has no number here, or more accounts than there is room for: nobody else may look instead."""
    engine = kept(Engine(quick_path, WANTED))
    folder = engine.source / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "secret").write_bytes(os.urandom(size))
    (folder / "inner" / "hidden").write_bytes(b"content")
    (folder / "inner" / "hidden").chmod(0o640)
    give(folder, AccessList(7, 5, 0, ((BOB, 7),), mask=7), DEFAULT)
    give(folder / "secret", AccessList(6, 4, 0, groups=((STAFF, 4),), mask=4))
    give(folder / "inner", AccessList(7, 5, 0, groups=((STAFF, 5),), mask=5))
    give(folder / "inner", AccessList(7, 5, 0, groups=((STAFF, 5),), mask=5), DEFAULT)
    write = access_lists.write

    def refuses(fd: int, packed: bytes, *, default: bool = False) -> None:
        if packed and parse_untrusted(packed).groups:
            raise OSError(code, "on purpose")
        write(fd, packed, default=default)

    monkeypatch.setattr(access_lists, "write", refuses)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    found = lists(engine.destination)
    assert found["folder"][1] is not None
    assert found["folder/secret"] == (None, None, 0o640)
    assert found["folder/inner"][:2] == (None, None)
    assert found["folder/inner/hidden"] == (None, None, 0o640)
    assert (observed.counters.acls_kept, observed.counters.acls_refused) == (1, 2)


async def test_the_folder_that_a_task_is_sent_to_keeps_its_own(quick_path: Path) -> None:
    engine = kept(Engine(quick_path, WANTED))
    (engine.source / "file").write_bytes(b"content")
    theirs = AccessList(7, 5, 0, ((BOB, 7),), mask=7)
    give(engine.destination, theirs)
    give(engine.destination, theirs, DEFAULT)
    assert (await engine.run()).state == "SUCCEEDED"
    assert (list_of(engine.destination), list_of(engine.destination, DEFAULT)) == (theirs, theirs)
    assert list_of(engine.destination / "file") is None


@pytest.mark.parametrize("named", [False, True])
async def test_a_folder_with_something_in_it_is_opened_no_wider(quick_path: Path, named: bool) -> None:
    """Whoever may write to a folder of a collection must not open what others have in it to the whole machine."""
    engine = kept(Engine(quick_path, WANTED))
    theirs = engine.source if named else engine.source / "folder"
    ours = engine.destination if named else engine.destination / "folder"
    for folder in (theirs, ours, engine.source / "new"):
        folder.mkdir(exist_ok=True)
    (ours / "private").write_bytes(b"of somebody else")
    ours.chmod(0o710)
    for folder in (theirs, engine.source / "new"):
        give(folder, AccessList(7, 7, 5, ((BOB, 5),), mask=7))
        (folder / "file").write_bytes(b"content")
    again = kept(Engine(quick_path / "again", WANTED))
    again.source, again.destination = engine.source, engine.destination
    for each in (engine, again):
        observed = await each.run()
        assert observed.state == "SUCCEEDED", observed
        # Also what the first task gave stays as it is.
        assert list_of(ours) == AccessList(7, 1, 0, ((BOB, 5),), mask=7)
        assert list_of(engine.destination / "new") == AccessList(7, 7, 5, ((BOB, 5),), mask=7)
        assert (observed.counters.acls_kept, observed.counters.acls_not_kept) == (1, 1)
        (event,) = [event for event in each.events if event.code == "ACCESS_LISTS_NOT_KEPT"]
        assert "there before" in event.details


async def test_no_room_for_a_list_is_waited_for(quick_path: Path) -> None:
    """What may pass is not the list's fault."""
    full = [True] * 3

    def plan(call: Call) -> int | None:
        if call.operation == "set_access_list" and full:
            full.pop()
            return errno.EDQUOT
        return None

    engine = kept(Engine(quick_path, WANTED, plan=plan))
    count = scene(engine)
    observed = await engine.run()
    assert (observed.state, observed.counters.acls_kept) == ("SUCCEEDED", count)
    assert lists(engine.destination) == lists(engine.source)
    assert "QUOTA_EXCEEDED" in engine.codes()


async def test_a_folder_that_is_open_for_lookups_only_keeps_its_lists(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may read it, so that it has no handle by which lists can be looked at."""
    monkeypatch.setattr(PosixRoot, "readable", lambda root, fd, where: PosixDirectory(root, fd, where))
    engine = kept(Engine(quick_path, WANTED))
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"content")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ENOSPC])
async def test_a_file_system_without_lists_takes_the_files_and_says_so(quick_path: Path, code: int) -> None:
    engine = kept(Engine(quick_path, WANTED, plan=lambda call: code if call.operation == "set_access_list" else None))
    count = scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    found = lists(engine.destination)
    assert not any(access or default for access, default, _ in found.values())
    # As without the choice: the group has its own rights, not the mask's.
    assert (found["folder/small"][2], found["folder/large"][2], found["small"][2]) == (0o400, 0o444, 0o640)
    counters = observed.counters
    # One that says no more than a mode is missed by nobody, but only ENOTSUP says that there are none at all.
    assert (counters.acls_kept, counters.acls_not_kept) == (0, 0)
    assert counters.acls_refused == (count if code == errno.ENOTSUP else count + 2)
    assert len([event for event in engine.events if event.code == "ACCESS_LISTS_NOT_KEPT"]) == 1


async def test_a_source_of_before_is_named_and_its_lists_are_counted(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_lists, "usable", lambda: False)
    engine = kept(Engine(quick_path, WANTED))
    count = scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert not any(access or default for access, default, _ in lists(engine.destination).values())
    assert (observed.counters.acls_kept, observed.counters.acls_not_kept) == (0, count)
    assert "agent of the source" in next(e.details for e in engine.events if e.code == "ACCESS_LISTS_NOT_KEPT")


def test_messages_of_before_and_of_now_are_understood() -> None:
    asked = {"t": "attributes", "r": 1, "files": [[b"a", None]], "follow": False}
    old = session.request_untrusted(msgspec.msgpack.encode(asked))
    assert isinstance(old, session.ReadAttributes)
    assert (old.attributes, old.lists) == (True, False)
    assert msgspec.convert([[], 1, 2], FileAttributes) == FileAttributes([], 1, 2)

    class Before(msgspec.Struct, array_like=True, frozen=True):
        attributes: list[tuple[bytes, bytes]]
        left_out: int = 0
        rights: int = 0

    now = msgspec.msgpack.encode(FileAttributes([], 1, 2, READS.packed(), b"", 3))
    assert msgspec.msgpack.decode(now, type=Before) == Before([], 1, 2)


async def test_capabilities_are_counted_as_attributes_and_lists_as_lists(quick_path: Path) -> None:
    engine = kept(Engine(quick_path, msgspec.structs.replace(WANTED, preserve_xattrs=True)))
    count = scene(engine)
    os.setxattr(engine.source / "small", "user.colour", b"green")
    try:
        os.setxattr(engine.source / "plain", "security.capability", bytes.fromhex("01000002" + "02" + "00" * 15))
    except OSError as error:
        pytest.skip(f"capabilities cannot be set here: {error}")
    observed = await engine.run()
    assert (observed.state, observed.counters.xattrs_left_out, observed.counters.acls_kept) == ("SUCCEEDED", 1, count)
    assert os.getxattr(engine.destination / "small", "user.colour") == b"green"
    assert lists(engine.destination) == lists(engine.source)


async def test_a_list_that_changes_on_its_way_is_a_change_of_the_file(quick_path: Path) -> None:
    engine = kept(Engine(quick_path, WANTED))
    path = engine.source / "file"
    path.write_bytes(b"content")
    give(path, READS)
    closed = AccessList(6, 0, 0, ((BOB, 0),), mask=0)

    def plan(call: Call) -> int | None:
        # Behind the folder's own.
        if call.operation == "get_access_lists" and call.nth == 2:
            give(path, closed)
        return None

    engine.source_plan = plan
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert list_of(engine.destination / "file") == closed
    assert "FILE_CHANGED" in engine.codes()


# --- faults of the storage ---------------------------------------------------------------------------------------


def small_scene(engine: Engine) -> int:
    """A small and a large file and a folder, all with lists; how many."""
    (engine.source / "folder").mkdir()
    for name, size in (("folder/small", 100), ("folder/large", MIB + 5)):
        (engine.source / name).write_bytes(os.urandom(size))
        (engine.source / name).chmod(0o640)
        give(engine.source / name, READS)
    give(engine.source / "folder", AccessList(7, 5, 0, ((BOB, 5),), mask=5), DEFAULT)
    return 3


PASSING = {
    errno.EIO: "IO_ERROR",
    errno.ESTALE: "STALE_HANDLE",
    errno.EBUSY: "BUSY",
    errno.ETIMEDOUT: "TIMEOUT",
    errno.EDQUOT: "QUOTA_EXCEEDED",
}


@pytest.mark.parametrize("code", PASSING, ids=errno.errorcode.get)
@pytest.mark.parametrize(("side", "operation"), [("source", "get"), ("destination", "get"), ("destination", "set")])
async def test_a_fault_that_passes_loses_no_list(quick_path: Path, side: str, operation: str, code: int) -> None:
    """Whichever call of a file's or a folder's list it is, the task tells what it was, goes on by itself, and keeps
    every list."""
    called = "get_access_lists" if operation == "get" else "set_access_list"

    def failing(nth: int, calls: list[Call]) -> Plan:
        def plan(call: Call) -> int | None:
            if call.operation != called:
                return None
            calls.append(call)
            return code if len(calls) == nth else None

        return plan

    failed = 0
    while True:
        calls: list[Call] = []
        engine = kept(Engine(quick_path / str(failed), WANTED))
        setattr(engine, "source_plan" if side == "source" else "plan", failing(failed + 1, calls))
        count = small_scene(engine)
        if side == "destination" and operation == "get":
            # One that is there before with something in it is looked at.
            (engine.destination / "folder").mkdir(mode=0o755)
            (engine.destination / "folder" / "before").touch()
            give(engine.source / "folder", AccessList(7, 5, 5, ((BOB, 5),), mask=5))
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        what = f"call {failed + 1} of {len(calls)}"
        found = lists(engine.destination)
        found.pop("folder/before", None)
        assert found == lists(engine.source), what
        counters = observed.counters
        assert (counters.acls_kept, counters.acls_not_kept, counters.acls_refused) == (count, 0, 0), what
        if len(calls) <= failed:
            break
        assert PASSING[code] in engine.codes(), what
        failed += 1
    assert failed
    print(f"{errno.errorcode[code]} at the {side}: {failed} calls of {called} failed, one a run")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("broken", ["small", "large", "folder"])
async def test_a_list_that_can_never_be_read_costs_its_file_or_folder(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, code: int
) -> None:
    """Within the budget of the fault, and in its words; without its list nothing is let in."""
    engine = kept(Engine(quick_path, WANTED))
    small_scene(engine)
    (engine.source / "other").write_bytes(b"other")
    path = engine.source / "folder" / ("" if broken == "folder" else broken)
    inode, calls = path.stat().st_ino, 0

    def read(root: PosixRoot, fd: int) -> FoundLists:
        nonlocal calls
        if os.fstat(fd).st_ino == inode:
            calls += 1
            raise OSError(code, os.strerror(code))
        return access_lists.read(fd)

    monkeypatch.setattr(PosixRoot, "get_access_lists", read)
    observed = await engine.run()
    assert (observed.state, observed.error_code, observed.counters.failed) == ("FAILED", "ITEMS_FAILED", 1), observed
    assert (engine.destination / "other").read_bytes() == b"other"
    assert not path.is_file() or not (engine.destination / "folder" / broken).exists()
    assert calls == ATTEMPTS[PASSING[code]]
    told = [event.details for event in engine.events if event.code == PASSING[code]]
    subject = "folder" if broken == "folder" else f"folder/{broken}"
    assert told and all(details.startswith(f"{subject} at the source ") for details in told), told


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
async def test_a_list_that_may_not_be_read_is_counted(quick_path: Path, code: int) -> None:
    """Trying again would not help, and the content is there for everybody who may read it."""
    engine = kept(Engine(quick_path, WANTED))
    count = small_scene(engine)
    engine.source_plan = lambda call: code if call.operation == "get_access_lists" else None
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert observed.counters.acls_not_kept == count + 1
    assert "ACCESS_LISTS_NOT_KEPT" in engine.codes() and "PERMISSION_DENIED" not in engine.codes()


@pytest.mark.parametrize("code", [*PASSING, errno.ENOSPC], ids=errno.errorcode.get)
def test_only_refusals_leave_a_list_or_an_attribute_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "file"
    path.touch()
    give(path, READS)
    os.setxattr(path, "user.colour", b"green")
    fd = os.open(path, os.O_RDONLY)

    def failing(number: int) -> None:
        def getxattr(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "getxattr", getxattr)

    try:
        failing(code)
        for read in (access_lists.read, attributes.read):
            with pytest.raises(OSError) as raised:
                read(fd)
            assert raised.value.errno == code
        failing(errno.EACCES)
        assert access_lists.read(fd) == FoundLists(left_out=1)
        assert attributes.read(fd).left_out == 1
        failing(errno.ENODATA)
        assert access_lists.read(fd) == FoundLists()
        assert attributes.read(fd).left_out == 0
    finally:
        os.close(fd)


async def test_a_folder_whose_list_may_not_be_read_is_not_opened_by_its_mask(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mode shows in the group's place is a mask where there is a list."""
    folder = quick_path / "folder"
    folder.mkdir()
    give(folder, AccessList(7, 0, 0, ((BOB, 7),), mask=7))
    root, fd = open_root(str(quick_path)), os.open(folder, os.O_RDONLY)
    wanted = AccessList(7, 7, 5, ((BOB, 5),), mask=7)
    try:
        assert within_folder(root, fd, wanted).group == 0
        monkeypatch.setattr(PosixRoot, "get_access_lists", lambda *_: FoundLists(left_out=1))
        assert within_folder(root, fd, wanted).group == 0
    finally:
        os.close(fd)
        root.close()


async def test_a_crash_at_any_call_loses_no_list_and_opens_nothing(quick_path: Path) -> None:
    """At every fourth call, and at and behind each that sets a list: what has its name has its list."""
    whole = kept(Engine(quick_path / "whole", WANTED))
    count = scene(whole)
    await whole.run()
    sets = [call.number for call in whole.calls if call.operation == "set_access_list"]
    crashes = 0
    for number in sorted({*range(1, whole.calls[-1].number, 8), *sets, *(last + 1 for last in sets)}):

        def plan(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        engine = kept(Engine(quick_path / f"crash-{number}", WANTED, plan=plan))
        scene(engine)
        try:
            await engine.run()
        except Crashed:
            crashes += 1
            expected = lists(engine.source)
            for name, found in lists(engine.destination).items():
                if (engine.destination / name).is_file() and not Path(name).name.startswith(".towpath."):
                    assert found == expected[name], (number, name)
            engine = kept(engine.revived())
            observed = await engine.run()
            assert observed.state == "SUCCEEDED", observed
            assert lists(engine.destination) == expected
            assert (observed.counters.acls_kept, observed.counters.acls_not_kept) == (count, 0), number
            assert not engine.temporaries()
    assert crashes
    print(f"crashes survived: {crashes}")


@pytest.mark.parametrize(("numbers", "counts"), [(True, (2, 0)), (False, (0, 2))])
async def test_what_a_crash_leaves_half_done_is_counted_once(
    quick_path: Path, numbers: bool, counts: tuple[int, int]
) -> None:
    """A small file is in the books with the fate of its list when its folder is not done yet."""

    def plan(call: Call) -> int | None:
        # The large file is sealed long after the small one was settled.
        if call.operation == "set_access_list" and call.nth == 2:
            raise Crashed
        return None

    engine = kept(Engine(quick_path, WANTED, plan=plan), numbers=numbers)
    for name, size in (("a", 100), ("large", 24 * MIB)):
        (engine.source / name).write_bytes(bytes(size))
        give(engine.source / name, READS)
    with pytest.raises(Crashed):
        await engine.run()
    engine = kept(engine.revived(), numbers=numbers)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (observed.counters.acls_kept, observed.counters.acls_not_kept) == counts


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_lists_on_real_file_systems(tmp_path: Path, kind: str) -> None:
    """As the kernel's own checks see them: with the other account's eyes."""
    place = tmp_path / "disk"
    disk = Disk(tmp_path / "image", kind)
    with unmounting(place):
        disk.mount(place)
        engine = kept(Engine(tmp_path, WANTED))
        engine.source, engine.destination = place / "source", place / "destination"
        for folder in (engine.source, engine.destination):
            folder.mkdir()
        count = scene(engine)
        give(engine.source / "folder", AccessList(7, 0, 0, ((BOB, 5),), mask=5))
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert lists(engine.destination) == lists(engine.source)
        assert observed.counters.acls_kept == count
        assert {name: reads(engine.destination, name) for name in ("small", "plain", "folder/small")} == {
            "small": True,
            "plain": False,
            "folder/small": True,
        }
        print(f"{kind}: {count} kept")


def reads(folder: Path, name: str) -> bool:
    """Whether BOB may read a file in a folder, whatever is above that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        command = ["cat", f"/proc/self/fd/{handle}/{name}"]
        done = subprocess.run(command, user=BOB, group=BOB, extra_groups=[], pass_fds=[handle], capture_output=True)
    finally:
        os.close(handle)
    return done.returncode == 0


@pytest.mark.parametrize(("numbers", "workers"), [(False, 1), (True, 2)])
async def test_the_owners_word_reaches_real_workers(tmp_path: Path, numbers: bool, workers: int) -> None:
    """With lane processes wanted, too, which know no lists and so have no part in this."""
    async with trio.open_nursery() as nursery:
        made = World(tmp_path, nursery, workers)
        made.beta.numbered_accounts = numbers
        await made.start(made.alpha)
        await made.start(made.beta)
        path = made.alpha.root / "file"
        path.write_bytes(b"content")
        give(path, READS)
        observed = await made.wait(await made.submit(WHOLE, WANTED))
        assert observed.state == "SUCCEEDED", observed
        assert list_of(made.beta.root / "file") == (READS if numbers else None)
        assert (observed.counters.acls_kept, observed.counters.acls_not_kept) == (int(numbers), int(not numbers))
        nursery.cancel_scope.cancel()


async def test_the_rows_of_a_kernels_list_may_come_in_any_order(quick_path: Path) -> None:
    engine = kept(Engine(quick_path, WANTED))
    path = engine.source / "file"
    path.write_bytes(b"content")
    give(path, AccessList(6, 4, 0, ((BOB, 4), (7, 6)), mask=6))
    observed = await engine.run()
    assert (observed.state, observed.counters.acls_kept) == ("SUCCEEDED", 1)
    assert list_of(engine.destination / "file") == AccessList(6, 4, 0, ((7, 6), (BOB, 4)), mask=6)
