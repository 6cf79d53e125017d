"""What was called of the globus command, for the check of docs/globus-cli.md against it."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Names the file in which runs in several processes keep their calls together.
FILE = "TOWPATH_CALLS"


class Calls:
    """The words of every globus command that did what its test expected."""

    def __init__(self) -> None:
        place = os.environ.get(FILE)
        self._file = Path(place) if place else None
        self._here: list[tuple[str, ...]] = []

    def append(self, words: tuple[str, ...]) -> None:
        self._here.append(words)
        if self._file is not None:
            # One write to the end of the file: processes do not get into each other's lines.
            with self._file.open("ab", buffering=0) as file:
                file.write(json.dumps(words).encode() + b"\n")

    def everything(self) -> list[tuple[str, ...]]:
        """What this process called, and those before it and beside it that name the same file."""
        if self._file is None or not self._file.exists():
            return self._here
        return [tuple(json.loads(line)) for line in self._file.read_text().splitlines()]
