"""Every pair of networks transfers a file, over the kind of path that the table says it can have."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix

from tests.slices import part

WHY_NOT = laboratory.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

# Of each kind of path one, in the default run.
REPRESENTATIVE = [("port", "none"), ("port", "no-udp"), ("symmetric", "symmetric")]
SIZE = 600_000
# Where the first path that carried a small file was not the best one, a slower transfer shows that the best takes over.
LARGER, SLOWLY = 3_000_000, 150_000


def arrange(lab: laboratory.Lab, kinds: dict[str, str]) -> None:
    """Put both sites behind what their kinds say."""
    chains = {site: matrix.boxes(site, kind) for site, kind in kinds.items()}
    for site, kind in kinds.items():
        gateway = chains[site][0].get("gateway") if chains[site] and kind != "firewall" else None
        lab.sites[site].host.use([matrix.address(site, kind)], gateway)
    lab.emulator.use(lab.describe(chains))


async def cell(lab: laboratory.Lab, source: str, destination: str, wanted: tuple[str, ...]) -> str:
    """Transfer a file from a site of one kind to one of another; returns the path it took in the end.

    The first path that is good carries data at once, so a small file may be there before the best one is found.
    """
    arrange(lab, {"a": source, "b": destination})
    await lab.start()
    try:
        path = await move(lab, f"{source}-{destination}.bin", SIZE)
        if not path.startswith(wanted):
            path = await move(lab, f"{source}-{destination}-larger.bin", LARGER, towpath_bandwidth_limit=SLOWLY)
        return path
    finally:
        await lab.stop()


async def move(lab: laboratory.Lab, name: str, size: int, **options: object) -> str:
    """Transfer a new file; the path that its task had in the end."""
    content = random.Random(name).randbytes(size)
    (lab.sites["a"].root / name).write_bytes(content)
    task_id = await lab.submit("a", "b", name, **options)
    task = await lab.finished(task_id)
    assert task["status"] == "SUCCEEDED", task
    assert (lab.sites["b"].root / name).read_bytes() == content
    return lab.path_of("b", task_id)


def expected(first: str, second: str) -> str:
    """The letter of a pair, in whichever order."""
    table = matrix.cells()
    return table.get((first, second)) or table[(second, first)]


async def run_cells(directory: Path, pairs: list[tuple[str, str]]) -> None:
    """All pairs in one lab; says all that went otherwise than the table says."""
    wrong = []
    async with laboratory.open_lab(directory) as lab:
        for source, destination in pairs:
            letter = expected(source, destination)
            try:
                path = await cell(lab, source, destination, matrix.PATHS[letter])
            except AssertionError as error:
                wrong.append(f"{source} to {destination}: {error}")
                continue
            print(f"{source:12} → {destination:12} {letter}  {path}")
            if not path.startswith(matrix.PATHS[letter]):
                wrong.append(f"{source} to {destination}: {letter} was expected, the path was: {path}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(170)
async def test_representative_pairs(tmp_path: Path) -> None:
    await run_cells(tmp_path, REPRESENTATIVE)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_the_whole_table_in_both_directions(tmp_path: Path) -> None:
    wanted = os.environ.get("TOWPATH_LAB_KINDS", "").split()
    rows = os.environ.get("TOWPATH_LAB_ROWS", "").split()
    pairs = []
    for first, second in matrix.cells():
        if (wanted and not {first, second} <= set(wanted)) or (rows and first not in rows):
            continue
        pairs.append((first, second))
        if first != second:
            pairs.append((second, first))
    await run_cells(tmp_path, list(part(pairs)))
