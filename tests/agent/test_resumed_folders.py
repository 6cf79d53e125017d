"""A folder that an interrupted task goes on with, of more names than should be held in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from agent.storage.posix import open_root
from agent.transfer.basis.journal_rows import FAILED, TRANSFERRED
from agent.transfer.basis.patience import Patience
from agent.transfer.books.journal import Journal
from agent.transfer.planning.plan import DirectoryPlanner
from protocol.control import TaskOptions
from protocol.session import FILE, Row
from tests.agent.engine_inside import quick_path

__all__ = ["quick_path"]

NAMES = [b"%06d" % number for number in range(20_000)]
MESSAGE = 500


def messages() -> Iterator[list[Row]]:
    for start in range(0, len(NAMES), MESSAGE):
        yield [Row(name, FILE, 7, 0, 0, 1, int(name) + 1, 0o644) for name in NAMES[start : start + MESSAGE]]


def test_what_is_settled_is_told_apart_without_holding_its_names(quick_path: Path) -> None:
    """Of every ten names two are not settled, one has failed, and one was settled and is gone."""
    place = quick_path / "place"
    place.mkdir()
    outcomes = {name: FAILED if int(name) % 10 == 2 else TRANSFERRED for name in NAMES if int(name) % 10 > 1}
    for name, outcome in outcomes.items():
        if outcome == TRANSFERRED and int(name) % 10 != 3:
            (place / name.decode()).write_bytes(b"content")
    journal = Journal(quick_path / "journal.sqlite")
    with closing(journal), open_root(str(place)) as root:
        journal.add_directories([(0, b"", b"", 0, [])])
        row = journal.next_directory()
        assert row is not None
        journal.put_finished((row.id, name, outcome) for name, outcome in outcomes.items())
        journal.commit()
        planner = DirectoryPlanner(
            root, journal, TaskOptions(), row, prefix=b".towpath.t.", sweep=lambda _: None, patience=Patience()
        )
        again: list[bytes] = []
        tracemalloc.start()
        try:
            for rows in messages():
                planned = planner.take(rows)
                assert planned is not None
                again += [job.name for job in planned.copies]
                planned = None
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        planner.group.handle.close()
    assert again == [name for name in NAMES if int(name) % 10 in (0, 1, 3)]
    counts = planner.group.counts
    assert (counts.failed, counts.files_transferred) == (2_000, 12_000)
    # All names with what is known of them would be several times that.
    assert most < 1_500_000
