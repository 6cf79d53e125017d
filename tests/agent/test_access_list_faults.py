"""Access lists where storage fails, refuses or is cut off: none lost, nothing opened, and what is left out is said."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.storage import access_lists, attributes
from agent.storage.access_lists import (
    AccessList,
    FoundLists,
)
from agent.storage.faulty import Call, Plan, fail_nth
from agent.storage.node import version_of
from agent.storage.posix import PosixRoot, open_root
from agent.transfer.asking.budget import SMALLEST_CHARGE, Budget
from agent.transfer.asking.source_session import ANSWER_TIMEOUT
from agent.transfer.basis.jobs import FileJob
from agent.transfer.basis.kept_lists import within_folder
from agent.transfer.basis.patience import ATTEMPTS
from agent.transfer.receiving.retries import Retries
from agent.transfer.source.source_attributes import read_attributes
from protocol import session
from protocol.control import TaskItem, TaskOptions
from protocol.errors import TowpathError
from tests.agent.access_list_scene import (
    BOB,
    DEFAULT,
    MIB,
    READS,
    WANTED,
    give,
    kept,
    lists,
    scene,
)
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path

__all__ = ["quick_path"]


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
    assert told and all(details.startswith(f"/{subject} at the source ") for details in told), told


async def test_of_many_that_cannot_be_read_few_wait_at_once(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole tree of them waited at once, each with a task of its own."""
    engine = kept(Engine(quick_path, WANTED))
    for number in range(40):
        (engine.source / str(number)).write_bytes(b"content")
    monkeypatch.setattr("agent.transfer.transfer_run.Budget", partial(Budget, 5 * SMALLEST_CHARGE))
    monkeypatch.setattr(Budget, "resize", lambda *_: None)
    waiting = most = 0
    retry = Retries._retry

    async def counted(retries: Retries, job: FileJob, error: TowpathError) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        try:
            await retry(retries, job, error)
        finally:
            waiting -= 1

    monkeypatch.setattr(Retries, "_retry", counted)
    monkeypatch.setattr(PosixRoot, "get_access_lists", lists_of_folders)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 40), observed
    # One more than there is room for, while it hands over to itself.
    # Each begins the next attempt of its file before it ends.
    assert 1 < most <= 10


def lists_of_folders(_root: PosixRoot, fd: int) -> FoundLists:
    """Those of files cannot be read."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        return access_lists.read(fd)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_source_answers_before_the_destination_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it has read by then; the destination asks for the rest. A file server that takes its time for each file
    made every session end, and the task begin anew without end."""
    files = []
    for number in range(50):
        path = tmp_path / str(number)
        path.touch()
        files.append(session.AttributesOf(os.fsencode(path.name), version_of(path.stat())))
    now = 0.0

    def slow(_root: PosixRoot, _fd: int) -> FoundLists:
        nonlocal now
        now += 4.0
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(PosixRoot, "get_access_lists", slow)
    monkeypatch.setattr("agent.transfer.source.source_attributes.time", SimpleNamespace(monotonic=lambda: now))
    request = session.ReadAttributes(1, files, False, False, True)
    with open_root(str(tmp_path)) as root:
        answer = read_attributes(root, request, lambda path: (path,))
    assert len(answer.files) == 3
    assert now < ANSWER_TIMEOUT


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


def group_files(engine: Engine) -> list[str]:
    """Files in whose modes an access list's mask may hide, small and large, in a folder, named alone, and behind a
    link; one has a list."""
    names = ["folder/small", "folder/large", "folder/listed"]
    (engine.source / "folder").mkdir()
    for name in names:
        (engine.source / name).write_bytes(os.urandom(MIB + 5 if name.endswith("large") else 100))
        (engine.source / name).chmod(0o640)
    give(engine.source / "folder" / "listed", AccessList(6, 0, 0, ((BOB, 4),), mask=4))
    (engine.source / "alone").write_bytes(b"alone")
    (engine.source / "alone").chmod(0o640)
    (engine.source / "link").symlink_to("folder/small")
    return [*names, "alone", "link"]


FOLLOWED = [
    TaskItem(source_path="/folder", destination_path="/folder", recursive=True),
    TaskItem(source_path="/alone", destination_path="/alone"),
    TaskItem(source_path="/", destination_path="/", recursive=True),
]
MODES = {"folder/small": 0o640, "folder/large": 0o640, "folder/listed": 0o600, "alone": 0o640, "link": 0o640}


def modes(engine: Engine) -> dict[str, int]:
    return {name: (engine.destination / name).stat().st_mode & 0o777 for name in MODES}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EMFILE], ids=errno.errorcode.get)
async def test_a_fault_that_passes_while_folders_are_listed_narrows_no_mode(quick_path: Path, code: int) -> None:
    """Whichever look at a file's list it is, the file is asked about again, alone."""
    failed = 0
    while True:
        engine = Engine(quick_path / str(failed), TaskOptions(recursive_symlinks="copy"), FOLLOWED)
        group_files(engine)
        engine.source_plan = fail_nth(failed + 1, code, "mode_without_list")
        observed = await engine.run()
        assert (observed.state, observed.counters.acls_not_kept) == ("SUCCEEDED", 0), observed
        assert modes(engine) == MODES, failed
        if "IO_ERROR" not in engine.codes():
            break
        failed += 1
    assert failed >= len(MODES)
    print(f"{errno.errorcode[code]}: {failed} looks failed, one a run")


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
async def test_a_list_that_can_never_be_looked_at_narrows_its_file_and_says_so(quick_path: Path, code: int) -> None:
    engine = Engine(quick_path, TaskOptions(recursive_symlinks="copy"), FOLLOWED[2:])
    group_files(engine)
    engine.source_plan = fail_nth(1, code, "mode_without_list", times=0)
    observed = await engine.run()
    assert (observed.state, observed.counters.acls_not_kept) == ("SUCCEEDED", len(MODES)), observed
    assert modes(engine) == dict.fromkeys(MODES, 0o600)
    assert engine.codes().count("ACCESS_LISTS_NOT_KEPT") == 1
    assert engine.codes().count("IO_ERROR") == ((ATTEMPTS["IO_ERROR"] - 1) * len(MODES) if code == errno.EIO else 0)


@pytest.mark.parametrize("found", [b"", b"\2\0\0\0", b"\3\0\0\0" + bytes(24)])
async def test_a_list_that_cannot_be_understood_narrows_its_file_and_says_so(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, found: bytes
) -> None:
    """As a file system may have that is a program, and checks none."""
    engine = Engine(quick_path, TaskOptions(recursive_symlinks="copy"), FOLLOWED[2:])
    group_files(engine)
    monkeypatch.setattr(attributes, "_list_of", lambda _file: found)
    observed = await engine.run()
    assert (observed.state, observed.counters.acls_not_kept) == ("SUCCEEDED", len(MODES)), observed
    assert modes(engine) == dict.fromkeys(MODES, 0o600)
    assert engine.codes().count("ACCESS_LISTS_NOT_KEPT") == 1
    assert set(engine.codes()) == {"STARTED", "ACCESS_LISTS_NOT_KEPT", "SUCCEEDED"}


def test_without_proc_a_list_is_looked_at_in_the_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getxattr

    def without(file: object, name: bytes, *, follow_symlinks: bool = True) -> bytes:
        if isinstance(file, bytes):
            raise FileNotFoundError(errno.ENOENT, "")
        return real(file, name)  # type: ignore[arg-type]

    (tmp_path / "listed").touch(0o600)
    (tmp_path / "listed").chmod(0o660)
    give(tmp_path / "listed", AccessList(6, 4, 0, ((BOB, 6),), mask=6))
    with open_root(str(tmp_path)) as root, root.open_directory(()) as folder:
        monkeypatch.setattr(os, "getxattr", without)
        assert folder.mode_without_list(folder.lstat(b"listed")) == 0o640
