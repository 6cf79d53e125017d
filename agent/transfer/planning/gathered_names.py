"""The rows of a folder whose file system may take some of its names for one: held until all are known, within a bound.

A name costs about half a kibibyte until it is planned, the comparison included, so that two million fit.
"""

from __future__ import annotations

from collections.abc import Iterator

from protocol.errors import ItemFailed
from protocol.session import Row

# Bytes of memory, as they are reckoned here.
MOST = 1 << 30
MANY = 8 << 20
# A row with its numbers, its place in the list, and in the table of keys while names are compared.
_ROW = 500
# A folder is planned in pieces of so many rows, each of which is let go before the next.
_PIECE = 1000


class GatheredNames:
    """Rows of one folder."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._cost = 0

    @property
    def are_many(self) -> bool:
        """Whether no other folder like this should be held beside it."""
        return self._cost > MANY

    def add_untrusted(self, rows: list[Row]) -> None:
        """Hold some more. Raises `ItemFailed` when the folder has too many."""
        # The name is there twice while names are compared: as it is and as its key.
        self._cost += sum(_ROW + 2 * len(row.name) + len(row.target or b"") for row in rows)
        if self._cost > MOST:
            raise ItemFailed(
                f"The folder has more names (about {len(self.rows):,} and more) than can be compared with each other, "
                "which the destination needs, as its file system does not tell case or Unicode forms apart. Divide it "
                "into several folders at the source, or choose a destination whose file system does.",
                code="TOO_MANY_NAMES",
                who="source owner",
            )
        self.rows += rows

    def taken(self) -> Iterator[list[Row]]:
        """All rows in pieces, in the order in which they came; they are held here no more."""
        self.rows.reverse()
        while self.rows:
            piece = self.rows[-_PIECE:]
            del self.rows[-_PIECE:]
            piece.reverse()
            yield piece
