"""The names that a source lists in one folder, and which others it does not have: what a mirror deletes depends on it.

Names up to a few megabytes are a set in memory. Of more, both sides are put aside on disk, divided alike, and compared
one division after the other, so that a folder of any size takes the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from agent.transfer.books.spill import PARTS, Spill, division_of

# Bytes of memory, as they are reckoned here: some twenty thousand names.
HELD = 2 << 20
# What a name costs in a set, beside its bytes.
_NAME = 80


class SourceNames:
    """Of one folder. ``spelled`` makes one of all spellings that are one name at the destination. Methods block; raise
    `StateTrouble` where names are put aside and that cannot be done, after which nothing is known of any name."""

    def __init__(self, directory: Path, spelled: Callable[[bytes], bytes] = bytes) -> None:
        self._directory = directory
        self._spelled = spelled
        self._few: set[bytes] = set()
        self._cost = 0
        self._many: Spill[bytes] | None = None
        # Whether every name that was added is held: what is not would be deleted at the destination.
        self._whole = True

    @property
    def on_disk(self) -> int:
        """Bytes put aside so far."""
        return 0 if self._many is None else self._many.on_disk

    def add(self, names: Iterable[bytes]) -> None:
        """The source has these."""
        whole, self._whole = self._whole, False
        keys = list(map(self._spelled, names))
        if self._many is None:
            self._few.update(keys)
            self._cost += _cost(keys)
            if self._cost > HELD:
                self._many = Spill(self._directory, bytes)
                keys = list(self._few)
                self._few.clear()
        if self._many is not None:
            self._many.add(keys, bytes)
        self._whole = whole

    def lacking(self, others: Iterable[bytes]) -> Generator[bytes]:
        """Those of other names that the source does not have, in whatever order. Each is given out only after
        everything was looked at that might have it; an error ends them all. Raises what ``others`` raises."""
        if not self._whole:
            raise RuntimeError("Not every name of the source is known here.")
        spelled = self._spelled
        if self._many is None:
            yield from (name for name in others if spelled(name) not in self._few)
            return
        with closing(Spill(self._directory, bytes)) as there:
            there.add(others, spelled)
            for part in range(PARTS):
                if there.count(part):
                    yield from self._lacking_of(self._many, there, part)

    def _lacking_of(self, many: Spill[bytes], there: Spill[bytes], part: int) -> Iterator[bytes]:
        divisions = 1 + (many.size(part) + _NAME * many.count(part)) // HELD
        for division in range(divisions):
            held = {
                key
                for piece in many.read(part)
                for key in piece
                if divisions == 1 or division_of(key, divisions) == division
            }
            for piece in there.read(part):
                for name in piece:
                    key = self._spelled(name)
                    if key not in held and (divisions == 1 or division_of(key, divisions) == division):
                        yield name

    def close(self) -> None:
        """Let everything go. Safe to call twice."""
        self._whole = False
        self._few.clear()
        if self._many is not None:
            self._many.close()


def _cost(keys: list[bytes]) -> int:
    return sum(map(len, keys)) + _NAME * len(keys)
