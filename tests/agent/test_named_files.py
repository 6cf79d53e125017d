"""Everything dies between the rename of a large file and the journal's word of it: nothing of the file is sent again,
and nothing is taken for it that is not this very file."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from agent.storage import attributes
from agent.storage.access_lists import AccessList
from agent.storage.faulty import Call, Plan, no_faults
from agent.transfer.asking import arrivals
from agent.transfer.asking.source_session import SourceSession
from agent.transfer.basis import holes
from agent.transfer.basis.jobs import LargeFile
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import TransferredRow, read_page
from protocol.control import Counters, TaskItem, TaskOptions
from tests.agent.engine_inside import CHECKED, WHOLE, Crashed, Engine, contents, quick_path, received

__all__ = ["quick_path"]

MIB = 1024 * 1024
# Below what `agent.transfer.receiving.reuse` asks about, so that whatever is not recognised is sent.
SIZE = 12 * MIB + 17


@pytest.fixture(autouse=True)
def _one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are checked, and noted in the journal, one by one, however many have come meanwhile."""

    def first_of_unchecked(file: LargeFile) -> dict[int, bytes]:
        with file.lock:
            index = next(iter(file.unchecked), None)
            return {} if index is None else {index: file.unchecked.pop(index)}

    monkeypatch.setattr(LargeFile, "take_unchecked", first_of_unchecked)
    monkeypatch.setattr(arrivals, "CHECK_AFTER", MIB)
    monkeypatch.setattr("agent.transfer.settling.settle.BATCH_BYTES", MIB)
    monkeypatch.setattr("agent.transfer.receiving.large_files.MEMORY_RANGE", 2 * MIB)


def dies_after_renaming(nth: int) -> Plan:
    """The n-th call after the first rename is not made any more."""
    calls = 0

    def plan(call: Call) -> int | None:
        nonlocal calls
        if calls == nth:
            raise Crashed
        if calls or call.operation == "rename":
            calls += 1
        return None

    return plan


LIST = "system.posix_acl_access"


def give_list(path: Path, may: int = 4) -> None:
    """A list that names an account of nobody, which shows the mode that the file has."""
    try:
        os.setxattr(path, LIST, AccessList(6, 4, 0, users=((54321, may),), mask=4).packed())
    except OSError as error:
        pytest.skip(f"this file system keeps no access lists: {error}")


def fill(engine: Engine) -> None:
    path = engine.source / "large"
    path.write_bytes(os.urandom(SIZE))
    path.chmod(0o640)
    if attributes.usable():
        os.setxattr(path, "user.note", b"a note")
    os.utime(path, ns=(0, 1_600_000_000_123_456_789))


def refusing(operation: str, code: int, plan: Plan = no_faults) -> Plan:
    """Each call of this operation is refused; the others go as planned."""
    return lambda call: code if call.operation == operation else plan(call)


async def named(
    base: Path,
    options: TaskOptions = CHECKED,
    items: list[TaskItem] = WHOLE,
    *,
    names: Sequence[str] = (),
    refused: str = "",
) -> Engine:
    """An engine that died when a large file had been renamed, with a part of it in its journal; what is ``refused`` was
    so until then."""
    engine = Engine(base, options, items, plan=refusing(refused, errno.EPERM, dies_after_renaming(1)))
    engine.numbers = options.preserve_acls
    fill(engine)
    if options.preserve_acls:
        give_list(engine.source / "large")
    for name in names:
        os.link(engine.source / "large", engine.source / name)
    with pytest.raises(Crashed):
        await engine.run()
    # Of several names, the one that leads.
    (path,) = engine.destination.iterdir()
    assert path.read_bytes() == (engine.source / "large").read_bytes()
    with closing(Journal(engine.state / "journal.sqlite")) as journal:
        parts = journal.partial_temporaries(1) | journal.partial_temporaries(-1)
    assert parts, "the journal knows no part: there is nothing to be found out"
    return engine


async def finished(engine: Engine, *, again: bool = False, plan: Plan = no_faults, **counted: int) -> Engine:
    """What comes after: it ends well, and the content of the file comes ``again`` or not."""
    before = received(engine)
    after = engine.revived(plan)
    after.numbers = engine.numbers
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)
    status, theirs = (after.destination / "large").stat(), (after.source / "large").stat()
    assert (status.st_mode, status.st_nlink) == (theirs.st_mode, theirs.st_nlink)
    if after.options.preserve_timestamp:
        assert status.st_mtime_ns == theirs.st_mtime_ns
    assert after.temporaries() == []
    assert ("PART_LOST" in after.codes()) is again
    sent = received(after) - before
    assert sent == SIZE if again else sent == 0
    check_books(after, observed.counters)
    assert {name: getattr(observed.counters, name) for name in counted} == counted
    assert observed.counters.bytes_sent_again <= (SIZE if again else 0)
    return after


def check_books(engine: Engine, counters: Counters) -> None:
    """Everything counted once."""
    names = sorted(os.fsencode(path.name) for path in engine.source.iterdir())
    assert (counters.files, counters.files_transferred, counters.files_skipped) == (len(names), len(names), 0)
    checked = SIZE if engine.options.verify_checksum else 0
    assert (counters.bytes_total, counters.bytes_transferred, counters.bytes_checksummed) == (SIZE, SIZE, checked)
    rows = read_page(engine.state / "transferred.manifest", TransferredRow, None, 10).rows
    assert sorted(row.destination for row in rows) == names


WISHES = {
    "checked": {},
    "not checked": {"verify_checksum": False},
    "times not kept": {"preserve_timestamp": False},
    "attributes": {"preserve_xattrs": True},
}


@pytest.mark.parametrize("wishes", WISHES)
async def test_it_is_found_and_written_down(quick_path: Path, wishes: str) -> None:
    engine = await named(quick_path, msgspec.structs.replace(CHECKED, **WISHES[wishes]))
    inode = (engine.destination / "large").stat().st_ino
    await finished(engine)
    assert (engine.destination / "large").stat().st_ino == inode
    if wishes == "attributes" and attributes.usable():
        assert os.getxattr(engine.destination / "large", "user.note") == b"a note"


async def test_a_crash_at_any_later_call_costs_nothing(quick_path: Path) -> None:
    """Whatever the last call was, also when it comes while the file is being looked at."""
    crashes = 0
    for number in range(1, 100):
        engine = Engine(quick_path / str(number), plan=dies_after_renaming(number))
        fill(engine)
        try:
            await engine.run()
            break
        except Crashed:
            crashes += 1
        engine = engine.revived(_dies_at(5 * number))
        try:
            observed = await engine.run()
        except Crashed:
            crashes += 1
            engine = engine.revived()
            observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert contents(engine.destination) == contents(engine.source)
        assert received(engine) == SIZE, f"a crash {number} calls after the rename"
    assert crashes > 3
    print(f"crashes survived: {crashes}")


def _dies_at(number: int) -> Plan:
    def plan(call: Call) -> int | None:
        if call.number == number:
            raise Crashed
        return None

    return plan


async def test_its_other_names_come_as_such(quick_path: Path) -> None:
    options = msgspec.structs.replace(CHECKED, preserve_hard_links=True)
    engine = await named(quick_path, options, names=["more", "still more"])
    after = await finished(engine)
    assert len({path.stat().st_ino for path in after.destination.iterdir()}) == 1


@pytest.mark.parametrize("right", [True, False])
async def test_a_published_checksum_is_listed(quick_path: Path, right: bool) -> None:
    item = TaskItem(source_path="/large", destination_path="/large", checksum_algorithm="SHA256")
    engine = await named(quick_path, items=[item])
    value = hashlib.sha256((engine.source / "large").read_bytes()).hexdigest()
    engine.items = [msgspec.structs.replace(item, external_checksum=value if right else "0" * 64)]
    if right:
        after = await finished(engine)
        (row,) = read_page(after.state / "transferred.manifest", TransferredRow, None, 10).rows
        assert (row.checksum, row.algorithm) == (value, "SHA256")
    else:
        observed = await engine.revived().run()
        assert (observed.state, observed.counters.failed, observed.counters.files_transferred) == ("FAILED", 1, 0)


def _same_time(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changing(path: Path) -> None:
        before = path.stat()
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    changing.__name__ = change.__name__
    return changing


def older_version(path: Path) -> None:
    path.write_bytes(os.urandom(SIZE))


def last_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(SIZE - 1)
        last = file.read(1)
        file.seek(SIZE - 1)
        file.write(bytes([last[0] ^ 1]))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def removed(path: Path) -> None:
    path.unlink()


def touched(path: Path) -> None:
    os.utime(path)


def other_mode(path: Path) -> None:
    path.chmod(0o600)


def other_name(path: Path) -> None:
    os.link(path, path.parent.parent / "kept by somebody")


def link(path: Path) -> None:
    path.rename(path.parent.parent / "moved away")
    path.symlink_to(path.parent.parent / "moved away")


CHANGES = [_same_time(older_version), _same_time(last_byte), _same_time(longer), removed, touched, other_mode]
CHANGES += [other_name, link]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_what_is_not_this_very_file_is_replaced(quick_path: Path, change: Callable[[Path], None]) -> None:
    engine = await named(quick_path)
    change(engine.destination / "large")
    await finished(engine, again=True)


async def test_a_longer_file_of_the_same_blocks_is_replaced(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SIZE", 12 * MIB)
    engine = await named(quick_path)
    _same_time(longer)(engine.destination / "large")
    await finished(engine, again=True)


@pytest.mark.parametrize("still", [True, False])
async def test_attributes_that_were_refused_cost_no_content(quick_path: Path, still: bool) -> None:
    """They are given once more; what is refused again is counted, once."""
    if not attributes.usable():
        pytest.skip("this system has no extended attributes")
    options = msgspec.structs.replace(CHECKED, preserve_xattrs=True)
    engine = await named(quick_path, options, refused="set_attribute")
    after = await finished(
        engine, plan=refusing("set_attribute" if still else "", errno.EPERM), xattrs_left_out=int(still)
    )
    assert os.listxattr(after.destination / "large") == ([] if still else ["user.note"])
    assert "ATTRIBUTES_LEFT_OUT" in after.codes()


@pytest.mark.parametrize("still", [True, False])
async def test_a_list_that_was_refused_costs_no_content(quick_path: Path, still: bool) -> None:
    options = msgspec.structs.replace(CHECKED, preserve_acls=True)
    engine = await named(quick_path, options, refused="set_access_list")
    assert LIST not in os.listxattr(engine.destination / "large")
    after = await finished(
        engine,
        plan=refusing("set_access_list" if still else "", errno.EPERM),
        acls_kept=int(not still),
        acls_refused=int(still),
    )
    assert (LIST in os.listxattr(after.destination / "large")) is not still


async def test_a_list_that_was_kept_costs_no_content(quick_path: Path) -> None:
    engine = await named(quick_path, msgspec.structs.replace(CHECKED, preserve_acls=True))
    after = await finished(engine, acls_kept=1)
    assert LIST in os.listxattr(after.destination / "large")


async def test_a_list_of_somebody_else_is_not_this_files(quick_path: Path) -> None:
    engine = await named(quick_path, msgspec.structs.replace(CHECKED, preserve_acls=True))
    give_list(engine.destination / "large", 6)
    after = await finished(engine, again=True)
    assert os.getxattr(after.destination / "large", LIST) == os.getxattr(after.source / "large", LIST)


async def test_a_source_that_says_no_digests_sends_it_again(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await named(quick_path)
    monkeypatch.setattr("agent.transfer.receiving.named_files.BLOCK_DIGESTS", "an ability nobody has")
    await finished(engine, again=True)


async def test_a_passing_fault_does_not_cost_the_file(quick_path: Path) -> None:
    engine = await named(quick_path)
    failed: list[Call] = []

    def plan(call: Call) -> int | None:
        if (call.operation, call.name) == ("open_temporary", b"large") and not failed:
            failed.append(call)
            return errno.EIO
        return None

    await finished(engine, plan=plan)
    assert failed


async def test_holes_are_not_read(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sparse file only what holds data is digested, else a terabyte of nothing would take an hour."""
    size = 10**12
    pieces = {0: os.urandom(3 * MIB), size // 2: os.urandom(2 * MIB)}
    asked: list[int] = []
    digests = SourceSession.block_digests

    async def counting(*arguments: object, **named: object) -> list[bytes]:
        asked.append(arguments[5])  # type: ignore[arg-type]
        return await digests(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(SourceSession, "block_digests", counting)
    engine = Engine(quick_path, plan=dies_after_renaming(1))
    try:
        for folder in (engine.source, engine.destination):
            with (folder / "large").open("wb") as file:
                file.truncate(size)
                if holes.data_extents(file.fileno(), size):
                    pytest.skip("this file system keeps no holes")
    except OSError:
        pytest.skip("this file system holds no such file")
    (engine.destination / "large").unlink()
    with (engine.source / "large").open("r+b") as file:
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)
    with pytest.raises(Crashed):
        await engine.run()
    before = received(engine)
    after = engine.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert received(after) == before
    assert "PART_LOST" not in after.codes()
    assert (observed.counters.bytes_transferred, observed.counters.bytes_sent_again) == (size, 0)
    assert 0 < sum(asked) <= 10
    with (after.destination / "large").open("rb") as file:
        assert all(os.pread(file.fileno(), len(data), offset) == data for offset, data in pieces.items())
