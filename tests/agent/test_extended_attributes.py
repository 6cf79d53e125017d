"""Extended attributes of the user's namespace, taken over when a task asks for it: with their file, before its name,
over crashes; nothing that grants rights; and what cannot be taken over is counted and said."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from agent.storage import attributes
from agent.storage.attributes import Found
from agent.storage.faulty import Call
from agent.storage.posix import PosixRoot
from agent.transfer.asking.budget import Budget
from agent.transfer.basis.kept_attributes import check_attributes_untrusted
from agent.transfer.basis.patience import ATTEMPTS
from protocol import session
from protocol.control import TaskItem
from protocol.errors import ProtocolError
from protocol.session import FileAttributes
from tests.agent.engine_inside import CHECKED, Crashed, Engine, contents, quick_path

__all__ = ["quick_path"]

MIB = 1024 * 1024
WANTED = msgspec.structs.replace(CHECKED, preserve_xattrs=True)


def attributes_of(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if not name.startswith("security.")}


def all_attributes(root: Path) -> dict[str, dict[str, bytes]]:
    paths = (path for path in [root, *root.rglob("*")] if not path.is_symlink())
    return {str(path.relative_to(root)): attributes_of(path) for path in paths}


def give(path: Path, **values: bytes) -> None:
    try:
        for name, value in values.items():
            os.setxattr(path, f"user.{name}", value)
    except OSError as error:
        pytest.skip(f"this file system keeps no extended attributes: {error}")


def scene(engine: Engine) -> None:
    """Small and large files and folders, with and without attributes, writable and not."""
    (engine.source / "folder" / "inner").mkdir(parents=True)
    for number, name in enumerate(("small", "folder/small", "folder/large", "folder/inner/empty", "plain")):
        path = engine.source / name
        size = {"large": 3 * MIB + 5, "empty": 0}.get(path.name, 100 + number)
        path.write_bytes(os.urandom(size))
        if name != "plain":
            give(path, origin=name.encode(), **{f"n{number}": os.urandom(number)})
        path.chmod(0o444 if number % 2 else 0o640)
    give(engine.source / "folder", colour=b"green")
    give(engine.source, top=b"yes")


@pytest.mark.parametrize("by_items", [False, True])
async def test_attributes_come_with_their_files_and_folders(quick_path: Path, *, by_items: bool) -> None:
    engine = Engine(quick_path, WANTED)
    scene(engine)
    if by_items:
        engine.items = [
            TaskItem(source_path=f"/{name}", destination_path=f"/{name}") for name in ("small", "folder", "plain")
        ]
        give(engine.destination, top=b"yes")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    found = all_attributes(engine.destination)
    assert found == all_attributes(engine.source)
    assert observed.counters.xattrs_left_out == 0
    print(f"files and folders: {len(found)}, attributes: {sum(map(len, found.values()))}")


async def test_nothing_is_asked_for_unless_the_task_wants_it(quick_path: Path) -> None:
    engine = Engine(quick_path)
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert not any(all_attributes(engine.destination).values())
    assert not [call for call in engine.calls if call.operation == "set_attribute"]


async def test_what_grants_rights_and_what_is_the_agents_own_is_left_alone(quick_path: Path) -> None:
    engine = Engine(quick_path, WANTED)
    path = engine.source / "file"
    path.write_bytes(b"content")
    give(path, good=b"1")
    os.setxattr(path, "user.towpath.root", b"forged")
    os.setxattr(engine.source, "user.towpath.root", b"forged")
    foreign = rights = 0
    for name, value in (
        ("security.capability", bytes.fromhex("0100000200200000000000000000000000000000")),
        ("trusted.overlay.opaque", b"y"),
        ("system.posix_acl_access", bytes.fromhex("0200000001000600ffffffff04000400ffffffff20000400ffffffff")),
    ):
        try:
            os.setxattr(path, name, value)
            foreign += 1
            rights += not name.startswith("trusted.")
        except OSError as error:
            print(f"{name} not tried: {error}")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert {name for name in os.listxattr(engine.destination / "file") if name != "security.selinux"} == {"user.good"}
    assert "user.towpath.root" not in os.listxattr(engine.destination)
    assert observed.counters.xattrs_left_out == bool(rights)
    print(f"attributes of other namespaces at the source: {foreign}")


@pytest.mark.parametrize("name", [b"", b"towpath.root", b"a\0b", b"x" * 251])
def test_an_illegal_name_is_never_set(quick_path: Path, name: bytes) -> None:
    with (quick_path / "file").open("wb") as file, pytest.raises(OSError, match="Invalid"):
        attributes.write(file.fileno(), name, b"")


@pytest.mark.parametrize(
    "files",
    [
        [],
        [FileAttributes([]), FileAttributes([]), FileAttributes([])],
        [FileAttributes([(b"", b"")])],
        [FileAttributes([(b"a\0", b"")])],
        [FileAttributes([(b"x" * 251, b"")])],
        [FileAttributes([(b"a", b"1"), (b"a", b"2")])],
        [FileAttributes([(b"a", bytes(64 * 1024))])],
        [FileAttributes([(b"%d" % number, b"") for number in range(129)])],
        [FileAttributes([], -1)],
        [FileAttributes([], 0, -1)],
    ],
)
def test_impossible_answers_are_refused(files: list[FileAttributes]) -> None:
    with pytest.raises(ProtocolError):
        check_attributes_untrusted(files, 2)


async def test_a_file_system_without_attributes_takes_the_files_and_says_so(quick_path: Path) -> None:
    def plan(call: Call) -> int | None:
        return errno.ENOTSUP if call.operation == "set_attribute" else None

    engine = Engine(quick_path, WANTED, plan=plan)
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    # Four files and two folders have some.
    assert observed.counters.xattrs_left_out == 6
    told = [event for event in engine.events if event.code == "ATTRIBUTES_LEFT_OUT"]
    assert len(told) == 1
    assert "file system keeps no extended attributes" in told[0].details
    print(f"files and folders counted: {observed.counters.xattrs_left_out}, events: {len(told)}")


async def test_what_was_left_out_before_a_crash_is_counted_once(quick_path: Path) -> None:
    crashes = 0
    for number in range(10, 130, 5):

        def plan(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return errno.ENOTSUP if call.operation == "set_attribute" else None

        engine = Engine(quick_path / str(number), WANTED, plan=plan)
        scene(engine)
        try:
            observed = await engine.run()
        except Crashed:
            crashes += 1
            engine = engine.revived(plan=lambda call: errno.ENOTSUP if call.operation == "set_attribute" else None)
            observed = await engine.run()
        assert (observed.state, observed.counters.xattrs_left_out) == ("SUCCEEDED", 6), number
    assert crashes
    print(f"crashes survived: {crashes}")


async def test_a_source_that_cannot_read_them_is_named(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older agent, or another operating system: its abilities do not name it, and it is never asked."""
    monkeypatch.setattr(attributes, "usable", lambda: False)

    def never(*_: Any) -> Any:
        raise AssertionError("asked without the ability")

    monkeypatch.setattr("agent.transfer.source.serve.read_attributes", never)
    engine = Engine(quick_path, WANTED)
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    told = [event.details for event in engine.events if event.code == "ATTRIBUTES_LEFT_OUT"]
    assert len(told) == 1
    assert "agent of the source" in told[0]


def test_an_older_destination_that_never_asks_is_served_as_before() -> None:
    """The new request is a message of its own: an older source calls it unreadable, so it must not be sent to one."""
    body = session.encode(session.ReadAttributes(1, [session.AttributesOf(b"a", (1, 2, 3, 4, 5))]))[session.PREFIX :]
    assert session.request_untrusted(body) == session.ReadAttributes(1, [session.AttributesOf(b"a", (1, 2, 3, 4, 5))])
    answer = session.Attributes(1, [FileAttributes([(b"a", b"\xff")], 2)])
    assert session.answer_untrusted(session.encode(answer)[session.PREFIX :]) == answer


async def test_too_many_and_too_large_ones_are_counted(quick_path: Path) -> None:
    engine = Engine(quick_path, WANTED)
    path = engine.source / "file"
    path.write_bytes(b"content")
    try:
        give(path, **{f"n{number:03}": b"" for number in range(attributes.MOST_ATTRIBUTES + 3)})
    except OSError:
        pytest.skip("this file system keeps fewer attributes than the bound")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert len(attributes_of(engine.destination / "file")) == attributes.MOST_ATTRIBUTES
    assert observed.counters.xattrs_left_out == 1


async def test_the_disks_own_want_of_space_holds_the_task_up(quick_path: Path) -> None:
    """No room at all is not the file's own: the task waits, and the file has its attributes in the end."""
    full = [True] * 3

    def plan(call: Call) -> int | None:
        if call.operation == "set_attribute" and full:
            full.pop()
            return errno.EDQUOT
        return None

    engine = Engine(quick_path, WANTED, plan=plan)
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert all_attributes(engine.destination) == all_attributes(engine.source)
    assert "QUOTA_EXCEEDED" in engine.codes()


async def test_a_folder_that_never_takes_its_attributes_fails_alone(quick_path: Path) -> None:
    """Where its disk has a fault that stays; the task does not begin anew for ever."""
    calls = 0

    def plan(call: Call) -> int | None:
        nonlocal calls
        calls += call.operation == "set_attribute"
        return errno.EIO if call.operation == "set_attribute" else None

    engine = Engine(quick_path, WANTED, plan=plan)
    for name in ("bad", "good"):
        (engine.source / name).mkdir()
        (engine.source / name / "file").write_bytes(b"content")
    give(engine.source / "bad", colour=b"green")
    observed = await engine.run(seconds=10)
    assert observed.state == "FAILED", observed
    assert observed.counters.failed == 1
    assert (engine.destination / "good" / "file").read_bytes() == b"content"
    assert calls == ATTEMPTS["IO_ERROR"]


async def test_attributes_set_again_while_a_file_is_transferred(quick_path: Path) -> None:
    """A change of an attribute is a change of the file: what arrives belongs together."""
    engine = Engine(quick_path, WANTED)
    path = engine.source / "file"
    path.write_bytes(b"content")
    give(path, state=b"old")

    def plan(call: Call) -> int | None:
        if call.operation == "get_attributes" and call.nth == 1:
            before = path.stat().st_ctime_ns
            # Until the clock of the file system has ticked.
            while path.stat().st_ctime_ns == before:
                os.setxattr(path, "user.state", b"new")
        return None

    engine.source_plan = plan
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert attributes_of(engine.destination / "file") == {"user.state": b"new"}
    assert "FILE_CHANGED" in engine.codes()


async def test_a_crash_at_any_call_loses_no_attribute(quick_path: Path) -> None:
    """Every third call is the last one once; the first that sets an attribute always is among them."""
    whole = Engine(quick_path / "whole", WANTED)
    scene(whole)
    await whole.run()
    numbers = [call.number for call in whole.calls]
    sets = [call.number for call in whole.calls if call.operation == "set_attribute"]
    crashes = 0
    for number in sorted({*numbers[::6], *sets[::2], *(last + 1 for last in sets[::2])}):

        def plan(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        base = quick_path / f"crash-{number}"
        engine = Engine(base, WANTED, plan=plan)
        scene(engine)
        try:
            await engine.run()
        except Crashed:
            crashes += 1
            for name, found in all_attributes(engine.destination).items():
                path = engine.destination / name
                if path.is_file() and not path.name.startswith(".towpath."):
                    # Whatever has its name has its attributes.
                    assert found == attributes_of(engine.source / name), name
        engine = engine.revived()
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert all_attributes(engine.destination) == all_attributes(engine.source)
        assert not engine.temporaries()
        await trio.lowlevel.checkpoint()
    assert crashes
    print(f"crashes survived: {crashes}")


async def test_large_attributes_of_small_files_keep_within_the_budget(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More was given back than had been taken, each time, until there was no bound to what is on its way."""
    amounts: list[int] = []
    left: list[int] = []
    acquire, release = Budget.acquire, Budget.release

    async def noted(budget: Budget, amount: int) -> None:
        amounts.append(amount)
        await acquire(budget, amount)

    def given_back(budget: Budget, amount: int) -> None:
        release(budget, amount)
        left.append(budget.used)

    monkeypatch.setattr(Budget, "acquire", noted)
    monkeypatch.setattr(Budget, "release", given_back)
    monkeypatch.setattr(PosixRoot, "get_attributes", lambda *_: Found([(b"large", bytes(60 * 1024))]))
    monkeypatch.setattr(PosixRoot, "set_attribute", lambda *_: None)
    engine = Engine(quick_path, WANTED)
    for number in range(1000):
        (engine.source / str(number)).write_bytes(b"")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    # The least that a budget may be.
    assert max(amounts) < 16 * 1024 * 1024
    assert min(left) >= 0
