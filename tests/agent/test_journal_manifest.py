"""Journals and manifests after every kind of damage; blocks of large files, and which of them are still missing."""

from __future__ import annotations

import gc
import os
import sqlite3
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.transfer.basis.compare import block_count, block_size, missing_ranges
from agent.transfer.basis.jobs import FileJob, Group, LargeFile
from agent.transfer.basis.journal_rows import TRANSFERRED, PartialRow
from agent.transfer.books.journal import Journal, open_or_rebuild
from agent.transfer.books.journal_format import VERSION
from agent.transfer.books.manifest import (
    ROWS_IN_FRAME,
    ManifestDamaged,
    ManifestPage,
    ManifestWriter,
    TransferredRow,
    read_page,
)
from agent.transfer.books.record import Record
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.events import EventLog
from agent.transfer.processes.channel import Event
from protocol.control import Counters
from protocol.session import FILE, Row

PARTIAL = PartialRow(b".temporary", (1, 2, 3, 4, 5), 1024, bytearray(b"\x05"))


@pytest.mark.parametrize(
    ("done", "earlier", "hidden"),
    [(b"\x05", b"", False), (b"\x07", b"", True), (b"\0", b"\0", True), (b"\1", b"\4", True)],
)
def test_parts_that_agents_of_before_would_misunderstand_are_of_no_file_to_them(
    tmp_path: Path, done: bytes, earlier: bytes, hidden: bool
) -> None:
    """They took one of which nothing is done for a new one, and waited for ever for what is missing of a whole one."""
    journal = Journal(tmp_path / "journal")
    part = PartialRow(b".temporary", (1, 2, 2049, 4, 5), 1024, bytearray(done), (7, 8), earlier)
    journal.put_partial(1, b"large", part)
    assert journal.partial(1, b"large") == part
    assert journal.partials(1) == [part]
    (row,) = journal._connection.execute("SELECT version FROM partial").fetchall()
    assert (msgspec.msgpack.decode(row[0]) != list(part.version)) == hidden
    journal.drop_partial(1, b"large")
    assert journal._connection.execute("SELECT key FROM meta WHERE key LIKE '%temporary'").fetchall() == []
    journal.close()


def filled(path: Path, directories: int = 500) -> None:
    """A journal of some pages, closed."""
    journal = Journal(path)
    journal.add_directories((0, b"s/%d" % n, b"d/%d" % n, n, [(1, n)]) for n in range(directories))
    journal.put_counters(Counters(files=7, bytes_transferred=2**40))
    journal.put_lengths(11, 22)
    journal.close()


def fill(journal: Journal, *, full: bool = True) -> None:
    """Let the disk of a journal be full, or have room again."""
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0] if full else 2**30
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")


def set_format(path: Path, version: int) -> None:
    """What a newer agent does to a closed journal."""
    journal = Journal(path)
    journal.put("format", b"%d" % version)
    journal.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()


# --- journal ---------------------------------------------------------------------------------------------


def test_a_journal_knows_whether_anything_goes_below_a_folder(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.add_directories([(0, b"", b"one", 0, []), (0, b"", b"two/below/\xff", 0, []), (0, b"", b"two0", 0, [])])
    there = [b"one", b"two", b"two/below", b"two/below/\xff", b"on", b"one/x", b"tw", b"two/b", b"", b"three"]
    assert [path for path in there if journal.has_directory(path)] == there[:4]
    journal.close()


def test_a_journal_is_asked_for_the_names_that_are_wanted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    names = [b"%d" % number for number in range(1234)]
    journal.put_finished((1, name, TRANSFERRED) for name in names)
    journal.put_finished([(2, b"elsewhere", TRANSFERRED)])
    assert journal.finished(1, [*names[::2], b"elsewhere"]) == dict.fromkeys(names[::2], TRANSFERRED)
    assert journal.finished(1, []) == {}
    assert [journal.has_finished(directory) for directory in (1, 2, 3)] == [True, True, False]
    journal.close()


def test_a_journal_that_a_full_disk_has_taken_something_back_from_takes_no_more(tmp_path: Path) -> None:
    """SQLite takes back the whole transaction. A folder must not be done by what is written after that, when those in
    it are not to be listed any more."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.add_directories([(0, b"s", b"d", 0, [])])
    journal.commit()
    taken = journal.next_directory()
    assert taken is not None
    journal.add_directories([(0, b"s/x", b"d/x", 0, [])])
    fill(journal)
    with pytest.raises(StateTrouble) as full:
        journal.put("key", bytes(100_000))
    assert full.value.code == "NO_SPACE"
    fill(journal, full=False)
    for use in (lambda: journal.finish_directory(taken.id), journal.next_directory, journal.commit, journal.close):
        with pytest.raises(StateTrouble) as after:
            use()
        assert after.value.code == "NO_SPACE"
    journal.close()

    journal = Journal(path)
    assert journal.next_directory() == taken
    assert journal.next_directory() is None
    journal.close()


def test_a_journal_is_found_again_as_it_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.add_directories([(3, b"s", b"d", 9, [(1, 2)]), (3, b"s/x", b"d/x", 9, [(1, 2), (1, 3)])])
    taken = journal.next_directory()
    assert taken is not None
    assert (taken.source, taken.ancestry) == (b"s/x", [(1, 2), (1, 3)])
    journal.put_finished([(taken.id, b"\xff name", TRANSFERRED)])
    journal.put_partial(taken.id, b"large", PARTIAL)
    journal.put_item(3, done=True)
    journal.put_item(4, done=False)
    counters = Counters(files=2, bytes_total=2**50, scan_complete=True)
    journal.put_counters(counters)
    journal.put_lengths(100, 7)
    journal.put_event(Event(seq=5, code="STARTED", description="", details="", is_error=False, time="now"))
    journal.close()
    journal.close()

    journal, rebuilt = open_or_rebuild(path)
    assert not rebuilt
    assert journal.counters() == counters
    assert journal.lengths() == (100, 7)
    assert (journal.done_items(), journal.known_items()) == ({3}, {3, 4})
    assert journal.has_finished(taken.id)
    assert journal.finished(taken.id, [b"other", b"\xff name"]) == {b"\xff name": TRANSFERRED}
    assert journal.partial(taken.id, b"large") == PARTIAL
    assert journal.partial_temporaries(taken.id) == {b".temporary"}
    assert [event.seq for event in journal.events()] == [5]
    assert journal.last_event() == 5
    assert journal.reopen_directories() == 1
    assert journal.next_directory() == taken
    journal.finish_directory(taken.id)
    assert not journal.has_finished(taken.id)
    assert journal.finished(taken.id, [b"\xff name"]) == {}
    assert journal.partial(taken.id, b"large") is None
    assert journal.unfinished_destinations() == [b"d"]
    assert [row[0] for row in journal.directories_deepest_first()] == [b"d/x", b"d"]
    journal.drop_event(5)
    assert journal.events() == []
    assert journal.last_event() == 5
    journal.close()


def test_an_event_that_the_daemon_has_says_nothing_of_earlier_ones(tmp_path: Path) -> None:
    """The line to it may have been full for one of them, which is told again at the next start."""
    journal = Journal(tmp_path / "journal")
    log = EventLog(journal, lambda _: None)
    for code in ("STARTED", "LOST_ON_THE_WAY", "LATER"):
        log.add(code, code.lower())
    for seq in (1, 3):
        journal.drop_event(seq)
    again: list[Event] = []
    EventLog(journal, again.append).tell_again()
    assert [event.code for event in again] == ["LOST_ON_THE_WAY"]
    journal.close()


def test_what_could_not_be_written_down_does_not_count_for_those_who_write_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest cannot be synced, and before the run ends another thread notes a block of a large file."""
    journal = Journal(tmp_path / "journal")
    manifests = ManifestWriter(tmp_path / "transferred", 0), ManifestWriter(tmp_path / "skipped", 0)
    record = Record(journal, manifests, verify=True, now=lambda: "now")
    group = Group(1, b"", b"", None, [], planned=3)  # type: ignore[arg-type]
    small, large, whole = (
        FileJob(group, 0, Row(name, FILE, size, 0, 0, 0, 0, 0), name, name, True)
        for name, size in ((b"small", 7), (b"large", 3000), (b"whole", 2000))
    )

    def refuse() -> None:
        raise StateTrouble("It cannot be written.")

    complete = LargeFile(whole, b".temporary", -1, 1000, bytearray(b"\x03"), 2, 1000, last_check=1000)
    for owner, name in ((manifests[0], "sync"), (journal, "commit")):
        with monkeypatch.context() as failing:
            failing.setattr(owner, name, refuse)
            with pytest.raises(StateTrouble):
                record.settled([(small, None), (whole, None)], [], [], [complete], [])
        record.part_settled(LargeFile(large, b".temporary", -1, 1000, bytearray(b"\x01"), 1), 1000)
    assert record.settled_bytes == int(journal.get("settled") or b"0") == 2000
    record.settled([(small, None)], [], [], [complete], [])
    assert record.settled_bytes == 3007
    journal.close()
    for manifest in manifests:
        manifest.close()


def test_what_was_not_committed_is_gone_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.put_counters(Counters(files=1))
    journal.commit()
    journal.put_counters(Counters(files=2))
    # What a crash leaves: the files as they are now.
    crashed = tmp_path / "crashed"
    for suffix in ("", "-wal"):
        crashed.with_name(crashed.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    journal.close()
    after, rebuilt = open_or_rebuild(crashed)
    assert (rebuilt, after.counters().files) == (False, 1)
    after.close()


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


def zero_pages(content: bytes) -> bytes:
    return content[:4096] + bytes(len(content) - 4096)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbage(content: bytes) -> bytes:
    return b"\xa5" * len(content)


def cut_header(content: bytes) -> bytes:
    return content[:50]


@pytest.mark.parametrize("damage", [zeros, zero_pages, truncated, garbage, cut_header])
def test_a_damaged_journal_is_put_aside_and_begun_anew(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "journal"
    filled(path)
    assert callable(damage)
    spoilt = damage(path.read_bytes())
    path.write_bytes(spoilt)
    journal, rebuilt = open_or_rebuild(path)
    assert rebuilt
    assert journal.counters() == Counters()
    assert journal.next_directory() is None
    journal.put_counters(Counters(files=1))
    journal.close()
    # The damaged one is kept for whoever wants to know.
    assert (tmp_path / "journal.damaged").read_bytes() == spoilt
    again, rebuilt = open_or_rebuild(path)
    assert (rebuilt, again.counters().files) == (False, 1)
    again.close()
    gc.collect()
    print(f"{getattr(damage, '__name__', damage)}: {len(spoilt)} bytes put aside, begun anew")


def test_an_empty_file_is_a_new_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    journal, rebuilt = open_or_rebuild(path)
    assert (rebuilt, journal.counters()) == (False, Counters())
    journal.close()


def test_a_journal_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path)
    set_format(path, VERSION + 1)
    before = path.read_bytes()
    with pytest.raises(StateTrouble) as raised:
        open_or_rebuild(path)
    assert raised.value.code == "JOURNAL_NEWER"
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.damaged*"))
    gc.collect()


# --- manifest --------------------------------------------------------------------------------------------


def rows(count: int) -> list[TransferredRow]:
    return [TransferredRow(b"s/%d" % n, b"d/%d" % n, n) for n in range(count)]


def write(path: Path, content: list[TransferredRow], *, frames: int = 1) -> int:
    writer = ManifestWriter(path, 0)
    step = -(-len(content) // frames)
    for start in range(0, len(content), step):
        writer.append(content[start : start + step])
    writer.sync()
    writer.close()
    writer.close()
    return writer.length


@pytest.mark.parametrize("limit", [1, 7, 10, 30, 1000])
def test_pages_hold_every_row_once_and_in_order(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "manifest"
    write(path, rows(30), frames=3)
    found: list[TransferredRow] = []
    marker: str | None = None
    for _ in range(40):
        page = read_page(path, TransferredRow, marker, limit)
        assert len(page.rows) <= limit
        found += page.rows
        marker = page.next_marker
        if marker is None:
            break
    assert found == rows(30)


def test_long_lists_are_cut_into_frames(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    write(path, rows(ROWS_IN_FRAME + 5))
    first = read_page(path, TransferredRow, None, ROWS_IN_FRAME)
    assert first.next_marker is not None
    assert read_page(path, TransferredRow, first.next_marker, 10).rows == rows(ROWS_IN_FRAME + 5)[-5:]


def test_a_torn_tail_is_not_read_and_cut_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    committed = write(path, rows(10))
    writer = ManifestWriter(path, committed)
    writer.append(rows(20))
    writer.close()
    whole = path.stat().st_size
    for size in reversed(range(committed, whole)):
        os.truncate(path, size)
        assert read_page(path, TransferredRow, None, 100) == ManifestPage(rows(10), None)
    path.write_bytes(path.read_bytes() + b"torn")
    writer = ManifestWriter(path, committed)
    assert path.stat().st_size == committed
    writer.append(rows(1))
    writer.close()
    assert read_page(path, TransferredRow, None, 100).rows == rows(10) + rows(1)


def test_a_manifest_shorter_than_its_journal_says_goes_on_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    length = write(path, rows(3))
    writer = ManifestWriter(path, length + 1000)
    assert (writer.length, writer.lost) == (length, True)
    writer.append(rows(1))
    writer.close()
    assert read_page(path, TransferredRow, None, 100).rows == rows(3) + rows(1)


def test_every_flipped_bit_of_a_frame_is_found(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    write(path, rows(3))
    content = path.read_bytes()
    for place in range(len(content) * 8):
        changed = bytearray(content)
        changed[place >> 3] ^= 1 << (place & 7)
        path.write_bytes(changed)
        with pytest.raises(ManifestDamaged):
            read_page(path, TransferredRow, None, 100, complete=True)
        try:
            page = read_page(path, TransferredRow, None, 100)
        except ValueError:
            continue
        # While somebody writes, a longer length looks like a frame still being written: no rows, never wrong ones.
        assert place < 32
        assert page == ManifestPage([], None)
    print(f"bits flipped in a manifest: {len(content) * 8}, all found")


def test_what_comes_before_the_damage_is_given_out(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    length = write(path, rows(3))
    writer = ManifestWriter(path, length)
    writer.append(rows(5))
    writer.close()
    content = bytearray(path.read_bytes())
    content[length + 20] ^= 4
    path.write_bytes(content)
    page = read_page(path, TransferredRow, None, 100)
    assert page.rows == rows(3)
    with pytest.raises(ManifestDamaged):
        read_page(path, TransferredRow, page.next_marker, 100)
    os.truncate(path, length + 3)
    assert read_page(path, TransferredRow, None, 100) == ManifestPage(rows(3), None)
    with pytest.raises(ManifestDamaged):
        read_page(path, TransferredRow, f"{length}.0", 100, complete=True)


@pytest.mark.parametrize("marker", ["x", "1", "-1.0", "0.-1", "0", ".", "1.x", "9" * 41 + ".0", "\u0663.\u0660", "3.0"])
def test_markers_that_were_never_given_out_are_refused(tmp_path: Path, marker: str) -> None:
    path = tmp_path / "manifest"
    write(path, rows(3))
    with pytest.raises(ValueError, match=r"manifest|marker"):
        read_page(path, TransferredRow, marker, 10)


def test_a_missing_manifest_has_no_rows(tmp_path: Path) -> None:
    assert read_page(tmp_path / "none", TransferredRow, None, 10) == ManifestPage([], None)


# --- missing ranges --------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.integers(0, 2000), st.integers(1, 64), st.integers(1, 8), st.data())
def test_missing_ranges_are_exactly_the_blocks_not_done(size: int, block: int, most: int, data: st.DataObject) -> None:
    count = block_count(size, block)
    done = data.draw(st.sets(st.integers(0, count - 1) if count else st.nothing()))
    bitmap = bytearray(-(-count // 8))
    for index in done:
        bitmap[index >> 3] |= 1 << (index & 7)
    ranges = missing_ranges(bitmap, size, block, most * block)
    covered: list[int] = []
    for offset, length in ranges:
        assert offset % block == 0
        assert 0 < length <= most * block
        assert length % block == 0 or offset + length == size
        covered += range(offset, offset + length)
    assert covered == [place for place in range(size) if place // block not in done]


@given(st.integers(1, 2**60))
def test_blocks_of_a_file_are_bounded(size: int) -> None:
    block = block_size(size)
    assert 1024 * 1024 <= block <= 16 * 1024 * 1024
    assert block_count(size, block) <= 64 * 1024 + 1 or block == 16 * 1024 * 1024
    assert (block_count(size, block) - 1) * block < size <= block_count(size, block) * block
