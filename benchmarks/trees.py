"""Where to measure, and what is copied there: one large file, many small ones, a real tree."""

from __future__ import annotations

import os
import random
import shutil
import sysconfig
from pathlib import Path

MIB = 1024 * 1024
FAST = Path("/dev/shm")


class Place:
    """A directory to measure in: what is written goes below it and stays until the end."""

    def __init__(self, directory: Path, *, durable: bool) -> None:
        self.directory = directory
        self.durable = durable
        self.source = directory / "source"
        self.destination = directory / "destination"
        self.source.mkdir()
        self.destination.mkdir()
        self._number = 0

    def fresh(self) -> Path:
        self._number += 1
        return self.destination / f"{self._number:03d}"

    def settle(self) -> None:
        if self.durable:
            os.sync()

    def warm(self, name: str) -> None:
        """Read the source and touch as much memory as a copy needs."""
        total = 0
        for path in (self.source / name).rglob("*") if (self.source / name).is_dir() else [self.source / name]:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
                with path.open("rb", buffering=0) as file:
                    while file.read(MIB):
                        continue
        scratch = self.directory / "scratch"
        block = bytes(MIB)
        with scratch.open("wb", buffering=0) as file:
            for _ in range(total // MIB + 1):
                file.write(block)
        scratch.unlink()
        os.sync()


def make_large(source: Path, mib: int) -> str:
    block = os.urandom(64 * MIB)
    with (source / "large").open("wb") as file:
        for start in range(0, mib, 64):
            file.write(block[: min(64, mib - start) * MIB])
    return "large"


def make_small(source: Path, files: int) -> str:
    for number in range(files):
        folder = source / "small" / f"{number // 100:05d}"
        if not number % 100:
            folder.mkdir(parents=True)
        (folder / f"{number:07d}").write_bytes(os.urandom(4096))
    return "small"


def make_middle(source: Path) -> str:
    (source / "middle").mkdir()
    for number in range(100):
        (source / "middle" / f"{number:03d}").write_bytes(os.urandom(10 * MIB))
    return "middle"


def make_mixed(source: Path, library: Path | None = None) -> str:
    """A real tree: a Python's standard library (this one's, if none is named), without what is installed beside it, and
    without links that lead nowhere, at which scp, which follows all, gives up."""
    library = library or Path(sysconfig.get_paths()["stdlib"])
    shutil.copytree(library, source / "mixed", symlinks=True, ignore=shutil.ignore_patterns("site-packages"))
    for path in (source / "mixed").rglob("*"):
        if path.is_symlink() and not path.exists():
            path.unlink()
    return "mixed"


def make_empty(place: Path, files: int, in_one: int) -> str:
    """Empty files, so many in a directory, made in no order of their names, as where a directory has grown for years.
    A thousand of them are one inode with many names, so that ten million need no room."""
    order = list(range(in_one))
    random.Random(in_one).shuffle(order)
    place.mkdir(exist_ok=True)
    first = place / "first"
    for start in range(0, files, in_one):
        folder = place / "empty" / f"{start // in_one:06d}"
        folder.mkdir(parents=True)
        for number, place_in_folder in enumerate(order[: files - start]):
            if not (start + number) % 1000:
                first.unlink(missing_ok=True)
                first.touch()
            (folder / f"{place_in_folder:08d}").hardlink_to(first)
    first.unlink()
    return "empty"
