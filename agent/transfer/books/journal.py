"""The journal of one task: what is planned, settled and still in flight, so that any interruption costs little.

It lies beside nothing but itself (one SQLite file per task, used by one worker process). What it says is done is done:
content is on disk and verified before `commit` is called. What it does not say is found again by listing
and comparing. Planner and settler threads share one connection behind a lock; everything since the last commit may be
lost in a crash and is then simply planned again.

Every row carries a checksum over its table and values (`agent.transfer.books.journal_format`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from agent.storage.base import PartMark
from agent.transfer.basis.journal_rows import (
    COUNTED_BEFORE,
    FAILED,
    LIST_FATE,
    SKIPPED,
    DirectoryRow,
    HardLinkRow,
    PartialRow,
    bytes_done,
)
from agent.transfer.books.journal_file import JournalFile
from agent.transfer.books.state_trouble import StateDamaged, put_aside
from agent.transfer.processes.channel import Event
from protocol.control import Counters
from protocol.session import Version

# The last two are of folders that are done, and listed once more for what is missing.
PENDING, ACTIVE, DONE, AGAIN, ACTIVE_AGAIN = range(5)
# Parameters of one question; SQLite before 3.32 takes no more than 999.
_NAMES_AT_ONCE = 500
# Of single items: done is 1.
_ENDED_WITHOUT = 2
# The version, as agents of before read it, of a part with blocks of an earlier one, which they would take for holes,
# and of one with all of its blocks, with which they would do nothing for ever: so they begin anew.
_OF_NO_FILE: Version = (0, 0, 0, 0, 0)
_DIRECTORY = "id, item, source, destination, mtime_ns, ancestry"
_SET_STATE = (
    "UPDATE directories SET state = ?1, crc = crc_of('directories', item, source, destination, mtime_ns, ancestry, ?1)"
)


class Journal(JournalFile):
    """One open journal: its tables. As `JournalFile`, every method raises `StateTrouble`."""

    # --- items -----------------------------------------------------------------------------------------

    def done_items(self) -> set[int]:
        """Indices of items that need nothing more."""
        with self._using():
            return {row[0] for row in self._connection.execute("SELECT id FROM items WHERE done = 1")}

    def known_items(self) -> set[int]:
        """Indices of items that were resolved to directories."""
        with self._using():
            return {row[0] for row in self._connection.execute("SELECT id FROM items")}

    def put_item(self, index: int, *, done: bool, failed: bool = False) -> None:
        """Note a single item of the order as settled (perhaps without its file), or as begun."""
        state = _ENDED_WITHOUT if failed else int(done)
        with self._using():
            self._connection.execute(
                "INSERT OR REPLACE INTO items VALUES (?1, ?2, crc_of('items', ?1, ?2))", (index, state)
            )

    def failed_items(self, items: Sequence[int]) -> set[int]:
        """Which of these single items have ended without their files, as far as they are not done."""
        if not items:
            return set()
        with self._using():
            rows = self._connection.execute(
                "SELECT directory FROM finished WHERE directory BETWEEN ? AND ? AND outcome % ? IN (?, ?)",
                (-1 - max(items), -1 - min(items), LIST_FATE, FAILED, SKIPPED),
            )
            return {-1 - directory for (directory,) in rows}

    def reopen_items(self, items: Iterable[int]) -> None:
        """What was brought for these single items is not there any more."""
        with self._using():
            self._connection.executemany("DELETE FROM items WHERE id = ?", ((item,) for item in items))

    # --- directories -----------------------------------------------------------------------------------

    def start_over(self) -> None:
        """Forget what is planned and settled: it was for another place. Events stay."""
        with self._using():
            for table in ("items", "directories", "finished", "partial", "extras", "hard_links"):
                self._connection.execute(f"DELETE FROM {table}")  # noqa: S608
            self.put_counters(Counters())
            self.put_settled(0)
            self.forget_counted()
            self.forget_left_behind()

    def moved(self) -> list[bytes]:
        """Folders of the destination that were not in their places any more when all had arrived in them."""
        value = self.get("moved")
        return [] if value is None else msgspec.msgpack.decode(value, type=list[bytes])

    def note_moved(self, destination: bytes) -> None:
        """Note one, for the beginning of the next run."""
        with self._using():
            self.put("moved", msgspec.msgpack.encode([*self.moved(), destination]))

    def reopen_below(self, destination: bytes, items: Sequence[int]) -> None:
        """What was settled in a folder and below it, and of these ``items``, is there no more: all of that is listed
        again. Only between two runs."""
        known = "SELECT id FROM directories WHERE destination = ? OR (destination > ? AND destination < ?)"
        with self._using():
            rows = self._connection.execute(known, (destination, destination + b"/", destination + b"0")).fetchall()
            for directory in (row[0] for row in rows):
                self._connection.execute(f"{_SET_STATE} WHERE id = ?2", (PENDING, directory))
                self._connection.execute("DELETE FROM finished WHERE directory = ?", (directory,))
            for item in items:
                self._connection.execute("DELETE FROM finished WHERE directory = ?", (-1 - item,))
            self.reopen_items(items)

    def forget_moved(self) -> None:
        """All of them are listed again."""
        with self._using():
            self._connection.execute("DELETE FROM meta WHERE key = 'moved'")

    def reopen_directories(self) -> int:
        """At the start of a run: directories that were being worked on must be listed again."""
        with self._using():
            cursor = self._connection.execute(f"{_SET_STATE} WHERE state = ?2", (PENDING, ACTIVE))
            self._connection.execute(f"{_SET_STATE} WHERE state = ?2", (AGAIN, ACTIVE_AGAIN))
            return cursor.rowcount

    def add_directories(self, rows: Iterable[tuple[int, bytes, bytes, int, list[tuple[int, int]]]]) -> None:
        """Remember directories to list: item, source, destination, mtime_ns, ancestry. Known ones stay as they are."""
        encode = msgspec.msgpack.encode
        with self._using():
            self._connection.executemany(
                "INSERT OR IGNORE INTO directories (item, source, destination, mtime_ns, ancestry, state, crc) "
                "VALUES (?1, ?2, ?3, ?4, ?5, 0, crc_of('directories', ?1, ?2, ?3, ?4, ?5, 0))",
                ((item, source, destination, mtime, encode(up)) for item, source, destination, mtime, up in rows),
            )

    def next_directory(self) -> DirectoryRow | None:
        """Take the newest directory that waits (depth first keeps few waiting), or None."""
        with self._using():
            return self._take_directory(PENDING, ACTIVE) or self._take_directory(AGAIN, ACTIVE_AGAIN)

    def _take_directory(self, waits: int, taken: int) -> DirectoryRow | None:
        row = self._connection.execute(
            f"SELECT {_DIRECTORY} FROM directories "  # noqa: S608 - names of this file
            "WHERE state = ? ORDER BY id DESC LIMIT 1",
            (waits,),
        ).fetchone()
        if row is None:
            return None
        self._connection.execute(f"{_SET_STATE} WHERE id = ?2", (taken, row[0]))
        return _directory(row, again=taken == ACTIVE_AGAIN)

    def item_folders(self) -> set[tuple[int, int]]:
        """Device and inode, at the source, of the folders that items name."""
        with self._using():
            rows = self._connection.execute("SELECT ancestry, MIN(id) FROM directories GROUP BY item").fetchall()
        return {msgspec.msgpack.decode(row[0], type=list[tuple[int, int]])[0] for row in rows}

    def has_directory(self, destination: bytes) -> bool:
        """Whether a directory of the destination, or one below it, is among those to list."""
        with self._using():
            row = self._connection.execute(
                "SELECT 1 FROM directories WHERE destination = ? OR destination > ? AND destination < ? LIMIT 1",
                (destination, destination + b"/", destination + b"0"),
            ).fetchone()
            return row is not None

    def listed(self) -> Iterator[list[DirectoryRow]]:
        """Every directory, some at a time. States may be changed meanwhile."""
        last = 0
        while True:
            with self._using():
                rows = self._connection.execute(
                    f"SELECT {_DIRECTORY} FROM directories WHERE id > ? ORDER BY id LIMIT 250",  # noqa: S608 - as above
                    (last,),
                ).fetchall()
            if not rows:
                return
            yield list(map(_directory, rows))
            last = rows[-1][0]

    def put_time(self, directory: int, mtime_ns: int) -> None:
        """A directory that is being listed has this mtime_ns."""
        with self._using():
            self._connection.execute(
                "UPDATE directories SET mtime_ns = ?2, "
                "crc = crc_of('directories', item, source, destination, ?2, ancestry, state) WHERE id = ?1",
                (directory, mtime_ns),
            )

    def list_again(self, directories: Iterable[DirectoryRow]) -> int:
        """Directories that are done, and have this mtime_ns and ancestry by now, are to be listed once more in the next
        run, but for those that could not be listed and count as failed: so many."""
        with self._using():
            return self._connection.executemany(
                "UPDATE directories SET state = ?4, mtime_ns = ?2, ancestry = ?3, "
                "crc = crc_of('directories', item, source, destination, ?2, ?3, ?4) WHERE id = ?1 "
                "AND NOT EXISTS (SELECT 1 FROM finished WHERE directory = ?1 AND name = x'2e')",
                ((row.id, row.mtime_ns, msgspec.msgpack.encode(row.ancestry), AGAIN) for row in directories),
            ).rowcount

    def unfinished_destinations(self) -> list[bytes]:
        """Destination directories in which temporaries of this task may lie."""
        with self._using():
            rows = self._connection.execute("SELECT destination FROM directories WHERE state != ?", (DONE,))
            return [row[0] for row in rows]

    def finish_directory(self, directory: int, *, failures: bool = False) -> None:
        """A directory is done: what was noted of its files is of no use any more, but for failures, which are not tried
        once more when it is listed again."""
        with self._using():
            self._connection.execute(f"{_SET_STATE} WHERE id = ?2", (DONE, directory))
            if failures:
                self._connection.execute(
                    "UPDATE finished SET outcome = outcome + ?2, "
                    "crc = crc_of('finished', directory, name, outcome + ?2) "
                    "WHERE directory = ?1 AND outcome < ?2 AND outcome % ?3 IN (?4, ?5)",
                    (directory, COUNTED_BEFORE, LIST_FATE, FAILED, SKIPPED),
                )
            self._connection.execute(
                "DELETE FROM finished WHERE directory = ? AND outcome < ?", (directory, COUNTED_BEFORE)
            )
            self._forget_marks(
                self._connection.execute(
                    "DELETE FROM partial WHERE directory = ? RETURNING temporary", (directory,)
                ).fetchall()
            )

    def directories_deepest_first(self) -> Iterator[tuple[bytes, int, int]]:
        """Destination path, mtime_ns and item of every directory, children before parents."""
        last = None
        while True:
            with self._using():
                rows = self._connection.execute(
                    "SELECT id, destination, mtime_ns, item FROM directories WHERE id < ? ORDER BY id DESC LIMIT 1000",
                    (last if last is not None else 2**62,),
                ).fetchall()
            if not rows:
                return
            for row in rows:
                yield row[1], row[2], row[3]
            last = rows[-1][0]

    # --- files -----------------------------------------------------------------------------------------

    def has_finished(self, directory: int) -> bool:
        """Whether anything in a directory is settled already that is not done."""
        with self._using():
            found = self._connection.execute("SELECT 1 FROM finished WHERE directory = ? LIMIT 1", (directory,))
            return found.fetchone() is not None

    def finished(self, directory: int, names: Sequence[bytes]) -> dict[bytes, int]:
        """Which of these names in a directory are settled already, with their outcome."""
        found: dict[bytes, int] = {}
        for start in range(0, len(names), _NAMES_AT_ONCE):
            some = names[start : start + _NAMES_AT_ONCE]
            marks = ", ".join("?" * len(some))
            with self._using():
                found.update(
                    self._connection.execute(
                        f"SELECT name, outcome FROM finished WHERE directory = ? AND name IN ({marks})",  # noqa: S608 - marks
                        (directory, *some),
                    )
                )
        return found

    def finished_items(self) -> dict[int, int]:
        """Single items that are settled while their group was not, with their outcome."""
        with self._using():
            rows = self._connection.execute("SELECT directory, outcome FROM finished WHERE directory < 0")
            return {-1 - directory: outcome for directory, outcome in rows}

    def put_finished(self, rows: Iterable[tuple[int, bytes, int]]) -> None:
        """Note files as settled (directory, name, outcome) whose directory is not done yet."""
        with self._using():
            self._connection.executemany(
                "INSERT OR REPLACE INTO finished VALUES (?1, ?2, ?3, crc_of('finished', ?1, ?2, ?3))", rows
            )

    def partial(self, directory: int, name: bytes) -> PartialRow | None:
        """The large file in flight under this name, if there is one."""
        with self._using():
            row = self._connection.execute(
                "SELECT temporary, version, block, done FROM partial WHERE directory = ? AND name = ?",
                (directory, name),
            ).fetchone()
        return None if row is None else self._partial(row)

    def _partial(self, row: tuple[bytes, bytes, int, bytes]) -> PartialRow:
        part = PartialRow(row[0], msgspec.msgpack.decode(row[1], type=Version), row[2], bytearray(row[3]))
        mark, earlier = self.get(_mark_of(part.temporary)), self.get(_earlier_of(part.temporary))
        if mark is not None:
            part = msgspec.structs.replace(part, mark=msgspec.msgpack.decode(mark, type=PartMark))
        if part.version == _OF_NO_FILE and earlier is not None:
            version, blocks = msgspec.msgpack.decode(earlier, type=tuple[Version, bytes])
            part = msgspec.structs.replace(part, version=version, earlier=blocks)
        return part

    def partials(self, directory: int) -> list[PartialRow]:
        """All large files in flight in a directory."""
        with self._using():
            rows = self._connection.execute(
                "SELECT temporary, version, block, done FROM partial WHERE directory = ?", (directory,)
            ).fetchall()
        return list(map(self._partial, rows))

    def partial_temporaries(self, directory: int) -> set[bytes]:
        """Temporaries in a directory that hold blocks worth keeping."""
        return {row.temporary for row in self.partials(directory)}

    def all_partial_temporaries(self) -> frozenset[bytes]:
        """Those in all directories."""
        with self._using():
            return frozenset(row[0] for row in self._connection.execute("SELECT temporary FROM partial"))

    def put_partial(self, directory: int, name: bytes, row: PartialRow) -> None:
        """Note which blocks of a large file are written, checked and worth keeping."""
        hidden = bool(row.earlier) or bytes_done(row) == row.version[2]
        version = _OF_NO_FILE if hidden else row.version
        with self._using():
            self._connection.execute(
                "INSERT OR REPLACE INTO partial VALUES "
                "(?1, ?2, ?3, ?4, ?5, ?6, crc_of('partial', ?1, ?2, ?3, ?4, ?5, ?6))",
                (directory, name, row.temporary, msgspec.msgpack.encode(version), row.block, bytes(row.done)),
            )
            if row.mark is not None:
                self.put(_mark_of(row.temporary), msgspec.msgpack.encode(row.mark))
            if hidden:
                self.put(_earlier_of(row.temporary), msgspec.msgpack.encode((row.version, row.earlier)))
            else:
                self._connection.execute("DELETE FROM meta WHERE key = ?", (_earlier_of(row.temporary),))

    def drop_partial(self, directory: int, name: bytes) -> None:
        """Nothing is in flight under this name any more."""
        with self._using():
            rows = self._connection.execute(
                "DELETE FROM partial WHERE directory = ? AND name = ? RETURNING temporary", (directory, name)
            ).fetchall()
            self._forget_marks(rows)

    def _forget_marks(self, temporaries: list[tuple[bytes]]) -> None:
        for (temporary,) in temporaries:
            keys = _mark_of(temporary), _earlier_of(temporary)
            self._connection.execute("DELETE FROM meta WHERE key IN (?, ?)", keys)

    # --- files with several names ----------------------------------------------------------------------

    def hard_links(self, sources: Iterable[tuple[int, int]]) -> dict[tuple[int, int], HardLinkRow]:
        """Which of these files (device and inode at the source) are here already."""
        found = {}
        with self._using():
            for source in sources:
                row = self._connection.execute(
                    "SELECT body FROM hard_links WHERE source = ?", (msgspec.msgpack.encode(source),)
                ).fetchone()
                if row is not None:
                    found[source] = msgspec.msgpack.decode(row[0], type=HardLinkRow)
        return found

    def put_hard_link(self, source: tuple[int, int], row: HardLinkRow) -> None:
        """Note where a file with several names is, for those of them that come later."""
        with self._using():
            self._connection.execute(
                "INSERT OR REPLACE INTO hard_links VALUES (?1, ?2, crc_of('hard_links', ?1, ?2))",
                (msgspec.msgpack.encode(source), msgspec.msgpack.encode(row)),
            )

    # --- extras ----------------------------------------------------------------------------------------

    def add_extras(self, destination: bytes, names: Iterable[bytes]) -> None:
        """Some of what a destination directory has and its source does not."""
        with self._using():
            self._connection.executemany(
                "INSERT OR IGNORE INTO extras VALUES (?1, ?2, crc_of('extras', ?1, ?2))",
                ((destination, name) for name in names),
            )

    def drop_extras(self, destination: bytes) -> int:
        """Whatever was noted of a destination directory no longer counts: so many names."""
        with self._using():
            return self._connection.execute("DELETE FROM extras WHERE destination = ?", (destination,)).rowcount

    def extras(self) -> Iterator[tuple[bytes, bytes]]:
        """Directory and name of everything a mirror is to delete. Rows may be dropped meanwhile."""
        last = (b"", b"")
        while True:
            with self._using():
                rows = self._connection.execute(
                    "SELECT destination, name FROM extras WHERE (destination, name) > (?, ?) "
                    "ORDER BY destination, name LIMIT 1000",
                    last,
                ).fetchall()
            if not rows:
                return
            yield from rows
            last = rows[-1]

    def note_source_hides(self) -> None:
        """The source does not show names that begin with a dot: those below what it lacks are none of a mirror's."""
        self.put("source_hides", b"1")

    def source_hides(self) -> bool:
        """Whether that was noted."""
        return self.get("source_hides") is not None

    def drop_extra(self, destination: bytes, name: bytes) -> None:
        """It is deleted, or is not to be."""
        with self._using():
            self._connection.execute("DELETE FROM extras WHERE destination = ? AND name = ?", (destination, name))

    # --- events ----------------------------------------------------------------------------------------

    def last_event(self) -> int:
        """The number of the newest event, 0 before there is one."""
        value = self.get("last_event")
        return 0 if value is None else int(value)

    def put_event(self, event: Event) -> None:
        """Keep an event until the daemon has it; events that must outlive a crash need a `commit`."""
        with self._using():
            self._connection.execute(
                "INSERT OR REPLACE INTO events VALUES (?1, ?2, crc_of('events', ?1, ?2))",
                (event.seq, msgspec.msgpack.encode(event)),
            )
            self.put("last_event", str(event.seq).encode())

    def events(self) -> list[Event]:
        """Events the daemon has not confirmed, in order."""
        with self._using():
            rows = self._connection.execute("SELECT body FROM events ORDER BY seq").fetchall()
        return [msgspec.msgpack.decode(row[0], type=Event) for row in rows]

    def drop_event(self, seq: int) -> None:
        """The daemon has this one; an earlier one may not have come to it."""
        with self._using():
            self._connection.execute("DELETE FROM events WHERE seq = ?", (seq,))


def _directory(row: tuple[int, int, bytes, bytes, int, bytes], *, again: bool = False) -> DirectoryRow:
    return DirectoryRow(*row[:5], msgspec.msgpack.decode(row[5], type=list[tuple[int, int]]), again=again)


def _mark_of(temporary: bytes) -> str:
    """Under which key a temporary's mark is kept: agents of before pass it over."""
    return f"part {temporary.decode('latin-1')}"


def _earlier_of(temporary: bytes) -> str:
    """The same for the blocks that it has of an earlier version, and its own version."""
    return f"earlier {temporary.decode('latin-1')}"


def open_or_rebuild(path: Path) -> tuple[Journal, bool]:
    """Open the journal; one that is damaged is put aside and begun anew (True): the task then lists and compares
    everything again instead of trusting it, and nothing under a final name is touched.

    Raises `StateTrouble` for everything that is no damage: a full disk, a newer format, another program.
    """
    try:
        return Journal(path), False
    except StateDamaged:
        put_aside(path)
        return Journal(path), True
