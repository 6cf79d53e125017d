"""One bit changes: in the journal, in the manifest, at the source while it is read, between the agents. It is found and
named, and what can be had again is had again."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from agent.transfer.basis.journal_rows import FAILED, TRANSFERRED, PartialRow
from agent.transfer.books.journal import Journal, open_or_rebuild
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.processes.channel import Event
from protocol.control import Counters
from tests.agent.engine_inside import quick_path

__all__ = ["quick_path"]

SEED = 20_260
FLIPS = 400
NAMES = [b"file-%d" % n for n in range(60)]


def written(path: Path) -> None:
    """A journal with rows of every kind, closed."""
    journal = Journal(path)
    journal.add_directories((0, b"source/%d" % n, b"destination/%d" % n, n, [(1, n)]) for n in range(40))
    taken = journal.next_directory()
    assert taken is not None
    for number in range(3):
        journal.finish_directory(number + 1)
    journal.put_finished((taken.id, name, FAILED if n % 7 == 0 else TRANSFERRED) for n, name in enumerate(NAMES))
    for number in range(5):
        row = PartialRow(b".towpath.x.%d" % number, (1, 2, 3, 4, number), 2**20, bytearray(b"\x55" * 100))
        journal.put_partial(taken.id, b"large-%d" % number, row)
    for number in range(20):
        journal.put_item(number, done=number % 2 == 0)
    journal.add_extras(b"destination", [b"extra-%d" % n for n in range(30)])
    for number in range(10):
        journal.put_event(Event(seq=number, code="X", description="d", details="", is_error=False, time="now"))
    journal.put_counters(Counters(files=7, bytes_transferred=2**40))
    journal.put_lengths(11, 22)
    journal.close()


def told(journal: Journal) -> list[object]:
    """Everything a journal says."""
    directories = list(journal.directories_deepest_first())
    return [
        directories,
        journal.unfinished_destinations(),
        [journal.finished(number, NAMES) for number in range(1, 41)],
        [journal.partial(number, b"large-%d" % n) for number in range(1, 41) for n in range(5)],
        journal.done_items(),
        journal.known_items(),
        list(journal.extras()),
        journal.events(),
        journal.counters(),
        journal.lengths(),
        journal.last_event(),
    ]


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit >> 3] ^= 1 << (bit & 7)
    return bytes(changed)


def open_flipped(path: Path, content: bytes, bit: int, before: list[object]) -> str:
    """What becomes of a journal with one bit changed; never that it says something else."""
    for leftover in path.parent.iterdir():
        leftover.unlink()
    path.write_bytes(flip(content, bit))
    try:
        journal, rebuilt = open_or_rebuild(path)
    except StateTrouble as error:
        return error.code
    try:
        if rebuilt:
            assert journal.counters() == Counters()
            return "rebuilt"
        assert told(journal) == before, f"bit {bit} is believed"
        return "of no meaning"
    finally:
        journal.close()


def recorded(folder: Path) -> tuple[Path, bytes, list[object]]:
    """A journal of a task: where it is, its bytes, and what it tells."""
    path = folder / "journals" / "journal"
    path.parent.mkdir()
    written(path)
    content = path.read_bytes()
    with closing(Journal(path)) as journal:
        return path, content, told(journal)


def test_a_flipped_bit_in_the_journal_is_never_believed(quick_path: Path) -> None:
    path, content, before = recorded(quick_path)
    random = Random(SEED)
    used = [place for place, byte in enumerate(content) if byte]
    # The header, and a sample of everything that holds something.
    bits = [*range(0, 800, 2), *(random.choice(used) * 8 + random.randrange(8) for _ in range(FLIPS))]
    ends = Counter(open_flipped(path, content, bit, before) for bit in bits)
    # A file that is no database any more may be refused by the system in other words; it is never used.
    assert set(ends) <= {"rebuilt", "of no meaning", "STATE_UNAVAILABLE"}
    assert ends["rebuilt"] > FLIPS * 0.8, ends
    print(f"seed {SEED}, bits flipped in the journal: {len(bits)}, {dict(ends)}")


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_every_bit_of_the_journal_that_holds_something(quick_path: Path) -> None:
    path, content, before = recorded(quick_path)
    bits = [place * 8 + bit for place, byte in enumerate(content) if byte for bit in range(8)]
    ends = Counter(open_flipped(path, content, bit, before) for bit in bits)
    assert set(ends) <= {"rebuilt", "of no meaning", "STATE_UNAVAILABLE"}
    print(f"bits flipped in the journal: {len(bits)}, {dict(ends)}")


def test_rows_are_what_the_checksums_guard(tmp_path: Path) -> None:
    """SQLite's own check does not see a value that changed: without the checksums this would be believed."""
    path = tmp_path / "journal"
    written(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE finished SET outcome = ? WHERE outcome = ?", (TRANSFERRED, FAILED))
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.commit()
    connection.close()
    journal, rebuilt = open_or_rebuild(path)
    journal.close()
    assert rebuilt
