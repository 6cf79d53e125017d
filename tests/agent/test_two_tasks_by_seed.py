"""Two tasks at once into one collection, by seed: mirrors, filters, sync levels, links, hard links, times and limits in
any combination, each killed, paused and disturbed by faults on its own. In the end each has left what a plain walk over
both trees says (`tests/agent/task_model`), and nothing of the other's was touched."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from agent.limits.pace import Pace
from protocol.control import FilterRule, TaskObserved, TaskOptions
from tests.agent.engine_inside import Engine, quick_path, skipped
from tests.agent.one_of_two import Disturbed, run_at_once
from tests.agent.task_model import Expected, expected, seen
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

MIB = 1024 * 1024
SIZES = [0, 1, 700, 5000, MIB, MIB + 1, 5 * MIB]
NAMES = ["a", "b", "c", "keep.tmp", "d.tmp", ".hidden", "caf\u00e9", "x" * 255, "deep", "twin"]
BASE_TIME = 1_700_000_000 * 10**9


class Tree:
    """Fills a source, and a destination that is like it in some places and not in others."""

    def __init__(self, chance: random.Random, source: Path, destination: Path) -> None:
        self.random = chance
        self.source, self.destination = source, destination
        for folder in (source, destination):
            folder.mkdir(parents=True)
        self._files: list[Path] = []
        self._fill(source, 0)
        self._copy(source, destination)
        for _ in range(chance.randint(0, 5)):
            self._extra(chance.choice([destination, *filter(Path.is_dir, destination.rglob("*"))]))

    def _fill(self, folder: Path, depth: int) -> None:
        for name in self.random.sample(NAMES, self.random.randint(0 if depth else 2, 6)):
            path, what = folder / name, self.random.random()
            if what < 0.25 and depth < 3:
                path.mkdir()
                self._fill(path, depth + 1)
            elif what < 0.75:
                self._file(path)
            elif what < 0.85 and self._files:
                os.link(self.random.choice(self._files), path)
            elif what < 0.95:
                path.symlink_to(self.random.choice(["a", "b", "nowhere", "../a", "deep"]))
            else:
                os.mkfifo(path)
        self._date(folder)

    def _file(self, path: Path) -> None:
        size = self.random.choice(SIZES)
        path.write_bytes((self.random.randbytes(min(size, 65536)) * (1 + (size >> 16)))[:size])
        self._date(path)
        self._files.append(path)

    def _date(self, path: Path) -> None:
        when = BASE_TIME + self.random.choice([0, 5, 10**9, -(10**9), -(10**18), 3 * 10**18])
        os.utime(path, ns=(when, when), follow_symlinks=False)

    def _copy(self, source: Path, destination: Path) -> None:
        """Some of it, as it is, older, newer, or changed."""
        for path in sorted(source.iterdir()):
            there, what = destination / path.name, self.random.random()
            if what < 0.4:
                continue
            if what < 0.5:
                self._extra(destination, path.name, links=not path.is_dir())
            elif path.is_symlink() or path.is_fifo():
                continue
            elif path.is_dir():
                there.mkdir()
                self._copy(path, there)
            else:
                content = path.read_bytes()
                if what > 0.8 and content:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                there.write_bytes(content)
                when = path.stat().st_mtime_ns + self.random.choice([0, 0, 2 * 10**9, -2 * 10**9])
                os.utime(there, ns=(when, when))

    def _extra(self, folder: Path, name: str = "", *, links: bool = True) -> None:
        path = folder / (name or self.random.choice(["extra", "extra.tmp", "more", ".dot"]))
        if os.path.lexists(path):
            return
        what = self.random.random()
        if what < 0.5:
            path.write_bytes(self.random.randbytes(100))
        elif what < 0.6 and links:
            path.symlink_to("somewhere")
        else:
            path.mkdir()
            for _ in range(self.random.randint(0, 3)):
                self._extra(path)


def options(chance: random.Random) -> TaskOptions:
    choose = chance.choice
    rules = [
        [],
        [],
        [FilterRule(method="exclude", name="*.tmp")],
        [FilterRule(method="include", name="keep*"), FilterRule(method="exclude", name="*.tmp", type="file")],
        [FilterRule(method="exclude", name="deep", type="dir"), FilterRule(method="exclude", name=".*")],
    ]
    return TaskOptions(
        sync_level=choose([None, None, 0, 1, 2, 3]),
        verify_checksum=choose([True, True, False]),
        preserve_timestamp=choose([True, False]),
        delete_destination_extra=choose([True, False]),
        recursive_symlinks=choose(["ignore", "keep"]),
        preserve_hard_links=choose([True, False]),
        preserve_xattrs=choose([True, False, False]),
        preserve_acls=choose([True, False, False]),
        filter_rules=choose(rules),
    )


class Task(Disturbed):
    """One of the two: its trees, and what is to become of them."""

    def __init__(self, number: int, seed: int, base: Path) -> None:
        super().__init__(number, seed, base)
        self.place = self.random.choice([f"{number}", f"shared/{number}", f"shared/deep/er/{number}"])
        self.options = options(self.random)
        self.source = self.base / "source"
        Tree(self.random, self.source, self.destination / self.place)
        self.expected: Expected = expected(self.source, self.destination / self.place, self.options)
        self.faults = self.random.choice([0.0, 0.0, 0.01, 0.03])
        self.deaths = [self.random.randint(1, 400) for _ in range(self.random.randint(0, 3))]
        self.pauses = self.random.randint(0, 2)
        self.start()

    def arrange(self, engine: Engine) -> None:
        engine.lanes_wanted = self.random.choice([1, 1, 3])
        engine.processes = self.random.choice([0, 0, 1])
        if self.random.random() < 0.3:
            engine.pace = Pace(self.random.choice([3 * MIB, 40 * MIB]))

    def check(self, observed: TaskObserved) -> None:
        """Against the model; what failed for a fault that came too often is passed over, and has what it had."""
        wanted, found, left = self.expected, seen(self.destination / self.place), skipped(self.engine)
        unlucky = {path for path, code in left.items() if code in ("IO_ERROR", "STALE_HANDLE", "BUSY")}
        assert not unlucky or self.faults, left
        named = {path: code for path, code in left.items() if path not in unlucky}
        if unlucky:
            assert {path for path, _ in named.items()} <= set(wanted.failed) | set(wanted.left_out)
            return
        assert named == wanted.failed | wanted.left_out
        assert observed.state == ("FAILED" if wanted.failed else "SUCCEEDED"), observed
        assert found.keys() == wanted.there.keys()
        differing = {path for path, content in wanted.there.items() if found[path] != content}
        assert all(self._is_shared(path, found[path]) for path in differing), differing
        counters = observed.counters
        assert (counters.failed, counters.skipped_errors) == (len(wanted.failed), len(wanted.left_out))
        assert counters.deleted == wanted.deleted or self.counts["deaths"] or self.counts["faults"], counters
        if self.options.preserve_timestamp:
            there = {path: (self.destination / self.place / path).lstat().st_mtime_ns for path in wanted.times}
            differing = {path for path, when in wanted.times.items() if there[path] != when}
            assert all(map(self._has_kept_name, differing)), differing
        if self.options.preserve_hard_links and self.options.sync_level is None and not self.counts["faults"]:
            # Where a name cannot be made for a fault, the file is copied.
            assert self._names() == len(set(self._names_at_source()))

    def _is_shared(self, path: str, content: bytes | str) -> bool:
        """Whether this may be another name's content: names of one file that a level takes for the same are joined,
        by their size and time."""
        source = self.source / path
        if not self.options.preserve_hard_links or self.options.sync_level is None or source.stat().st_nlink < 2:
            return False
        names = [name for name in self.expected.there if (self.source / name).exists()]
        same = [name for name in names if (self.source / name).samefile(source)]
        return content in [source.read_bytes(), *(self.expected.there[name] for name in same)]

    def _has_kept_name(self, path: str) -> bool:
        """Whether this became another name of a file that a level left as it was, with its time: there is but one."""
        if not self.options.preserve_hard_links or self.options.sync_level is None:
            return False
        kept = [name for name in self.expected.there if name not in self.expected.times]
        names = [name for name in kept if (self.source / name).exists()]
        same = [name for name in names if (self.source / name).samefile(self.source / path)]
        there = self.destination / self.place
        return any((there / name).samefile(there / path) for name in same)

    def _names_at_source(self) -> list[int]:
        came = [path for path, content in self.expected.there.items() if path in self.expected.times]
        return [(self.source / path).stat().st_ino for path in came if isinstance(self.expected.there[path], bytes)]

    def _names(self) -> int:
        """How many files the names are that came."""
        came = [path for path in self.expected.times if isinstance(self.expected.there[path], bytes)]
        return len({(self.destination / self.place / path).stat().st_ino for path in came})


# Quick ones.
ALWAYS = {3, 11}
SEEDS = [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.soak) for seed in chosen_seeds(range(400))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_two_tasks_at_once_leave_what_a_plain_walk_says(quick_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    tasks = [Task(number, seed, quick_path) for number in (1, 2)]
    beside = quick_path / "both" / "beside"
    beside.write_bytes(b"of nobody")
    results = await run_at_once(tasks)
    for task in tasks:
        task.check(results[task.number])
        print(f"  {task.place}: {results[task.number].state}, {len(task.expected.there)} names, {dict(task.counts)}")
    assert beside.read_bytes() == b"of nobody"
    # What could not be removed for a fault may stay.
    assert any(task.faults for task in tasks) or not list((quick_path / "both").rglob(".towpath.*"))
