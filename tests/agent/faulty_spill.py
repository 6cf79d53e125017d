"""The file to which names of large folders are put aside, with faults, and small enough for tests to come to it."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import cast

import pytest

from agent.transfer.books import spill
from agent.transfer.planning import gathered_names, source_names

# What becomes of the nth call of an operation ("open", "write", "read"): nothing, this error, or this kind of damage.
FilePlan = Callable[[str, int], int | str | None]
DAMAGES = ("flipped", "zeros", "cut", "older")


class FaultyFile:
    """One such file. What a damaged write was to write is not there when it is read back; nobody is told."""

    def __init__(self, inner: FileIO, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults

    def write(self, data: memoryview) -> int:
        fate = self.faults.fate("write")
        whole = bytes(data)
        # As the kernel may: a part now, the rest with the next call.
        some = whole[: max(1, len(whole) * 2 // 3)]
        if fate == "flipped":
            at = len(some) // 2
            return self.inner.write(some[:at] + bytes([some[at] ^ 1]) + some[at + 1 :])
        if fate == "zeros":
            return self.inner.write(bytes(len(some)))
        if fate == "cut":
            self.inner.truncate(self.inner.tell() + len(some) // 2)
            self.inner.seek(len(some) // 2, os.SEEK_CUR)
            return len(some)
        if fate == "older":
            # Lost on its way to the disk, where what was there before is.
            self.inner.seek(len(some), os.SEEK_CUR)
            return len(some)
        return self.inner.write(some)

    def read(self, length: int) -> bytes:
        self.faults.fate("read")
        return self.inner.read(max(1, length * 2 // 3))

    def seek(self, offset: int) -> int:
        return self.inner.seek(offset)

    def close(self) -> None:
        self.faults.open -= 1
        self.inner.close()


class Faults:
    """Counts the calls of all such files, and has some of them fail."""

    def __init__(self, plan: FilePlan = lambda _operation, _nth: None) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter()
        # Files that are open.
        self.open = 0

    def fate(self, operation: str) -> str | None:
        self.counts[operation] += 1
        fate = self.plan(operation, self.counts[operation])
        if isinstance(fate, int):
            raise OSError(fate, os.strerror(fate))
        return fate

    def nameless(self, directory: Path) -> FileIO:
        self.fate("open")
        file = _NAMELESS(directory)
        self.open += 1
        return cast(FileIO, FaultyFile(file, self))


_NAMELESS = spill._nameless


def with_small_limits(patch: pytest.MonkeyPatch, faults: Faults) -> Faults:
    """Have names put aside that are a few, in files with these faults."""
    patch.setattr(spill, "_nameless", faults.nameless)
    # The same in every process.
    patch.setattr(spill, "hash", zlib.crc32, raising=False)
    patch.setattr(spill, "PARTS", 3)
    patch.setattr(source_names, "PARTS", 3)
    patch.setattr(gathered_names, "PARTS", 3)
    patch.setattr(spill, "BUFFERED", 50)
    patch.setattr(spill, "_AT_ONCE", 2)
    patch.setattr(source_names, "HELD", 400)
    patch.setattr(gathered_names, "MANY", 2000)
    patch.setattr(gathered_names, "PORTION", 2000)
    patch.setattr(gathered_names, "_PIECE", 2)
    return faults
