"""Tasks of many shapes by seed: files and folders in several items, some of which lead to one folder; killed, disturbed
by faults, and with sources that are changed in the middle. Whatever comes, no version of a file arrives that there
never was, nothing is left under reserved names, and what was not touched arrives.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import pytest

from agent.storage.faulty import Call, Plan
from protocol.control import TaskItem, TaskOptions
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path, skipped
from tests.agent.misfortune import SPARED, misfortune
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

MIB = 1024 * 1024
# Empty, small, and so large that some of it is settled while more comes.
SIZES = [0, 10, 5000, 2 * MIB, 18 * MIB]
# What may become of files that somebody changes.
EXPECTED = {"FILE_CHANGED", "FILE_NOT_FOUND", "IS_A_DIRECTORY", "NOT_A_DIRECTORY", "SYMLINK_LOOP", "NOT_A_FILE"}


class Play:
    """One seed: a source, the items of a task, and what happens meanwhile."""

    def __init__(self, seed: int, base: Path) -> None:
        self.random = random.Random(seed)
        self.source = base / "source"
        self.items: list[TaskItem] = []
        # Where each file of the source is to be.
        self.wanted: dict[str, Path] = {}
        # Digests of all that was ever to be had of a file, by where it goes.
        self.versions: dict[str, set[bytes]] = {}
        self.deaths = [self.random.randint(1, 700) for _ in range(self.random.randint(0, 3))]
        self._serial = 0
        for number in range(self.random.randint(1, 12)):
            self._item(number, self.source / f"{number}")

    def _item(self, number: int, folder: Path) -> None:
        place = self.random.choice(["to", "to/sub", "else", "to/sub/deep", f"own-{number}"])
        folder.mkdir(parents=True)
        if self.random.random() < 0.6:
            name = self._file(folder, "", place)
            self.items.append(TaskItem(source_path=f"/{number}/{name}", destination_path=f"/{place}/{name}"))
            return
        self.items.append(TaskItem(source_path=f"/{number}", destination_path=f"/{place}", recursive=True))
        for _ in range(self.random.randint(0, 6)):
            self._file(folder, self.random.choice(["", "x/", "x/y/", f"{number}/"]), place)

    def _file(self, folder: Path, below: str, place: str) -> str:
        self._serial += 1
        name = f"{below}file-{self._serial}"
        self._write(folder / name)
        self.wanted[f"{place}/{name}"] = folder / name
        self._note()
        return name

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.random.choice(SIZES)
        path.write_bytes((self.random.randbytes(min(size, 65536)) * max(1, size >> 16))[:size])

    def _note(self) -> None:
        for name, path in self.wanted.items():
            if path.is_file():
                self.versions.setdefault(name, set()).add(blake2b(path.read_bytes()).digest())

    def options(self) -> TaskOptions:
        choose = self.random.choice
        return TaskOptions(
            verify_checksum=choose([True, True, False]),
            preserve_timestamp=choose([True, False]),
            preserve_hard_links=choose([True, False, False]),
            recursive_symlinks=choose(["keep", "copy"]),
            sync_level=choose([None, None, 1, 2, 3]),
        )

    def destination_plan(self, faults: float) -> Plan:
        """For one process: it dies at some call, if another death is to come, and calls fail now and then."""
        return misfortune(self.random, self.deaths, faults, Counter(), SPARED - {"check_original"})

    def source_plan(self, changes: int) -> Plan:
        """The source is changed at some of its calls."""
        at = {self.random.randint(1, 80) for _ in range(changes)}
        count = 0

        def plan(_call: Call) -> int | None:
            nonlocal count
            count += 1
            if count in at and self.wanted:
                with suppress(OSError):
                    self.random.choice(self._changes())(self.random.choice(list(self.wanted.values())))
                self._note()
            return None

        return plan

    def _changes(self) -> list[Callable[[Path], object]]:
        return [
            lambda path: os.truncate(path, self.random.choice([0, 100, 3 * MIB])),
            lambda path: path.unlink(),
            lambda path: path.write_bytes(path.read_bytes() + b"more"),
            self._replace,
            lambda path: (path.unlink(), path.mkdir()),
            lambda path: (path.unlink(), path.symlink_to("nowhere")),
        ]

    def _replace(self, path: Path) -> None:
        other = path.with_name(f"{path.name}-new")
        self._write(other)
        other.rename(path)


async def _to_the_end(engine: Engine, play: Play, faults: float) -> tuple[Engine, str]:
    while True:
        try:
            return engine, (await engine.run(60)).state
        except Crashed:
            changes = engine.source_plan
            engine = engine.revived(play.destination_plan(faults))
            engine.source_plan = changes


# Quick ones.
ALWAYS = {4, 9, 16}
SEEDS = [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.soak) for seed in chosen_seeds(range(400))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_items_of_all_shapes_arrive(quick_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    play = Play(seed, quick_path)
    monkeypatch.setattr("agent.transfer.planning.items.ITEMS_AT_ONCE", play.random.choice([1, 2, 5, 250]))
    faults = play.random.choice([0.0, 0.0, 0.005, 0.02])
    processes, lanes = play.random.choice([0, 0, 1]), play.random.choice([1, 1, 3])
    plan = play.destination_plan(faults)
    engine = Engine(quick_path, play.options(), play.items, plan=plan, processes=processes, lanes_wanted=lanes)
    engine, state = await _to_the_end(engine, play, faults)
    assert state == "SUCCEEDED" or (faults and skipped(engine)), (seed, state, engine.codes())
    if state == "SUCCEEDED":
        there = {name: content for name, content in contents(engine.destination).items() if content != "folder"}
        assert there == {name: path.read_bytes() for name, path in play.wanted.items()}
        assert engine.temporaries() == []
    print(f"seed {seed}: {len(play.items)} items, {len(play.wanted)} files, {len(skipped(engine))} failed")


@pytest.mark.parametrize("seed", SEEDS)
async def test_sources_that_change_give_versions_that_there_were(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    play = Play(seed, quick_path)
    monkeypatch.setattr("agent.transfer.planning.items.ITEMS_AT_ONCE", play.random.choice([1, 3, 250]))
    processes, lanes = play.random.choice([0, 0, 1]), play.random.choice([1, 2])
    plan, source_plan = play.destination_plan(0.0), play.source_plan(play.random.randint(1, 6))
    engine = Engine(quick_path, play.options(), play.items, plan=plan, source_plan=source_plan, processes=processes)
    engine.lanes_wanted = lanes
    engine, state = await _to_the_end(engine, play, 0.0)
    assert set(skipped(engine).values()) <= EXPECTED, (seed, skipped(engine))
    assert engine.temporaries() == []
    for name, content in contents(engine.destination).items():
        if isinstance(content, bytes) and name in play.versions:
            assert blake2b(content).digest() in play.versions[name], (seed, name, len(content))
    print(f"seed {seed}: {len(play.wanted)} files, {state}, {sorted(skipped(engine).values())}")
