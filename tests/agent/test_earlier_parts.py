"""What had arrived of a large file that is another version by now, or seems to be: the same blocks are not sent again,
and no other block counts, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from agent.storage import page_cache
from agent.storage.faulty import Call, Plan, no_faults
from agent.transfer.basis.jobs import count_done
from agent.transfer.basis.journal_rows import PartialRow
from agent.transfer.books.journal import Journal
from protocol.control import TaskOptions
from tests.agent.died_with_parts import after_blocks, settled
from tests.agent.engine_inside import CHECKED, Crashed, Engine, contents, open_files, quick_path, received, sparse
from tests.agent.small_disks import Disk, needs_root, unmounting

__all__ = ["quick_path"]

MIB = 1024 * 1024
SIZE = 60 * MIB + 12345


async def half_arrived(
    base: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, processes: int = 0, blocks: int = 16
) -> Engine:
    engine = Engine(base, plan=after_blocks(monkeypatch, blocks), processes=processes)
    (engine.source / "file").write_bytes(body)
    with pytest.raises(Crashed):
        await engine.run()
    assert settled(engine) >= 16 * MIB
    return engine


def touched(body: bytearray) -> bytearray:
    return body


def flipped(body: bytearray) -> bytearray:
    body[5 * MIB] ^= 1
    return body


def appended(body: bytearray) -> bytearray:
    return body + os.urandom(2 * MIB)


def cut_short(body: bytearray) -> bytearray:
    return body[: 20 * MIB + 7]


def all_other(body: bytearray) -> bytearray:
    return bytearray(os.urandom(len(body)))


# What may be sent again of what was settled.
CASES = [(touched, 0), (flipped, MIB), (appended, MIB), (cut_short, MIB), (all_other, SIZE)]


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(("change", "most"), CASES)
async def test_only_what_differs_is_sent_again(
    quick_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytearray], bytearray],
    most: int,
    processes: int,
) -> None:
    body = bytearray(os.urandom(SIZE))
    before = await half_arrived(quick_path, monkeypatch, body, processes)
    came, kept = received(before), settled(before)
    after = before.revived()
    new = change(bytearray(body))
    (after.source / "file").write_bytes(new)
    observed = await after.run()
    assert (observed.state, observed.counters.faults) == ("SUCCEEDED", 0), (observed, after.codes())
    assert contents(after.destination) == contents(after.source)
    assert observed.counters.bytes_transferred == len(new)
    assert received(after) - came <= max(len(new) - kept, 0) + most
    assert after.temporaries() == []
    assert open_files(quick_path) == []


async def test_what_changes_while_it_is_read_keeps_what_has_arrived(quick_path: Path) -> None:
    """A log that is written to all day came anew, all of it, after each line."""
    lines: list[int] = []

    def grow(call: Call) -> None:
        if call.operation == "preadv" and call.nth in (40, 75):
            lines.append(call.nth)
            with (engine.source / "file").open("ab") as file:
                file.write(b"one more line\n")

    engine = Engine(quick_path, source_plan=grow)
    (engine.source / "file").write_bytes(os.urandom(SIZE))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert len(lines) == 2
    assert "FILE_CHANGED" in engine.codes()
    assert contents(engine.destination) == contents(engine.source)
    assert received(engine) < 2 * SIZE


class TwoVersions:
    """A folder of the source that is one of two; each file stays what it was, as when another disk is mounted."""

    def __init__(self, base: Path, *, alike: bool) -> None:
        self.base = base
        self.bodies = [bytearray(os.urandom(SIZE)) for _ in range(2)]
        if alike:
            # The first half is the same, but for something in it.
            self.bodies[1][: SIZE // 2] = self.bodies[0][: SIZE // 2]
            self.bodies[1][9 * MIB] ^= 1
        for number, body in enumerate(self.bodies):
            (base / f"source-{number}").mkdir()
            (base / f"source-{number}" / "file").write_bytes(body)
        self.mounted = -1

    def mount(self, number: int) -> None:
        source = self.base / "source"
        if self.mounted >= 0:
            source.rename(self.base / f"source-{self.mounted}")
        elif source.exists():
            source.rmdir()
        (self.base / f"source-{number}").rename(source)
        self.mounted = number


def at_step(step: int) -> Plan:
    def die(call: Call) -> int | None:
        if call.number >= step:
            raise Crashed
        return None

    return die


SEEDS = [pytest.param(seed, marks=pytest.mark.soak if seed >= 12 else ()) for seed in range(48)]


@pytest.mark.parametrize("seed", SEEDS)
async def test_versions_that_take_turns_are_never_mixed(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What was written for one version must not count for the other one when that is back, as it was."""
    chance = random.Random(seed)
    versions = TwoVersions(quick_path, alike=seed % 2 == 0)
    options = chance.choice([CHECKED, TaskOptions(preserve_timestamp=True)])
    plan = after_blocks(monkeypatch, chance.randrange(2, 40))
    engine = Engine(quick_path, options, plan=plan, processes=chance.randrange(2))
    observed = None
    for turn in range(20):
        versions.mount(turn % 2)
        with suppress(Crashed):
            observed = await engine.run()
            break
        # Half of them end with the version they began with.
        lives = turn == 1 and seed % 4 < 2
        engine = engine.revived(no_faults if lives else at_step(chance.randrange(10, 100 + 60 * turn)))
    assert observed is not None
    assert observed.state == "SUCCEEDED", (seed, observed)
    # It may have had its name, as it was then, before the last one came.
    assert (engine.destination / "file").read_bytes() in versions.bodies, seed
    assert engine.temporaries() == []


async def test_a_fault_while_it_is_compared_loses_nothing(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = os.urandom(SIZE)
    for operation in ("preadv", "ftruncate", "open_temporary", "journal_commit"):
        before = await half_arrived(quick_path / operation, monkeypatch, body)
        failed: list[str] = []

        def fail(call: Call, operation: str = operation, failed: list[str] = failed) -> int | None:
            if call.operation == operation and not failed:
                failed.append(operation)
                return errno.EIO
            return None

        after = before.revived(fail)
        (after.source / "file").write_bytes(body[: SIZE - 3 * MIB])
        observed = await after.run()
        assert observed.state == "SUCCEEDED", (operation, observed)
        assert contents(after.destination) == contents(after.source)
        assert after.temporaries() == []


@pytest.mark.parametrize("operation", ["part_mark", "ftruncate"])
async def test_a_part_that_cannot_be_gone_on_with_fails_no_file(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    body = os.urandom(SIZE)
    before = await half_arrived(quick_path, monkeypatch, body)
    (part,) = before.temporaries()
    after = before.revived(lambda call: errno.EIO if call.operation == operation and os.path.exists(part) else None)
    (after.source / "file").write_bytes(body[: 16 * MIB])
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)
    assert after.temporaries() == []


async def test_holes_that_were_data_before_are_empty(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is a hole now, and was sent before, must not keep what it was."""
    size = 100 * MIB
    before = await half_arrived(quick_path, monkeypatch, os.urandom(size))
    after = before.revived()
    path = after.source / "file"
    path.unlink()
    sparse(path, size, {90 * MIB: os.urandom(MIB)})
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)


@pytest.mark.parametrize("close_fails", [False, True])
async def test_attributes_of_an_earlier_version_do_not_stay(quick_path: Path, close_fails: bool) -> None:
    options = TaskOptions(verify_checksum=True, preserve_timestamp=True, preserve_xattrs=True)
    engine = Engine(quick_path, options)
    path = engine.source / "file"
    path.write_bytes(os.urandom(SIZE))
    try:
        os.setxattr(path, "user.old", b"1")
    except OSError:
        pytest.skip("the file system has no attributes of users")
    part = await unnamed(engine)
    assert os.listxattr(part) == ["user.old"]
    os.removexattr(path, "user.old")
    os.setxattr(path, "user.new", b"1")
    failed: list[int] = []

    def fail(call: Call) -> int | None:
        if call.operation != "close_file" or not close_fails or failed:
            return None
        failed.append(call.number)
        return errno.EIO

    after = engine.revived(fail)
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    # A descriptor that was closed once more may be another file's by then.
    assert after.codes().count("IO_ERROR") == len(failed)
    assert os.listxattr(after.destination / "file") == ["user.new"]
    assert contents(after.destination) == contents(after.source)


@needs_root
async def test_a_disk_that_is_mounted_again_under_another_number_costs_nothing(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Btrfs, file servers and external disks are after a restart of the machine."""
    place, other = quick_path / "source", quick_path / "other"
    with unmounting(place), unmounting(other):
        disk = Disk(quick_path / "image", megabytes=128)
        disk.mount(place)
        body = os.urandom(SIZE)
        before = await half_arrived(quick_path, monkeypatch, body)
        came, kept = received(before), settled(before)
        first = place.stat().st_dev
        subprocess.run(["umount", place], check=True)
        # Whatever had the number has it still, in the place of another disk.
        Disk(quick_path / "another").mount(other)
        disk.mount(place)
        if place.stat().st_dev == first:
            pytest.skip("the disk has its number again")
        after = before.revived()
        observed = await after.run()
        assert (observed.state, observed.counters.faults) == ("SUCCEEDED", 0), (observed, after.codes())
        assert (after.destination / "file").read_bytes() == body
        assert received(after) - came <= SIZE - kept


async def unnamed(engine: Engine) -> Path:
    """All of the file has arrived, and it dies before the file has its name."""

    def die(call: Call) -> int | None:
        if (call.operation, call.name) == ("rename", b"file"):
            raise Crashed
        return None

    engine.plan = die
    with pytest.raises(Crashed):
        await engine.run()
    (part,) = engine.temporaries()
    return Path(part)


async def test_a_part_is_nobody_elses_to_read_while_a_private_version_comes(quick_path: Path) -> None:
    """What everybody could read has become private since."""
    before = Engine(quick_path)
    path, body = before.source / "file", os.urandom(SIZE)
    path.write_bytes(body)
    path.chmod(0o644)
    part = await unnamed(before)
    assert part.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    path.write_bytes(body[: 40 * MIB] + os.urandom(SIZE - 40 * MIB))
    modes: list[int] = []

    def look(call: Call) -> None:
        if call.operation == "pwrite":
            modes.append(part.stat().st_mode & 0o777)

    after = before.revived(look)
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert set(modes) == {0o600}
    assert contents(after.destination) == contents(after.source)


async def test_a_block_that_is_right_in_memory_alone_is_not_taken_over(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of blocks that it could not write only once, and keeps them in memory as they should be."""
    body = os.urandom(SIZE)
    options = TaskOptions(verify_checksum=False, preserve_timestamp=True)
    before = Engine(quick_path, options, plan=after_blocks(monkeypatch, 16))
    (before.source / "file").write_bytes(body)
    with pytest.raises(Crashed):
        await before.run()
    lost = [5 * MIB]

    def forget(descriptor: int, _offset: int = 0, _length: int = 0) -> None:
        while lost:
            os.pwrite(descriptor, bytes(MIB), lost.pop())

    monkeypatch.setattr(page_cache, "forget", forget)
    after = before.revived()
    (after.source / "file").write_bytes(body)
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    # All that is left of memory.
    with (after.destination / "file").open("r+b") as file:
        forget(file.fileno())
    assert contents(after.destination) == contents(after.source)


async def test_what_was_cut_off_is_not_in_holes_after_a_power_failure(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file becomes shorter, and then longer again with holes where it had data before."""
    size, short = 100 * MIB, 17 * MIB
    body = os.urandom(size)
    before = await half_arrived(quick_path, monkeypatch, body, blocks=40)
    (part,) = map(Path, before.temporaries())
    (before.source / "file").write_bytes(body[:short])
    # What the disk still has of it until it is synced.
    on_disk: list[bytes] = []

    def cutting(call: Call) -> int | None:
        if call.operation == "ftruncate":
            on_disk.append(part.read_bytes())
        elif call.operation == "fsync":
            on_disk.clear()
        elif call.operation == "preadv":
            raise Crashed
        return None

    cut = before.revived(cutting)
    with pytest.raises(Crashed):
        await cut.run()
    assert part.stat().st_size == short
    path = cut.source / "file"
    path.unlink()
    sparse(path, size, {size - MIB: os.urandom(MIB)})
    put, kept = Journal.put_partial, False

    def putting(journal: Journal, directory: int, name: bytes, row: PartialRow) -> None:
        nonlocal kept
        put(journal, directory, name, row)
        if count_done(row.done):
            # As any other file that is settled has it.
            journal.commit()
            kept = True

    def growing(call: Call) -> int | None:
        if call.operation == "fsync":
            on_disk.clear()
        if kept:
            raise Crashed
        return None

    monkeypatch.setattr(Journal, "put_partial", putting)
    grown = cut.revived(growing)
    grown.source_plan = lambda call: errno.EIO if call.operation == "preadv" else None
    with pytest.raises(Crashed):
        await grown.run()
    monkeypatch.setattr(Journal, "put_partial", put)
    if on_disk:
        part.write_bytes(on_disk[0])
    after = grown.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)


async def test_an_agent_of_before_finds_no_holes_in_a_part_of_another_version(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To it, a part of which nothing is done was a new one."""
    size = 100 * MIB
    before = await half_arrived(quick_path, monkeypatch, os.urandom(size))
    path = before.source / "file"
    path.unlink()
    sparse(path, size, {90 * MIB: os.urandom(MIB)})

    def die(call: Call) -> int | None:
        if call.operation == "preadv":
            raise Crashed
        return None

    taken = before.revived(die)
    with pytest.raises(Crashed):
        await taken.run()
    get = Journal.get
    monkeypatch.setattr(Journal, "get", lambda self, key: None if key.startswith("earlier ") else get(self, key))
    after = taken.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(after.destination) == contents(after.source)
    assert after.temporaries() == []
