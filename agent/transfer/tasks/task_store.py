"""What the daemon remembers of its tasks: orders, observed states, sessions to serve, events to report.

One small SQLite file for all tasks; every method is one durable transaction and blocks. Event lines are numbered
without gaps and kept until the relay has closed their task, so a relay that was restored from a backup can ask again.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.state_files import make_private, pragmas
from agent.transfer.books.state_trouble import StateDamaged, StateTrouble, of_sqlite, put_aside
from protocol.control import AgentEvent, SessionAnswer, SessionOrder, TaskObserved, TaskOrder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, body BLOB NOT NULL, observed BLOB NOT NULL, answer BLOB, held INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    n INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, worker_seq INTEGER, body BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS events_of_task ON events (task, worker_seq);
DROP INDEX IF EXISTS events_of_worker;
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, body BLOB NOT NULL, expires REAL NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS sessions_by_expiry ON sessions (expires);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
# Values of `tasks.held` but 0: the owner holds this one up; or did so in a version that marked all tasks when the whole
# machine was paused.
_HELD, _HELD_BEFORE = 2, 1
# Of the tables above; what a later version makes of them is not for this one to guess. Indexes do not count: a version
# of before works with these, and makes `events_of_worker` anew, which lacks the lines without a number of a worker.
VERSION = 1


@dataclass(frozen=True)
class StoredTask:
    """A task as it was last written down."""

    order: TaskOrder
    observed: TaskObserved
    answer: SessionAnswer | None
    held: bool
    # A version of before held it up, alone or with all others.
    held_with_all: bool = False


class TaskStore:
    """All methods may be called from any thread, and raise `StateTrouble` when the file cannot be used now."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._closed = False
        make_private(path)
        try:
            self._connection = sqlite3.connect(path, timeout=10, check_same_thread=False, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise of_sqlite(error, path) from error
        try:
            with self._using():
                for pragma in pragmas(path.parent):
                    self._connection.execute(pragma)
                self._check_version()
                self._connection.executescript(_SCHEMA)
                if self._version() != VERSION:
                    # Said again it would be written, and synced, again.
                    self._connection.execute(f"PRAGMA user_version = {VERSION}")
                if self._connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    raise self._damaged()
            self._check_rows()
            with self._using():
                row = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
            self._last_event: int = row[0] if row else 0
        except BaseException:
            self._connection.close()
            raise

    def _damaged(self) -> StateDamaged:
        return StateDamaged(f"The agent's state file {self._path} is damaged.", who="destination owner")

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _check_version(self) -> None:
        if self._version() > VERSION:
            raise StateTrouble(
                f"The agent's state file {self._path} was written by a newer version of the agent. Install that one "
                "again; this one leaves the file as it is.",
                code="STATE_NEWER",
                who="destination owner",
            )

    def _check_rows(self) -> None:
        """SQLite looks after its pages, not after what is in them."""
        try:
            self.load()
            with self._using():
                sessions = self._connection.execute("SELECT body FROM sessions").fetchall()
                events = self._connection.execute("SELECT body FROM events")
                for (body,) in sessions:
                    msgspec.msgpack.decode(body, type=SessionOrder)
                for (body,) in events:
                    msgspec.msgpack.decode(body, type=AgentEvent)
        except msgspec.MsgspecError as error:
            raise self._damaged() from error

    @contextmanager
    def _using(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                # Some errors end the transaction by themselves; whatever is left of it must not catch the next call.
                if self._connection.in_transaction:
                    with suppress(sqlite3.DatabaseError):
                        self._connection.execute("ROLLBACK")
                raise of_sqlite(error, self._path) from error

    def close(self) -> None:
        """Later calls fail, but `events_after`, which has no more to say."""
        with self._using():
            self._closed = True
            self._connection.close()

    # --- tasks -----------------------------------------------------------------------------------------

    def load(self) -> list[StoredTask]:
        """Every task that is not closed, oldest first."""
        with self._using():
            rows = self._connection.execute("SELECT body, observed, answer, held FROM tasks ORDER BY rowid").fetchall()
        return [
            StoredTask(
                msgspec.msgpack.decode(body, type=TaskOrder),
                msgspec.msgpack.decode(observed, type=TaskObserved),
                None if answer is None else msgspec.msgpack.decode(answer, type=SessionAnswer),
                bool(held),
                held == _HELD_BEFORE,
            )
            for body, observed, answer, held in rows
        ]

    def put_order(self, order: TaskOrder, observed: TaskObserved, answer: SessionAnswer | None) -> None:
        """Keep an order, or its newer version, with what the task is now; with no answer the old one stays."""
        with self._using():
            self._connection.execute(
                "INSERT INTO tasks (id, body, observed, answer) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "body = excluded.body, observed = excluded.observed, answer = coalesce(excluded.answer, answer)",
                (
                    order.task_id,
                    msgspec.msgpack.encode(order),
                    msgspec.msgpack.encode(observed),
                    None if answer is None else msgspec.msgpack.encode(answer),
                ),
            )

    def put_answer(self, task_id: str, answer: SessionAnswer) -> None:
        """Keep what the source answered, so that a new worker need not ask."""
        with self._using():
            self._connection.execute(
                "UPDATE tasks SET answer = ? WHERE id = ?", (msgspec.msgpack.encode(answer), task_id)
            )

    def put_held(self, task_id: str, *, held: bool) -> None:
        """Remember that the owner of this machine holds the task up, or does so no longer."""
        with self._using():
            self._connection.execute("UPDATE tasks SET held = ? WHERE id = ?", (_HELD if held else 0, task_id))

    def remove(self, task_id: str) -> None:
        """Forget a closed task with all of its lines; their numbers are never given again."""
        with self._using():
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM tasks WHERE id = ?", (task_id,))
            self._connection.execute("DELETE FROM events WHERE task = ?", (task_id,))
            self._connection.execute("COMMIT")

    # --- events ----------------------------------------------------------------------------------------

    def add_event(
        self, event: AgentEvent, *, worker_seq: int | None = None, observed: TaskObserved | None = None
    ) -> bool:
        """Number and keep a line, with the state it reports. False when the worker had told it before."""
        with self._using():
            self._connection.execute("BEGIN IMMEDIATE")
            known = self._connection.execute(
                "SELECT 1 FROM events WHERE task = ? AND worker_seq = ?", (event.task_id, worker_seq)
            ).fetchone()
            number = self._last_event
            if known is None:
                added = self._connection.execute(
                    "INSERT INTO events (task, worker_seq, body) VALUES (?, ?, ?)",
                    (event.task_id, worker_seq, msgspec.msgpack.encode(event)),
                )
                number = added.lastrowid or number
            if observed is not None:
                self._connection.execute(
                    "UPDATE tasks SET observed = ? WHERE id = ?",
                    (msgspec.msgpack.encode(observed), event.task_id),
                )
            self._connection.execute("COMMIT")
            self._last_event = number
        return known is None

    def events_after(self, n: int, limit: int = 500) -> list[AgentEvent]:
        """Kept lines with a higher number, in order. A line's number is also its seq: it is unique for ever. A closed
        store has no more to say: whoever follows the lines may notice its end a moment later."""
        with self._using():
            if self._closed:
                return []
            rows = self._connection.execute(
                "SELECT n, body FROM events WHERE n > ? ORDER BY n LIMIT ?", (n, limit)
            ).fetchall()
        lines = []
        for number, body in rows:
            event = msgspec.msgpack.decode(body, type=AgentEvent)
            lines.append(msgspec.structs.replace(event, n=number, seq=number))
        return lines

    def last_worker_event(self, task_id: str) -> int:
        """The highest number that a worker of this task has given to an event."""
        with self._using():
            row = self._connection.execute("SELECT max(worker_seq) FROM events WHERE task = ?", (task_id,)).fetchone()
        return row[0] or 0

    def last_event(self) -> int:
        """The highest number that a line ever had here. Does not wait for whoever writes."""
        return self._last_event

    # --- sessions --------------------------------------------------------------------------------------

    def put_session(self, order: SessionOrder, expires: float, now: float) -> None:
        """Keep a session until a day after its ticket has run out (``expires``, Unix seconds)."""
        with self._using():
            self._connection.execute("DELETE FROM sessions WHERE expires < ?", (now - 86400,))
            self._connection.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)",
                (order.session_id, msgspec.msgpack.encode(order), expires),
            )

    def session(self, session_id: str) -> SessionOrder | None:
        """The order of a session; None for one that is not known or was closed."""
        with self._using():
            row = self._connection.execute("SELECT body FROM sessions WHERE id = ?", (session_id,)).fetchone()
        return None if row is None else msgspec.msgpack.decode(row[0], type=SessionOrder)

    def serves_sessions(self, now: float) -> bool:
        """Whether there is a session whose ticket has not run out (Unix seconds)."""
        with self._using():
            found = self._connection.execute("SELECT 1 FROM sessions WHERE expires > ? LIMIT 1", (now,)).fetchone()
        return found is not None

    def remove_session(self, session_id: str) -> None:
        """Forget a session that was closed."""
        with self._using():
            self._connection.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    # --- odds ------------------------------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        """A value that belongs to no task, None for one that was never put."""
        with self._using():
            row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: str) -> None:
        """Set a value that belongs to no task."""
        with self._using():
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def open_or_begin(path: Path) -> tuple[TaskStore, bool]:
    """Open the store. One that is damaged is put aside and begun anew (True), and so is one that is gone or empty
    beside the tasks' folders: the relay gives the tasks again, and their journals know how far each one is.

    Raises `StateTrouble` for everything that is no damage.
    """
    empty = not path.exists() or not path.stat().st_size
    lost = empty and any(entry.is_dir() for entry in path.parent.iterdir())
    try:
        return TaskStore(path), lost
    except StateDamaged:
        put_aside(path)
        return TaskStore(path), True
