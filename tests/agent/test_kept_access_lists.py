"""Access lists that a task keeps: with their file, before its name, over crashes; never more rights than the mode
policy gives, and accounts only where the destination's owner lets numbers count. What is not kept is counted, and said.
"""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio

from agent.storage import access_lists
from agent.storage.access_lists import (
    AccessList,
    parse_untrusted,
)
from agent.storage.faulty import Call
from agent.storage.posix import PosixDirectory, PosixRoot
from protocol import session
from protocol.control import TaskItem
from protocol.session import FileAttributes
from tests.agent.access_list_scene import (
    ACCESS,
    BOB,
    DEFAULT,
    MIB,
    READS,
    STAFF,
    WANTED,
    effective,
    give,
    kept,
    list_of,
    lists,
    scene,
)
from tests.agent.engine_inside import WHOLE, Engine, contents, quick_path
from tests.agent.engine_world import World
from tests.agent.small_disks import Disk, needs_root, unmounting

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")


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
            # Another thread may give it its name just now.
            with suppress(FileNotFoundError):
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
