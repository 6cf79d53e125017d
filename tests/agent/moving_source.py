"""Sources that are changed while they are listed, by seed (`test_moved_at_source_by_seed`): a tree, what the
destination has of it, and what somebody does with it meanwhile."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.storage.faulty import Call, Plan
from agent.transfer.planning.second_look import LOOKS, SecondLook
from protocol.control import TaskOptions
from tests.agent.misfortune import misfortune

TOPS = ["a", "b", "c"]
SIZES = [20, 700, 5000, 1_200_000]
# What may become of files that somebody moves away.
MOVED_AWAY = {"FILE_CHANGED", "FILE_NOT_FOUND", "NOT_FOUND", "NOT_A_DIRECTORY", "IS_A_DIRECTORY"}
# Where the source's calls come from that list or open files, and not from those that look whether folders changed.
MOVABLE = {"open_directory", "open_read", "open_read_status", "status", "scan"}
ITEMS = [
    [("/", "/")],
    [("/", "/")],
    [("/a", "/to"), ("/b", "/to"), ("/c", "/else")],
    [("/", "/all"), ("/b", "/all/b"), ("/c", "/beside")],
]


def pass_a_tick() -> None:
    """Until times of changes differ from those of changes before."""
    time.sleep(0.005)


class Play:
    """One seed: a source, what the destination has of it, and what happens meanwhile."""

    def __init__(self, seed: int, base: Path) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.source, self.destination = base / "source", base / "destination"
        self._serial = 0
        # Content of all files that nobody removes, and whether some were put where others had been.
        self.constant: set[bytes] = set()
        self.replaced = False
        # What was done to the source since the run began, as text.
        self.done: list[str] = []
        # Deaths and faults.
        self.met: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.looking = False
        self.looks = 0
        choose = self.random.choice
        self.pairs = choose(ITEMS)
        self.restless = self.random.random() < 0.25
        self.folding = self.random.random() < 0.2
        self.deaths = [self.random.randint(1, 200) for _ in range(self.random.choice([0, 0, 0, 1, 2]))]
        self.options = TaskOptions(
            delete_destination_extra=choose([True, True, False]),
            delete_destination_extra_limit=100_000,
            verify_checksum=choose([True, False]),
            preserve_timestamp=choose([True, True, False]),
            preserve_hard_links=choose([True, False, False]),
            preserve_xattrs=choose([True, False, False]),
            recursive_symlinks=choose(["keep", "copy", "ignore"]),
            skip_source_errors=choose([True, False]),
            sync_level=choose([None, None, 1, 2, 3]),
        )
        self._widen()
        self._fill()

    def _widen(self) -> None:
        """What else is chosen, before there is a tree."""

    # --- trees -----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        for top in TOPS:
            (self.source / top).mkdir(parents=True)
        for _ in range(self.random.randint(0, 6)):
            self._folder(self._some_folder())
        for _ in range(self.random.randint(3, 14)):
            self._file(self._some_folder())
        files = self._files()
        for number in range(self.random.randint(0, 2)):
            os.link(self.random.choice(files), self._some_folder() / f"hard-{number}")
        for number in range(self.random.randint(0, 2)):
            (self._some_folder() / f"link-{number}").symlink_to("nowhere" if number else self.random.choice(files).name)
        for path in self._files():
            self.constant.add(path.read_bytes())
        for source, destination in self.pairs:
            self._copy(self.source / source[1:], self.destination / destination[1:])
        # Long ago.
        for path in [self.source, *self.source.rglob("*"), *self.destination.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                os.utime(path, (1_600_000_000, 1_600_000_000))

    def _copy(self, source: Path, destination: Path) -> None:
        destination.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            there, what = destination / path.name, self.random.random()
            if path.is_symlink() or what < 0.3:
                continue
            if path.is_dir():
                self._copy(path, there)
            else:
                there.write_bytes(path.read_bytes())
                os.utime(there, (path.stat().st_mtime, path.stat().st_mtime))
        for _ in range(self.random.randint(0, 3)):
            # Names that files of the source may have later.
            extra = destination / f"moved-{self.random.randint(1, self._serial)}"
            if not os.path.lexists(extra):
                extra.write_bytes(b"old" * self.random.randint(1, 9))
                os.utime(extra, (1_500_000_000, 1_500_000_000))

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.source.rglob("*")) if path.is_file() and not path.is_symlink()]

    def _folders(self) -> list[Path]:
        return [path for path in sorted(self.source.rglob("*")) if path.is_dir() and not path.is_symlink()]

    def _some_folder(self) -> Path:
        return self.random.choice(self._folders())

    def _folder(self, above: Path) -> None:
        self._serial += 1
        (above / f"folder-{self._serial}").mkdir()

    def _file(self, folder: Path) -> Path:
        self._serial += 1
        path = folder / f"file-{self._serial}"
        size = self.random.choice(SIZES)
        path.write_bytes((b"%d of %d " % (self._serial, self.seed) + self.random.randbytes(40)).ljust(size, b"."))
        when = 1_550_000_000 + self._serial * 10
        os.utime(path, (when, when))
        return path

    # --- what happens ----------------------------------------------------------------------------------

    def source_plan(self, changes: int) -> Plan:
        at = {self.random.randint(1, 60) for _ in range(changes)}
        count = 0

        def plan(call: Call) -> int | None:
            nonlocal count
            with self._lock:
                if call.operation not in MOVABLE or self.looking or (self.looks >= LOOKS and not self.restless):
                    return None
                count += 1
                if count in at or (self.restless and self.random.random() < 0.1):
                    pass_a_tick()
                    with suppress(OSError):
                        self._change()
                    pass_a_tick()
            return None

        return plan

    def _change(self) -> None:
        what = self.random.random()
        files = self._files()
        if what < 0.5 and files:
            path = self.random.choice(files)
            self._move(path, self._some_folder())
        elif what < 0.7:
            path = self._some_folder()
            if path.parent != self.source:
                to = self._some_folder() / path.name
                path.rename(to)
                self.done.append(f"move {path} {to}")
        elif what < 0.8:
            self._file(self._some_folder())
        elif what < 0.9 and files:
            path = self.random.choice(files)
            self.constant.discard(path.read_bytes())
            path.unlink()
            self.done.append(f"remove {path}")
        elif files:
            path, other = self.random.choice(files), self.random.choice(files)
            if path != other and not path.samefile(other):
                self.replaced = True
                self.constant.discard(other.read_bytes())
                path.rename(other)
                self.done.append(f"replace {path} {other}")

    def _move(self, path: Path, folder: Path) -> None:
        number = path.name.rpartition("-")[2]
        others = [other.name.upper() for other in sorted(folder.iterdir()) if other.is_file()]
        if self.folding and others and self.random.random() < 0.5:
            name = self.random.choice(others)
        else:
            name = self.random.choice([path.name, f"moved-{number}"])
        if not os.path.lexists(folder / name):
            path.rename(folder / name)
            self.done.append(f"move {path} {folder / name}")

    def destination_plan(self, faults: float) -> Plan:
        return misfortune(self.random, self.deaths, faults, self.met)

    # --- what is right ---------------------------------------------------------------------------------

    def places(self, path: Path) -> Iterator[str]:
        """Where a file of the source is to be at the destination."""
        name = str(path.relative_to(self.source))
        for source, destination in self.pairs:
            top = source[1:]
            if not top or name.startswith(f"{top}/"):
                below = name[len(top) :].lstrip("/")
                yield f"{destination[1:]}/{below}".lstrip("/")


def watch_looks(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed while the source is asked whether folders changed, nor after the last time."""
    look = SecondLook.look

    async def watched(self: SecondLook) -> bool:
        play.looking = True
        again = await look(self)
        if again:
            play.looking = False
            play.looks += 1
        return again

    monkeypatch.setattr(SecondLook, "look", watched)
