"""Which of several tasks lists which directory, until all are listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from agent.transfer.books.journal import Journal
from agent.transfer.planning.listing_queue import ListingQueue


class Counting(Journal):
    looks = 0

    def next_directory(self):  # type: ignore[no-untyped-def]
        self.looks += 1
        return super().next_directory()


@pytest.mark.parametrize("listers", [1, 4, 16])
async def test_every_directory_is_listed_once_and_seldom_looked_for(tmp_path: Path, listers: int) -> None:
    journal = Counting(tmp_path / "journal.sqlite")
    journal.add_directories([(0, b"", b"", 0, [])])
    queue = ListingQueue(journal)
    seen: list[bytes] = []

    def below(path: bytes) -> list[bytes]:
        # Four levels, three folders in each: 1 + 3 + 9 + 27 + 81.
        return [path + b"/%d" % number for number in range(3)] if path.count(b"/") < 4 else []

    async def lister() -> None:
        while row := await queue.take():
            seen.append(row.destination)
            await trio.lowlevel.checkpoint()
            children = below(row.destination)
            journal.add_directories([(0, path, path, 0, []) for path in children])
            if children:
                queue.added()
            queue.finished()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(listers):
                nursery.start_soon(lister)
    journal.close()
    assert len(seen) == len(set(seen)) == 121
    # One look for each directory and at most one more that finds nothing after each.
    assert journal.looks <= 2 * len(seen) + listers
