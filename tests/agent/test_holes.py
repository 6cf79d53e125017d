"""Sparse files: holes are not sent, stay holes, and cost neither time nor room."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.storage.faulty import Call
from agent.transfer.asking import arrivals
from agent.transfer.basis.compare import block_count, block_size, missing_ranges
from agent.transfer.basis.holes import check_extents_untrusted, data_extents, mark_holes, sparse_block
from agent.transfer.basis.jobs import empty_bitmap
from protocol.errors import ProtocolError
from tests.agent.engine_inside import Crashed, Engine, quick_path, received, sparse

__all__ = ["quick_path"]

MIB = 1024 * 1024
GIB = 1024 * MIB


def supports(folder: Path, size: int) -> bool:
    probe = folder / "probe"
    try:
        sparse(probe, size, {size - 1: b"x"})
        return probe.stat().st_blocks * 512 < MIB
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(0, 199), max_size=6), st.integers(1, 8))
def test_only_blocks_without_data_are_marked(size: int, places: list[int], block: int) -> None:
    wanted = sorted({place for place in places if place < size})
    extents = [(place, 1) for place in wanted]
    done = bytearray((block_count(size, block) + 7) // 8)
    marked = mark_holes(done, extents, size, block)
    holes = {index for index in range(block_count(size, block)) if done[index >> 3] >> (index & 7) & 1}
    last = block_count(size, block) - 1
    assert holes == {index for index in range(last) if not any(place // block == index for place in wanted)}
    assert marked == len(holes) * block
    asked = [
        index
        for offset, length in missing_ranges(done, size, block, 3 * block)
        for index in range(offset // block, -(-(offset + length) // block))
    ]
    assert asked == [index for index in range(last + 1) if index not in holes]


@pytest.mark.parametrize("extents", [[(-1, 2)], [(0, 0)], [(0, 11)], [(5, 2), (6, 1)], [(5, -1)], [(2**70, 1)]])
def test_parts_that_cannot_be_are_refused(extents: list[tuple[int, int]]) -> None:
    with pytest.raises(ProtocolError):
        check_extents_untrusted(extents, 10)


def test_the_parts_of_a_file(quick_path: Path) -> None:
    if not supports(quick_path, GIB):
        pytest.skip("this file system keeps no holes")
    sparse(quick_path / "file", GIB, {0: b"a", 512 * MIB: b"b" * MIB})
    descriptor = os.open(quick_path / "file", os.O_RDONLY)
    extents = data_extents(descriptor, GIB)
    os.close(descriptor)
    assert extents is not None
    assert [offset // MIB for offset, _ in extents] == [0, 512]
    assert sum(length for _, length in extents) < 2 * MIB


def test_a_file_in_memory_without_holes_is_not_searched_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this folder lies on: what counts is how much storage the file has."""
    (tmp_path / "full").write_bytes(os.urandom(MIB))
    sparse(tmp_path / "sparse", MIB, {0: b"a"})
    looked: list[int] = []
    lseek = os.lseek

    def look(descriptor: int, offset: int, how: int) -> int:
        looked.append(offset)
        return lseek(descriptor, offset, how)

    monkeypatch.setattr(os, "lseek", look)
    for name, file_system, looks in (("full", "tmpfs", False), ("full", "ext4", True), ("sparse", "tmpfs", True)):
        looked.clear()
        with (tmp_path / name).open("rb", buffering=0) as file:
            # Storage is given to it when it is written out.
            os.fsync(file.fileno())
            extents = data_extents(file.fileno(), MIB, file_system)
        assert bool(looked) == looks, name
        if name == "full":
            assert extents == [(0, MIB)]


SIZES = {"2^31": 2**31, "2^32": 2**32, "2^32+1": 2**32 + 1, "1 TB": 10**12, "2^53+1": 2**53 + 1}


@pytest.mark.parametrize("name", SIZES)
async def test_huge_sparse_files_arrive_as_they_are(quick_path: Path, name: str) -> None:
    size = SIZES[name]
    if not supports(quick_path, size):
        pytest.skip("this file system holds no such file")
    engine = Engine(quick_path)
    pieces = {0: b"begin", size // 3: os.urandom(100_000), size - 3: b"end"}
    sparse(engine.source / "file", size, pieces)
    observed = await engine.run(60)
    assert observed.state == "SUCCEEDED", observed
    status = (engine.destination / "file").stat()
    assert status.st_size == size
    # Three pieces, one of them perhaps across two blocks.
    assert status.st_blocks * 512 <= 4 * sparse_block([], size, block_size(size)) + MIB
    with (engine.destination / "file").open("rb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            assert file.read(len(data)) == data
        file.seek(size // 2)
        assert file.read(100) == bytes(100)
    print(f"{name}: {size} bytes, on disk {status.st_blocks * 512}")


async def test_a_terabyte_with_little_data_costs_little(quick_path: Path) -> None:
    """Data in small pieces all over a file whose blocks would be large: only what is near them is sent and stored."""
    size, count = 10**12, 32
    if not supports(quick_path, size):
        pytest.skip("this file system holds no such file")
    engine = Engine(quick_path)
    pieces = {size // count * number: os.urandom(MIB) for number in range(count)}
    sparse(engine.source / "file", size, pieces)
    observed = await engine.run(60)
    assert observed.state == "SUCCEEDED", observed
    came = received(engine)
    stored = (engine.destination / "file").stat().st_blocks * 512
    # A piece may lie across two blocks, and the last block is always sent.
    assert came <= (2 * count + 1) * MIB
    assert stored <= (2 * count + 2) * MIB
    with (engine.destination / "file").open("rb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            assert file.read(MIB) == data
    print(f"{size} bytes, data {count * MIB}, sent {received}, stored {stored}")


async def test_a_crash_on_the_way_keeps_holes_and_data(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fifth call is the last one once; what was durable by then is not sent again as other blocks."""
    monkeypatch.setattr(arrivals, "CHECK_AFTER", MIB)
    size, count = 10**12, 8
    if not supports(quick_path, size):
        pytest.skip("this file system holds no such file")
    pieces = {size // count * number + 12345: os.urandom(MIB) for number in range(count)}
    crashes = number = 0
    while True:
        number += 5

        def die(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        engine = Engine(quick_path / str(number), plan=die)
        sparse(engine.source / "file", size, pieces)
        died = True
        try:
            await engine.run()
            died = False
        except Crashed:
            crashes += 1
            engine = engine.revived()
            observed = await engine.run()
            assert observed.state == "SUCCEEDED", observed
        with (engine.destination / "file").open("rb") as file:
            for offset, data in pieces.items():
                assert os.pread(file.fileno(), MIB, offset) == data, number
        assert (engine.destination / "file").stat().st_blocks * 512 <= (2 * count + 3) * MIB
        if not died:
            break
        shutil.rmtree(quick_path / str(number))
    assert crashes > 5
    print(f"crashes survived: {crashes}")


@pytest.mark.parametrize(
    ("data", "size", "usual", "block"),
    [
        (MIB, 10**12, 16 * MIB, MIB),
        (10**12 // 4, 10**12, 16 * MIB, 16 * MIB),
        (MIB, 10**13, 16 * MIB, 16 * MIB),
        (MIB, 4 * 2**40, 16 * MIB, 4 * MIB),
        (MIB, 2**53 + 1, 16 * MIB, 16 * MIB),
        (0, 2**31, MIB, MIB),
    ],
)
def test_files_of_mostly_holes_are_cut_smaller(data: int, size: int, usual: int, block: int) -> None:
    assert sparse_block([(0, data)] if data else [], size, usual) == block


async def test_a_file_of_nothing_but_a_hole(quick_path: Path) -> None:
    if not supports(quick_path, GIB):
        pytest.skip("this file system keeps no holes")
    engine = Engine(quick_path)
    sparse(engine.source / "file", GIB, {})
    assert (await engine.run()).state == "SUCCEEDED"
    status = (engine.destination / "file").stat()
    assert (status.st_size, status.st_blocks * 512 <= 2 * MIB) == (GIB, True)
    assert len(empty_bitmap(GIB, MIB)) == 128


async def test_a_source_without_the_ability_is_not_asked(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older source would take the question for a breach of the rules."""
    monkeypatch.setattr("agent.transfer.receiving.large_files.EXTENTS", "an ability nobody has")
    engine = Engine(quick_path)
    sparse(engine.source / "file", 65 * MIB, {1000: b"data"})
    assert (await engine.run()).state == "SUCCEEDED"
    assert (engine.destination / "file").read_bytes() == (engine.source / "file").read_bytes()
