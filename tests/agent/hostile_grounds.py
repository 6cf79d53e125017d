"""A root beside a folder of canaries, and an attacker who swaps what is in the root for links to them."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

SECRET = b"outside the collection"
_EXCHANGE = 2
_AT_FDCWD = -100


class Grounds:
    """root/ beside outside/, and what outside/ looked like."""

    def __init__(self, base: Path) -> None:
        self.inside = base / "root"
        self.outside = base / "outside"
        self.inside.mkdir()
        (self.outside / "folder").mkdir(parents=True)
        for place in (self.outside, self.outside / "folder"):
            for name in ("f", "canary"):
                (place / name).write_bytes(SECRET)
        os.symlink("canary", self.outside / "link")
        self.before = self.snapshot()

    def snapshot(self) -> list[tuple[object, ...]]:
        """Everything that could change outside, times of access apart."""
        rows: list[tuple[object, ...]] = []
        for folder, _, files in os.walk(self.outside):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                status = os.lstat(path)
                content = Path(path).read_bytes() if os.path.isfile(path) else b""
                rows.append(
                    (
                        path,
                        status.st_ino,
                        status.st_mode,
                        status.st_uid,
                        status.st_nlink,
                        status.st_size,
                        status.st_mtime_ns,
                        status.st_ctime_ns,
                        content,
                    )
                )
        return sorted(rows, key=str)

    def check(self) -> None:
        assert self.snapshot() == self.before


class Attacker:
    """Exchanges two names atomically, as fast as it can until stopped, or so many times with a pause after each."""

    def __init__(self, first: Path, second: Path, *, most: int = 0, pause: float = 0.0) -> None:
        self._most = most
        self._pause = pause
        self._library = ctypes.CDLL(None, use_errno=True)
        self._names = (os.fsencode(first), os.fsencode(second))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.swaps = 0
        if not hasattr(self._library, "renameat2") or self.swap() != 0:
            pytest.skip("the attack needs renameat2 with RENAME_EXCHANGE")

    def swap(self) -> int:
        first, second = self._names
        return int(self._library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_EXCHANGE)))

    def _run(self) -> None:
        while not self._stop.is_set() and not (self._most and self.swaps >= self._most):
            self.swaps += self.swap() == 0
            if self._pause:
                self._stop.wait(self._pause)

    def __enter__(self) -> Attacker:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()
