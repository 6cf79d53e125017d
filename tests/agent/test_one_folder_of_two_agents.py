"""One folder that two agents offer, of one machine or of two on one file server, and two tasks into it at once, the
same names from different sources. Nobody gives them turns (`docs/states.md`), so that the last one wins, file by file;
but each file is whole and of one of the sources, and nothing of either is left behind."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from protocol.control import TaskOptions
from tests.agent.engine_inside import Engine, quick_path, skipped
from tests.agent.one_of_two import Disturbed, run_at_once
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

MIB = 1024 * 1024
SIZES = [0, 1, 5000, 60_000, MIB, MIB + 1, 5 * MIB]
TIME = 1_700_000_000 * 10**9


class _Names:
    """The names that both sources have, and what each has there."""

    def __init__(self, chance: random.Random, sources: list[Path], *, unlike: bool) -> None:
        self._random, self._unlike = chance, unlike
        self.files: list[str] = []
        self.links: list[str] = []
        self._fill(sources, "", 0)

    def _fill(self, sources: list[Path], below: str, depth: int) -> None:
        for folder in sources:
            folder.mkdir(parents=True)
        for name in self._random.sample("abcdefgh", self._random.randint(2, 6)):
            places, what = [folder / name for folder in sources], self._random.random()
            if self._random.random() < 0.2:
                # One has it alone: a mirror of the other deletes it, perhaps while it is written to.
                places = [self._random.choice(places)]
            if what < 0.25 and depth < 3:
                if self._unlike and len(places) > 1 and self._random.random() < 0.3:
                    # A folder here, a file there.
                    self._file(places[0], f"{below}{name}", 0)
                    self._fill(places[1:], f"{below}{name}/", depth + 1)
                else:
                    self._fill(places, f"{below}{name}/", depth + 1)
            elif what < 0.35:
                self.links.append(f"{below}{name}")
                for number, place in enumerate(places):
                    place.symlink_to(f"of-{number}")
            else:
                size = self._random.choice(SIZES)
                for number, place in enumerate(places):
                    # Mostly of one size, so that only content and time tell them apart.
                    self._file(place, f"{below}{name}", size if self._random.random() < 0.8 else size + number)

    def _file(self, place: Path, name: str, size: int) -> None:
        self.files.append(name)
        place.write_bytes((self._random.randbytes(min(size, 65536)) * (1 + (size >> 16)))[:size])
        when = TIME + self._random.randint(0, 10**6) * 10**9
        os.utime(place, ns=(when, when))


class _Task(Disturbed):
    """One of the two."""

    place = "to"

    def __init__(self, number: int, seed: int, base: Path, options: TaskOptions, faults: float) -> None:
        super().__init__(number, seed, base)
        self.options, self.faults = options, faults
        self.destination.mkdir(exist_ok=True, parents=True)
        self.deaths = [self.random.randint(1, 300) for _ in range(self.random.randint(0, 3))]
        self.pauses = self.random.randint(0, 1)
        self.start()

    def arrange(self, engine: Engine) -> None:
        engine.lanes_wanted = self.random.choice([1, 2])
        engine.processes = self.random.choice([0, 1])


ALWAYS = {1, 2}
SEEDS = [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.soak) for seed in chosen_seeds(range(200))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_each_file_is_whole_and_of_one_of_the_sources(quick_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    options = TaskOptions(
        sync_level=chance.choice([None, None, 1, 2, 3]),
        verify_checksum=chance.choice([True, True, False]),
        preserve_timestamp=chance.choice([True, False]),
        delete_destination_extra=chance.choice([True, False, False]),
        recursive_symlinks="keep",
        preserve_hard_links=chance.choice([True, False]),
    )
    faults, unlike = chance.choice([0.0, 0.0, 0.01]), chance.random() < 0.25
    tasks = [_Task(number, seed, quick_path, options, faults) for number in (1, 2)]
    sources = [task.engine.source for task in tasks]
    for source in sources:
        source.rmdir()
    names = _Names(chance, sources, unlike=unlike)
    results = await run_at_once(tasks)
    left = [skipped(task.engine) for task in tasks]
    print(f"seed {seed}: {options}, faults {faults}, unlike {unlike}")
    print(f"  {[result.state for result in results.values()]}, {left}, {[Counter(t.engine.codes()) for t in tasks]}")
    to = quick_path / "both" / "to"
    whole = Counter[int]()
    there = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_symlink() or path.is_file()}
    for name in there:
        path = to / name
        found = [number for number, source in enumerate(sources) if _same(path, source / name)]
        assert found or (faults and _is_reserved(name)), name
        if found and options.preserve_timestamp and not path.is_symlink():
            assert path.stat().st_mtime_ns in {(sources[number] / name).stat().st_mtime_ns for number in found}, name
        whole.update(found[:1])
    missing = {*names.files, *names.links} - there
    if not unlike and not options.delete_destination_extra:
        # Where one has a file and the other a folder, either may have come first.
        assert missing <= {name for each in left for name in each}, missing
    if not unlike and not faults and not options.delete_destination_extra:
        assert {result.state for result in results.values()} == {"SUCCEEDED"}, results
    if not faults:
        assert not list(to.parent.rglob(".towpath.*"))
    print(f"  of either: {dict(whole)}")


def _is_reserved(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".towpath.")


def _same(path: Path, source: Path) -> bool:
    if path.is_symlink():
        return source.is_symlink() and path.readlink() == source.readlink()
    return source.is_file() and not source.is_symlink() and path.read_bytes() == source.read_bytes()
