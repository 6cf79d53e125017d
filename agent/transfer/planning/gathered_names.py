"""The rows of a folder whose file system may take some of its names for one: held until all are known.

A name costs about half a kibibyte in memory until it is planned, the comparison included. More than some thousand rows
are put aside on disk, so that those which may be one name are together, and come back a portion at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent.storage.base import Directory
from agent.storage.folding import fold_key
from agent.transfer.books.spill import PARTS, Spill, division_of, part_of
from agent.transfer.planning.collisions import too_many
from protocol.session import Row

# Bytes of memory, as they are reckoned here: what is held before rows are put aside; what a portion has then, more or
# less; and what one may have whose names cannot be told from each other.
MANY = 4 << 20
PORTION = 16 << 20
MOST = 128 << 20
# A row with its numbers, its place in the list, and in the table of keys while names are compared.
_ROW = 500
# A portion is planned in pieces of so many rows, each of which is let go before the next.
_PIECE = 1000


class GatheredNames:
    """Rows of one folder. Methods block; raise `StateTrouble`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._rows: list[Row] = []
        self._cost = 0
        self._many: Spill[Row] | None = None

    @property
    def are_many(self) -> bool:
        """Whether no other folder like this should be planned beside it."""
        return self._many is not None

    @property
    def on_disk(self) -> int:
        """Bytes put aside so far."""
        return 0 if self._many is None else self._many.on_disk

    def add_untrusted(self, rows: list[Row]) -> None:
        """Hold some more."""
        if self._many is None:
            self._rows += rows
            self._cost += _cost(rows)
            if self._cost <= MANY:
                return
            self._many = Spill(self.directory, Row)
            rows, self._rows = self._rows, []
        self._many.add(rows, lambda row: fold_key(row.name))

    def portions(self) -> Iterator[list[Row]]:
        """All rows, so that those which may have one name are in one portion; in the order in which they came where
        there is only one. They are held here no more. Raises `ItemFailed` when too many may have one name."""
        if self._many is None:
            rows, self._rows = self._rows, []
            yield rows
            return
        for part in range(PARTS):
            # Reckoned too high: what a row takes on disk it takes in memory, and more.
            cost = self._many.size(part) + _ROW * self._many.count(part)
            divisions = 1 + cost // PORTION
            for division in range(divisions):
                rows = list(self._division(self._many, part, division, divisions))
                if rows:
                    yield rows

    def _division(self, many: Spill[Row], part: int, division: int, divisions: int) -> Iterator[Row]:
        held = 0
        for piece in many.read(part):
            for row in piece:
                if divisions > 1 and division_of(fold_key(row.name), divisions) != division:
                    continue
                held += _cost([row])
                if held > MOST:
                    raise too_many(row.name)
                yield row

    def close(self) -> None:
        """Let everything go. Safe to call twice."""
        if self._many is not None:
            self._many.close()


class SpelledThere:
    """How names are spelled that a folder has, for somebody who asks about portions. It is looked through once, when
    the first question comes: what was put there since has other names than what is asked about."""

    def __init__(self, handle: Directory, directory: Path) -> None:
        self._handle = handle
        self._directory = directory
        self._names: Spill[bytes] | None = None

    def of(self, names: set[bytes]) -> set[bytes]:
        """Which of these names are there, spelled like this. Raises OSError, `StateTrouble`."""
        if self._names is None:
            spill = Spill(self._directory, bytes)
            try:
                spill.add((node.name for node in self._handle.scan()), fold_key)
            except BaseException:
                spill.close()
                raise
            self._names = spill
        parts = {part_of(fold_key(name)) for name in names}
        return {name for part in parts for piece in self._names.read(part) for name in piece if name in names}

    def close(self) -> None:
        """Let everything go. Safe to call twice."""
        if self._names is not None:
            self._names.close()


def pieces(rows: list[Row]) -> Iterator[list[Row]]:
    """The rows of a portion in their order, some at a time; they are in the list no more."""
    rows.reverse()
    while rows:
        piece = rows[-_PIECE:]
        del rows[-_PIECE:]
        piece.reverse()
        yield piece


def _cost(rows: list[Row]) -> int:
    # The name is there twice while names are compared: as it is and as its key.
    return sum(_ROW + 2 * len(row.name) + len(row.target or b"") for row in rows)
