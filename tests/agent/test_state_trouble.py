"""A task whose own state is damaged, newer, held or unwritable: it says so and goes on, and what has arrived stays."""

from __future__ import annotations

import os
import subprocess
import threading
import zlib
from pathlib import Path

import msgspec
import pytest

from agent.storage.faulty import Call
from agent.system.file_lock import try_lock
from agent.transfer import task_folder, task_runner
from agent.transfer.books.journal import Journal
from agent.transfer.books.journal_format import VERSION
from agent.transfer.books.state_trouble import StateTrouble
from protocol.control import TaskObserved, TaskOptions
from tests.agent.engine_inside import Engine, Line, contents, quick_path, tree, when
from tests.agent.small_disks import memory_disk, needs_root

__all__ = ["quick_path"]

MIB = 1024 * 1024


async def interrupted(base: Path) -> tuple[Engine, int]:
    """A task that was paused in the middle, and how many files were there by then."""

    paused = threading.Event()

    def pause(line: Line, observed: TaskObserved) -> None:
        if observed.counters.files_transferred > 50:
            line.want("pause")
            paused.set()

    def hold_back(call: Call) -> int | None:
        if call.operation == "open_read" and call.nth > 700:
            paused.wait(20)
        return None

    engine = Engine(base, TaskOptions(verify_checksum=True), on_report=pause, source_plan=hold_back)
    for folder in range(30):
        (engine.source / str(folder)).mkdir()
        for number in range(40):
            (engine.source / str(folder) / str(number)).write_bytes(b"%d of %d" % (number, folder) * 1000)
    before = await engine.run()
    assert 50 < before.counters.files_transferred < 1200
    return engine, before.counters.files_transferred


@pytest.mark.parametrize(
    "damage", ["zeros", *(pytest.param(one, marks=pytest.mark.soak) for one in ("half", "garbage"))]
)
async def test_a_damaged_journal_is_rebuilt_by_comparing(quick_path: Path, damage: str) -> None:
    engine, _ = await interrupted(quick_path)
    there = sum(1 for path in engine.destination.rglob("*") if path.is_file())
    journal = engine.state / "journal.sqlite"
    content = journal.read_bytes()
    journal.write_bytes(
        {"zeros": bytes(len(content)), "half": content[: len(content) // 2], "garbage": b"\xa5" * len(content)}[damage]
    )
    for suffix in ("-wal", "-shm"):
        journal.with_name(journal.name + suffix).unlink(missing_ok=True)
    after = engine.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert "JOURNAL_REBUILT" in after.codes()
    # The daemon must not take it for an event it knows.
    numbers = [event.seq for event in after.events]
    assert len(set(numbers)) == len(numbers)
    # What was there was compared, not sent again.
    assert observed.counters.files_skipped >= there
    assert observed.counters.files_transferred == 1200 - observed.counters.files_skipped
    assert contents(engine.destination) == contents(engine.source)
    print(f"files there: {there}, compared: {observed.counters.files_skipped}")


async def test_a_journal_of_a_newer_agent_is_said_and_waited_for(quick_path: Path) -> None:
    import sqlite3

    engine, _ = await interrupted(quick_path)
    journal = engine.state / "journal.sqlite"

    def version(number: int) -> None:
        connection = sqlite3.connect(journal)
        connection.create_function("crc_of", 3, lambda *values: zlib.crc32(msgspec.msgpack.encode(values)))
        connection.execute(
            "UPDATE meta SET value = ?1, crc = crc_of('meta', key, ?1) WHERE key = 'format'", (b"%d" % number,)
        ).fetchall()
        connection.execute(f"PRAGMA user_version = {number}")
        connection.commit()
        connection.close()

    version(99)
    after = engine.revived()
    after.on_report = when("JOURNAL_NEWER", lambda: version(VERSION))
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert "JOURNAL_REBUILT" not in after.codes()
    assert contents(engine.destination) == contents(engine.source)


async def goes_on_with_its_journal(engine: Engine, done: int) -> None:
    """A new run ends well, by the journal there is: none of the files that were done comes again."""
    after = engine.revived()
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert sum(call.operation == "rename" for call in after.calls) == 1200 - done
    assert "JOURNAL_REBUILT" not in after.codes()
    assert contents(engine.destination) == contents(engine.source)


async def test_a_journal_of_the_first_format_is_upgraded_and_gone_on_with(quick_path: Path) -> None:
    import sqlite3

    engine, done = await interrupted(quick_path)
    connection = sqlite3.connect(engine.state / "journal.sqlite")
    for table in ("meta", "items", "directories", "finished", "partial", "events"):
        connection.execute(f"ALTER TABLE {table} DROP COLUMN crc")
    connection.executescript(
        "DELETE FROM meta WHERE key = 'format'; DROP TABLE extras; DROP TABLE hard_links; PRAGMA user_version = 1;"
    )
    connection.close()
    await goes_on_with_its_journal(engine, done)


async def test_a_journal_of_the_format_before_hard_links_is_upgraded_and_gone_on_with(quick_path: Path) -> None:
    import sqlite3

    engine, done = await interrupted(quick_path)
    connection = sqlite3.connect(engine.state / "journal.sqlite")
    connection.create_function("crc_of", 3, lambda *values: zlib.crc32(msgspec.msgpack.encode(values)))
    connection.execute("UPDATE meta SET value = ?1, crc = crc_of('meta', key, ?1) WHERE key = 'format'", (b"3",))
    connection.commit()
    connection.executescript("DROP TABLE hard_links; PRAGMA user_version = 3;")
    connection.close()
    await goes_on_with_its_journal(engine, done)


async def test_a_journal_that_another_program_holds_is_said_and_waited_for(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    monkeypatch.setattr("agent.transfer.books.journal_file.BUSY_TIMEOUT", 0.01)
    engine, _ = await interrupted(quick_path)
    holder = sqlite3.connect(engine.state / "journal.sqlite", isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    after = engine.revived()
    after.on_report = when("STATE_UNAVAILABLE", holder.close)
    observed = await after.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


@needs_root
async def test_a_state_directory_that_can_only_be_read_is_said_and_waited_for(tmp_path: Path) -> None:
    """As after a fault of its disk, in the middle of a task; it goes on where it was when its owner has mended that."""
    with memory_disk(tmp_path / "state", 16):

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", tmp_path / "state"], check=True)

        engine, there = await interrupted(tmp_path)
        remount("ro")
        after = engine.revived()
        after.on_report = when("STATE_UNAVAILABLE", lambda: remount("rw"))
        observed = await after.run()
        assert observed.state == "SUCCEEDED", observed
        assert "STATE_UNAVAILABLE" in {report.status_code for report in after.reports}
        assert "JOURNAL_REBUILT" not in after.codes()
        assert (observed.counters.files_transferred, observed.counters.files_skipped) == (1200, 0)
        assert contents(after.destination) == contents(after.source)
        print(f"files before: {there}, bytes sent again: {observed.counters.bytes_sent_again}")


@pytest.mark.parametrize("desired", ["run", "cancel", "pause"])
async def test_an_earlier_worker_that_does_not_end_is_told_of_and_stands_in_nobodys_way(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, desired: str
) -> None:
    """It hangs in a file server: the task said nothing, and could be neither paused nor cancelled."""
    monkeypatch.setattr(task_folder, "LOCK_PATIENCE", 0.05)
    monkeypatch.setattr(task_runner, "LOOK_AGAIN", 0.05)

    def told(line: Line, observed: TaskObserved) -> None:
        if observed.status_code == "STATE_BUSY" and not said:
            said.append(observed.state)
            if desired == "run":
                os.close(earlier)
            else:
                line.want(desired)

    said: list[str] = []
    engine = Engine(quick_path, on_report=told)
    (engine.source / "file").write_bytes(b"content")
    earlier = os.open(engine.state / "lock", os.O_RDWR | os.O_CREAT)
    assert try_lock(earlier)
    observed = await engine.run()
    assert said == ["WAITING"]
    assert observed.state == {"run": "SUCCEEDED", "cancel": "CANCELED", "pause": "PAUSED"}[desired]
    # What is over waits for nothing, and nobody need mend anything for it.
    waits = ("STATE_BUSY", "destination owner") if desired == "pause" else ("OK", "")
    assert (observed.status_code, observed.who) == waits
    assert bool(observed.status_sentence) is (desired == "pause")
    if desired != "run":
        os.close(earlier)


@pytest.mark.parametrize("when_made", [1, 5, 15])
async def test_no_folder_is_forgotten_when_the_journal_cannot_take_something(quick_path: Path, when_made: int) -> None:
    """An event that finds the disk full for a moment takes all with it that was not committed: which folders are to be
    listed. The folders above were done all the same, and the task succeeded without what is in them."""
    journals: list[Journal] = []
    trouble: list[StateTrouble] = []

    def no_room(call: Call) -> int | None:
        if (call.operation, call.nth) == ("mkdir", when_made):
            limit = "PRAGMA max_page_count = "
            with journals[-1].together():
                journals[-1]._connection.execute(f"{limit}1")
                try:
                    journals[-1].put("event", bytes(100_000))
                except StateTrouble as error:
                    trouble.append(error)
                journals[-1]._connection.execute(f"{limit}1000000")
        return None

    def note(journal: Journal, path: Path) -> None:
        made(journal, path)
        journals.append(journal)

    made = Journal.__init__
    engine = Engine(quick_path, TaskOptions(verify_checksum=True), plan=no_room)
    tree(engine.source, [f"{one}/{two}/{three}" for one in range(4) for two in range(3) for three in range(2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "__init__", note)
        observed = await engine.run()
    assert [error.code for error in trouble] == ["NO_SPACE"]
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert observed.counters.files == 24
