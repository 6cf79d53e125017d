"""The file of a task's journal: opened, used by one thread at a time, in transactions; and the task's own values."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent.transfer.books import journal_format
from agent.transfer.books.state_trouble import StateDamaged, StateTrouble, of_sqlite
from protocol.control import Counters

# Seconds that another program may hold the journal before the task says so and waits.
BUSY_TIMEOUT = 5.0
# Temporaries that could not be removed and are remembered by name.
MOST_LEFT_BEHIND = 1000

# Under what begins so, the task's own values tell what single items were counted as; and what comes after those.
COUNTED = "counted "
_BEGIN_WITH_COUNTED = (COUNTED, "counted!")


class JournalFile:
    """One open file. Every method raises `StateTrouble` when it cannot be used, and from then on for ever: the caller
    closes everything and opens it again later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._closed = False
        # What has made it unusable.
        self._trouble: StateTrouble | None = None
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT, check_same_thread=False, isolation_level=None
            )
            try:
                journal_format.prepare(self._connection, path)
                self._connection.execute("BEGIN")
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.DatabaseError as error:
            raise of_sqlite(error, path) from error
        except UnicodeDecodeError as error:
            # SQLite names what it cannot read, in the bytes it found.
            raise StateDamaged(f"The agent's state file {path} is damaged.", who="destination owner") from error

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Hold the journal; trouble with it comes out as what it means. Raises `StateTrouble`."""
        with self._lock:
            if self._trouble is not None:
                raise self._trouble
            try:
                yield
            except sqlite3.DatabaseError as error:
                # SQLite has perhaps taken back all that was not committed, folders that are to be listed among it. What
                # others write after that would be durable at once, and say that the folders above are done.
                self._trouble = of_sqlite(error, self.path)
                raise self._trouble from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one thread writes within becomes durable in one step, whoever else commits."""
        with self._lock:
            yield

    def commit(self) -> None:
        """Make everything written so far durable."""
        with self._using():
            self._connection.execute("COMMIT")
            self._connection.execute("BEGIN")

    def close(self) -> None:
        """Commit and close. Safe to call twice.

        Raises `StateTrouble` when the commit failed, or anything before: what was not committed is planned again.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                with self._using():
                    if self._connection.in_transaction:
                        self._connection.execute("COMMIT")
            finally:
                self._connection.close()

    def abandon(self) -> None:
        """Close without a commit, after trouble: only what was committed before counts. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._connection.close()

    # --- meta ------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """One of the task's own values, None for one that was never put."""
        with self._using():
            row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def all_counted(self) -> list[tuple[str, bytes]]:
        """Keys that begin with `COUNTED`, and their values."""
        with self._using():
            like = "SELECT key, value FROM meta WHERE key >= ? AND key < ?"
            return self._connection.execute(like, _BEGIN_WITH_COUNTED).fetchall()

    def forget_counted(self) -> None:
        """Nothing of it counts any more."""
        with self._using():
            self._connection.execute("DELETE FROM meta WHERE key >= ? AND key < ?", _BEGIN_WITH_COUNTED)

    def put(self, key: str, value: bytes) -> None:
        """Set one of the task's own values; durable with the next commit."""
        with self._using():
            self._connection.execute(
                "INSERT OR REPLACE INTO meta VALUES (?1, ?2, crc_of('meta', ?1, ?2))", (key, value)
            )

    def counters(self) -> Counters:
        """What all finished directories and items add up to."""
        value = self.get("counters")
        return Counters() if value is None else msgspec.msgpack.decode(value, type=Counters)

    def put_counters(self, counters: Counters) -> None:
        """What the task has done so far; durable with the next commit."""
        self.put("counters", msgspec.msgpack.encode(counters))

    def settled(self) -> int:
        """Bytes of files, whole or not, that are durable."""
        return int(self.get("settled") or b"0")

    def put_settled(self, size: int) -> None:
        """How many there are now; durable with the next commit."""
        self.put("settled", str(size).encode())

    def lengths(self) -> tuple[int, int]:
        """How long the two manifests were at the last commit."""
        value = self.get("lengths")
        return (0, 0) if value is None else msgspec.msgpack.decode(value, type=tuple[int, int])

    def put_lengths(self, transferred: int, skipped: int) -> None:
        """How long the two manifests are now, in bytes; durable with the next commit."""
        self.put("lengths", msgspec.msgpack.encode((transferred, skipped)))

    def left_behind(self) -> list[tuple[bytes, bytes]]:
        """Folder and name of temporaries that could not be removed."""
        value = self.get("left_behind")
        return [] if value is None else msgspec.msgpack.decode(value, type=list[tuple[bytes, bytes]])

    def add_left_behind(self, folder: bytes, name: bytes) -> None:
        """Note one. Beyond the bound only that there are more is noted: all folders are looked at then."""
        with self._using():
            known = self.left_behind()
            if len(known) < MOST_LEFT_BEHIND:
                self.put("left_behind", msgspec.msgpack.encode([*known, (folder, name)]))
            else:
                self.put("left_behind_anywhere", b"1")

    def left_behind_anywhere(self) -> bool:
        """Whether there are more of them than `left_behind` names."""
        return self.get("left_behind_anywhere") is not None

    def forget_left_behind(self) -> None:
        """All of them are gone, or not ours to remove."""
        with self._using():
            self._connection.execute("DELETE FROM meta WHERE key IN ('left_behind', 'left_behind_anywhere')")
