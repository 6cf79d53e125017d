"""Looks all the time at what is visible below a destination and checks that it is complete and right.

Runs as a process of its own beside a transfer: ``python -m agent.demo.watcher SOURCE DESTINATION``. Whatever final
name appears must have the source's content at once, whichever process is being killed at that moment. The watcher
reads nothing but the two trees. It ends when its standard input ends, after one more look, and prints a JSON report.
"""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from protocol.names import RESERVED_PREFIX

INTERVAL = 0.04
# Files already found right are looked at again this often: nobody may spoil them later either.
RECHECK_INTERVAL = 1.0
# A change within this time of a look may have been missed by it: file systems keep coarse times.
COARSE_TIME = 0.1
MAX_WRONG = 100
CHUNK = 1024 * 1024

Version: TypeAlias = tuple[int, int, int]


@dataclass
class Watcher:
    """What has been seen so far. `look` is one look; paths are bytes, because names are."""

    source: bytes
    destination: bytes
    looks: int = 0
    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    _right: dict[bytes, Version] = field(default_factory=dict)
    _directories: dict[bytes, tuple[int, float]] = field(default_factory=dict)
    _rechecked: float = 0.0

    def look(self, now: float) -> None:
        """Check every name that has appeared or changed. ``now`` is the time of day in seconds."""
        self.looks += 1
        if not self._directories:
            self._directories[b""] = (-1, 0.0)
        for below in list(self._directories):
            self._look_at_directory(below, now)
        if now - self._rechecked >= RECHECK_INTERVAL:
            self._rechecked = now
            for path in list(self._right):
                self._check(path)

    def _look_at_directory(self, below: bytes, now: float) -> None:
        path = os.path.join(self.destination, below)
        seen, looked = self._directories[below]
        try:
            changed = os.stat(path, follow_symlinks=False).st_ctime_ns
        except FileNotFoundError:
            if below:
                del self._directories[below]
            return
        # Nothing has changed, and nothing can have changed unnoticed during the last look.
        if changed == seen and changed / 1e9 < looked - COARSE_TIME:
            return
        self._directories[below] = (changed, now)
        for name in self._names(path):
            self._check(os.path.join(below, name))

    @staticmethod
    def _names(path: bytes) -> Iterator[bytes]:
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return
        yield from (name for name in names if not name.startswith(RESERVED_PREFIX))

    def _check(self, path: bytes) -> None:
        try:
            found = os.stat(os.path.join(self.destination, path), follow_symlinks=False)
        except FileNotFoundError:
            self._right.pop(path, None)
            return
        version = (found.st_ino, found.st_size, found.st_mtime_ns)
        if stat.S_ISDIR(found.st_mode):
            if path not in self._directories:
                self._directories[path] = (-1, 0.0)
                self._look_at_directory(path, 0.0)
            reason = "" if self._source_is_directory(path) else "is a directory that the source does not have"
        elif self._right.get(path) == version:
            return
        else:
            reason = self._fault_of(path, found)
            self.checked += 1
            self._right[path] = version
        if reason and len(self.wrong) < MAX_WRONG:
            self.wrong.append(f"{path.decode('utf-8', 'backslashreplace')} {reason}")

    def _source_is_directory(self, path: bytes) -> bool:
        return stat.S_ISDIR(os.stat(os.path.join(self.source, path), follow_symlinks=False).st_mode)

    def _fault_of(self, path: bytes, found: os.stat_result) -> str:
        """What is wrong with a visible file or symlink, or an empty string."""
        ours, theirs = os.path.join(self.source, path), os.path.join(self.destination, path)
        try:
            expected = os.stat(ours, follow_symlinks=False)
        except FileNotFoundError:
            return "is not in the source"
        if stat.S_IFMT(expected.st_mode) != stat.S_IFMT(found.st_mode):
            return "is of another type than in the source"
        try:
            if stat.S_ISLNK(found.st_mode):
                return "" if os.readlink(ours) == os.readlink(theirs) else "leads elsewhere than in the source"
            return _difference(ours, theirs)
        except FileNotFoundError:
            # It was replaced or removed meanwhile; the next look sees what is there then.
            return ""


def _difference(ours: bytes, theirs: bytes) -> str:
    """Compare two files byte by byte."""
    with open(theirs, "rb", buffering=0) as right, open(ours, "rb", buffering=0) as left:
        sizes = os.fstat(left.fileno()).st_size, os.fstat(right.fileno()).st_size
        if sizes[0] != sizes[1]:
            return f"has {sizes[1]} bytes instead of {sizes[0]}"
        offset = 0
        while True:
            one, other = left.read(CHUNK), right.read(CHUNK)
            if one != other:
                return f"differs from the source within the MiB at byte {offset}"
            if not one:
                return ""
            offset += len(one)


def main(arguments: list[str]) -> int:
    """Watch until standard input ends, then report."""
    source, destination = (os.fsencode(argument) for argument in arguments)
    watcher = Watcher(source, destination)
    stopping = False
    while True:
        watcher.look(time.time())
        if stopping:
            break
        readable, _, _ = select.select([sys.stdin], [], [], INTERVAL)
        stopping = bool(readable) and not os.read(sys.stdin.fileno(), 1)
    json.dump({"looks": watcher.looks, "checked": watcher.checked, "wrong": watcher.wrong}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
