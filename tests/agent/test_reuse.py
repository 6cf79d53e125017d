"""Large files that changed: what is the same is copied here, what is not is sent, and the result is the source's."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.storage.base import Features, Root
from agent.storage.faulty import Call, FaultyRoot, fail_nth
from agent.transfer.basis.jobs import LargeFile
from agent.transfer.course.run import Run
from agent.transfer.receiving.reuse import SAMPLES, Reuse, spread
from tests.agent.engine_inside import CHECKED, Crashed, Engine, contents, open_files, quick_path, received
from tests.agent.small_disks import Disk, needs_root, unmounting

__all__ = ["quick_path"]

MIB = 1024 * 1024
SIZE = 40 * MIB + 12345
OLD = os.urandom(SIZE)


def flip(body: bytearray) -> None:
    for place in (5 * MIB, 17 * MIB + 1, SIZE - 1):
        body[place] ^= 1


def append(body: bytearray) -> None:
    body += os.urandom(2 * MIB)


def cut(body: bytearray) -> None:
    del body[20 * MIB :]


def touch(_body: bytearray) -> None:
    return


def all_else(body: bytearray) -> None:
    body[:] = os.urandom(SIZE)


CASES = [(flip, 3 * MIB), (append, 3 * MIB), (cut, 0), (touch, 0), (all_else, SIZE)]


@pytest.mark.parametrize(("change", "most"), CASES)
async def test_only_what_differs_is_sent(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], None], most: int
) -> None:
    asked: list[int] = []
    digests = Reuse._digests

    async def counting(self: Reuse, first: int, count: int) -> list[bytes]:
        asked.append(count)
        return await digests(self, first, count)

    monkeypatch.setattr(Reuse, "_digests", counting)
    engine = Engine(quick_path)
    body = bytearray(OLD)
    change(body)
    (engine.source / "file").write_bytes(body)
    (engine.destination / "file").write_bytes(OLD)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert received(engine) <= most
    assert observed.counters.bytes_transferred == len(body)
    assert engine.temporaries() == []
    if change is all_else:
        # Digests of all blocks would cost the source as much as sending them, for nothing.
        assert sum(asked) <= SAMPLES + 1
    print(f"{change.__name__}: {len(body)} bytes, {received} sent, digests asked for: {sum(asked)}")


async def changed(base: Path, **fields: object) -> Engine:
    engine = Engine(base, **fields)  # type: ignore[arg-type]
    body = bytearray(OLD)
    flip(body)
    (engine.source / "file").write_bytes(body)
    (engine.destination / "file").write_bytes(OLD)
    return engine


async def test_crashes_and_faults_on_the_way(quick_path: Path) -> None:
    plain = await changed(quick_path / "plain")
    await plain.run()
    numbers = range(1, len(plain.calls), 37)
    crashes = 0
    for number in numbers:

        def die(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        for plan in (die, fail_nth(number, errno.EIO)):
            engine = await changed(quick_path / f"{number} {plan is die}", plan=plan)
            try:
                await engine.run()
            except Crashed:
                crashes += 1
                assert (engine.destination / "file").read_bytes() in (OLD, (engine.source / "file").read_bytes())
                engine = engine.revived()
                await engine.run()
            assert contents(engine.destination) == contents(engine.source), number
            assert engine.temporaries() == []
    assert crashes > 1
    print(f"calls: {len(plain.calls)}, crashes and faults: {2 * len(numbers)}")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
async def test_a_file_that_failed_is_not_read_to_its_end(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Neither when it is to be tried again nor when the run ends, and nothing of it stays open."""
    taken: list[LargeFile] = []
    take = Reuse._take

    def taking(self: Reuse, root: Root, descriptor: int, index: int, theirs: bytes) -> bool:
        file = self._file
        taken.append(file)
        if taken[0] is file and len(taken) > 1:
            # The first block is being checked, and cannot be.
            give_up = time.monotonic() + 10
            while not (file.failed if code == errno.EIO else self._run.stopping) and time.monotonic() < give_up:
                time.sleep(0.001)
        return take(self, root, descriptor, index, theirs)

    monkeypatch.setattr(Reuse, "_take", taking)
    engine = await changed(quick_path, plan=fail_nth(1, code, "fsync"))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    # One alone where the check was faster than the second.
    assert taken.count(taken[0]) <= 2, [taken.count(file) for file in set(taken)]
    assert not open_files(engine.destination)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=20), st.integers(1, 9))
def test_samples_are_spread_over_what_is_missing(gaps: list[tuple[int, int]], count: int) -> None:
    blocks, start = [], 0
    for gap, length in gaps:
        blocks.append(range(start + gap, start + gap + length))
        start += gap + length
    every = [index for few in blocks for index in few]
    found = spread(blocks, count)
    assert set(found) <= set(every)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (every[0], every[-1])
    assert len(found) <= count + 1


# --- by which way ------------------------------------------------------------------------------------------------


class Sharing(FaultyRoot):
    """A file system that shares blocks, whichever this one is: whole ones only, but for a file's end."""

    def clone_range(self, source: int, target: int, offset: int, length: int) -> None:
        self.script.before("clone_range")
        if offset % 4096 or (length % 4096 and offset + length != os.fstat(source).st_size):
            raise OSError(errno.EINVAL, "")
        os.pwrite(target, os.pread(source, length, offset), offset)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Reuse]:
    made: list[Reuse] = []
    init = Reuse.__init__

    def noting(self: Reuse, run: Run, file: LargeFile) -> None:
        init(self, run, file)
        made.append(self)

    monkeypatch.setattr(Reuse, "__init__", noting)
    return made


def sharing(root: Root) -> Root:
    assert isinstance(root, FaultyRoot)
    return Sharing(root.inner, root.script.plan)


@pytest.mark.parametrize("verify", [True, False])
async def test_blocks_are_shared_where_the_file_system_can(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    made = counted(monkeypatch)
    options = msgspec.structs.replace(CHECKED, verify_checksum=verify)
    engine = await changed(quick_path, options=options, wrap=sharing)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    (reuse,) = made
    assert reuse.shared == reuse.copied == SIZE - 2 * MIB - SIZE % MIB
    assert received(engine) <= 3 * MIB


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
async def test_what_cannot_be_shared_is_copied(quick_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    made = counted(monkeypatch)
    engine = await changed(quick_path, wrap=sharing, plan=lambda c: code if c.operation == "clone_range" else None)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    (reuse,) = made
    assert (reuse.shared, reuse.copied) == (0, SIZE - 2 * MIB - SIZE % MIB)
    tries = sum(call.operation == "clone_range" for call in engine.calls)
    # Only a part is refused with EINVAL, so that the next one is tried again.
    assert tries == (-(-SIZE // MIB) if code == errno.EINVAL else 1)


@pytest.mark.parametrize("code", [0, errno.EXDEV])
async def test_a_file_server_copies_by_itself(quick_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    made = counted(monkeypatch)

    def remote(root: Root) -> Root:
        root.features = Features(file_system="nfs4", local=False)
        return root

    def plan(call: Call) -> int | None:
        if call.operation == "clone_range":
            return errno.EOPNOTSUPP
        return code or None if call.operation == "copy_range" else None

    engine = await changed(quick_path, wrap=remote, plan=plan, short=300_000)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert made[0].copied == SIZE - 2 * MIB - SIZE % MIB
    copies = sum(call.operation == "copy_range" for call in engine.calls)
    assert copies == 1 if code else copies > SIZE // 300_000


@pytest.mark.parametrize("verify", [True, False])
async def test_an_old_file_that_changes_meanwhile_gives_nothing_wrong(quick_path: Path, verify: bool) -> None:
    """Somebody writes to it just before a block is shared, and takes that back before it is looked at."""
    options = msgspec.structs.replace(CHECKED, verify_checksum=verify)
    engine = await changed(quick_path, options=options, wrap=sharing)

    changed_at: list[int] = []

    def write(place: int, content: bytes) -> None:
        with (engine.destination / "file").open("r+b") as file:
            file.seek(place)
            file.write(content)

    def plan(call: Call) -> int | None:
        if call.operation == "clone_range":
            changed_at.append((call.nth - 1) * MIB + 7)
            write(changed_at[-1], b"other")
        elif call.operation == "preadv" and changed_at:
            place = changed_at.pop()
            write(place, OLD[place : place + 5])
        return None

    engine.plan = plan
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


async def test_what_an_interruption_left_undone_is_not_sent_either(quick_path: Path) -> None:
    """The rest of a file is looked for in the old one, too, when the task goes on."""

    def plan(call: Call) -> int | None:
        # Of the checks of a few blocks, the third.
        if call.operation == "fsync" and call.nth == 3:
            raise Crashed
        return None

    engine = await changed(quick_path, plan=plan)
    with pytest.raises(Crashed):
        await engine.run()
    before = received(engine)
    engine = engine.revived()
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert received(engine) <= before + 3 * MIB


@needs_root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
async def test_blocks_are_shared_on_real_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The new file takes as much of the disk as it differs, while the old one is still there under another name."""
    place = tmp_path / "disk"
    made = counted(monkeypatch)
    disk = Disk(tmp_path / "image", kind, 400)
    with unmounting(place):
        disk.mount(place)
        engine = await changed(tmp_path)
        engine.destination = place
        (place / "file").write_bytes(OLD)
        (place / "before").hardlink_to(place / "file")
        used = used_of(place)
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert (place / "file").read_bytes() == (engine.source / "file").read_bytes()
        assert (place / "before").read_bytes() == OLD
        assert made[0].shared == made[0].copied == SIZE - 2 * MIB - SIZE % MIB
        more = used_of(place) - used
        assert more < 8 * MIB
        print(f"{kind}: {SIZE} bytes, {made[0].shared} shared, {more} more on the disk")


def used_of(place: Path) -> int:
    subprocess.run(["sync", "-f", place], check=True)
    status = os.statvfs(place)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
