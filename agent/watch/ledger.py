"""What watch rules have handed over, kept on disk: no file is submitted twice, none is forgotten over a restart.

A batch is written down with the submission id it will have before anybody hears of it; submitted again after a crash
it is the same task.
"""

from __future__ import annotations

import functools
import sqlite3
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from agent.state_files import make_private, pragmas
from agent.storage.folding import fold_key
from agent.storage.node import Version
from agent.watch.rule import Path as RelativePath
from agent.watch.rule import Seen
from protocol.errors import RetryLater

LEDGER_FILE = "watch.sqlite"
MAX_BATCH = 1000
KEEP_DONE = 90 * 86400.0
# Files of one name that go to one place, or are moved into one folder.
MAX_NAMESAKES = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS handed (
    rule TEXT NOT NULL, path BLOB NOT NULL, version BLOB NOT NULL, PRIMARY KEY (rule, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY, rule TEXT NOT NULL, submission TEXT NOT NULL, items BLOB NOT NULL, state TEXT NOT NULL,
    task TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '', changed REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_by_state ON batches (rule, state);
CREATE TABLE IF NOT EXISTS runs (rule TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS places (
    place BLOB PRIMARY KEY, source BLOB NOT NULL, gone INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
"""


class Item(msgspec.Struct, frozen=True):
    """One file of a batch: its path below the watched folder, the version handed over, and where it goes."""

    path: tuple[bytes, ...]
    version: Version
    destination: str

    @property
    def seen(self) -> Seen:
        """As the scan saw it."""
        return Seen(self.path, self.version)


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Files handed over together. ``state``: new, submitted, done, failed."""

    id: int
    rule: str
    submission: str
    items: list[Item]
    state: str
    task: str
    attempts: int
    next_try: float
    reason: str


P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[Concatenate[Ledger, P], R]) -> Callable[Concatenate[Ledger, P], R]:
    """Have a method run while no other one does."""

    @functools.wraps(method)
    def locked(ledger: Ledger, /, *arguments: P.args, **named: P.kwargs) -> R:
        with ledger._lock:
            return method(ledger, *arguments, **named)

    return locked


class Ledger:
    """For all rules, from any thread. Raises `sqlite3.Error` when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        # One connection: what one rule writes in a transaction must not meet what another one does.
        self._lock = threading.RLock()
        make_private(path)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in pragmas(path.parent):
            self._db.execute(pragma)
        self._db.executescript(_SCHEMA)

    @_alone
    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    @_alone
    def fresh(self, rule: str, files: Sequence[Seen]) -> list[Seen]:
        """Those files whose present version was not handed over yet."""
        rows = []
        for seen in files:
            row = self._db.execute(
                "SELECT version FROM handed WHERE rule = ? AND path = ?", (rule, _key(seen.path))
            ).fetchone()
            if row is None or row[0] != msgspec.msgpack.encode(seen.version):
                rows.append(seen)
        return rows

    @_alone
    def hand_over(
        self, rule: str, items: Sequence[Item], now: float, *, source: bytes = b"", collection: str = ""
    ) -> list[Item]:
        """Make batches of these files; from now on they are known. They come back with the destinations that they get:
        one under which another file has gone has a number behind it. ``source`` names the folder that their paths
        begin in, ``collection`` where they go. Raises `RetryLater` where there are too many of one name."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            items = [self._placed(item, source, collection) for item in items]
            for start in range(0, len(items), MAX_BATCH):
                part = list(items[start : start + MAX_BATCH])
                self._db.execute(
                    "INSERT INTO batches (rule, submission, items, state, changed) VALUES (?, ?, ?, 'new', ?)",
                    (rule, str(uuid.uuid4()), msgspec.msgpack.encode(part), now),
                )
            self._db.executemany(
                "INSERT OR REPLACE INTO handed VALUES (?, ?, ?)",
                [(rule, _key(item.path), msgspec.msgpack.encode(item.version)) for item in items],
            )
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return items

    def _placed(self, item: Item, source: bytes, collection: str) -> Item:
        """The item with a destination that is no other file's. A file that has changed goes where it went before; one
        that came where another was deleted after its transfer is another one."""
        source = source + b"/" + _key(item.path)
        for number in range(MAX_NAMESAKES):
            destination = f"{item.destination}.{number}" if number else item.destination
            place = _place(collection, destination)
            row = self._db.execute("SELECT source, gone FROM places WHERE place = ?", (place,)).fetchone()
            if row is None:
                self._db.execute("INSERT INTO places (place, source) VALUES (?, ?)", (place, source))
            elif row != (source, 0):
                continue
            return msgspec.structs.replace(item, destination=destination)
        raise RetryLater(f"More than {MAX_NAMESAKES} files would have the name {item.destination} at the destination.")

    @_alone
    def let_go(self, item: Item, collection: str) -> None:
        """A file that has arrived is about to be deleted: what is there now is all there is of it."""
        self._db.execute("UPDATE places SET gone = 1 WHERE place = ?", (_place(collection, item.destination),))

    @_alone
    def open_batches(self, rule: str) -> list[Batch]:
        """Batches that are not finished, oldest first."""
        rows = self._db.execute(
            "SELECT id, rule, submission, items, state, task, attempts, next_try, reason FROM batches "
            "WHERE rule = ? AND state IN ('new', 'submitted') ORDER BY id",
            (rule,),
        )
        return [_batch(row) for row in rows]

    def submitted(self, batch: Batch, task: str, now: float) -> None:
        """The relay has taken the batch as this task."""
        self._update(batch, "state = 'submitted', task = ?, reason = ''", task, now)

    def put_off(self, batch: Batch, reason: str, until: float, now: float) -> None:
        """The relay could not be asked; the same submission is tried again later."""
        self._update(batch, "next_try = ?, reason = ?", until, reason, now)

    def again(self, batch: Batch, reason: str, until: float, now: float) -> None:
        """The task failed; a new one is submitted later."""
        changes = "state = 'new', task = '', submission = ?, attempts = attempts + 1, next_try = ?, reason = ?"
        self._update(batch, changes, str(uuid.uuid4()), until, reason, now)

    @_alone
    def finished(self, batch: Batch, state: str, reason: str, now: float) -> None:
        """The batch is ``done`` or has ``failed`` for good. Old finished batches are forgotten."""
        self._update(batch, "state = ?, reason = ?", state, reason, now)
        self._db.execute("DELETE FROM batches WHERE state = 'done' AND changed < ?", (now - KEEP_DONE,))

    @_alone
    def retry_failed(self, rule: str, now: float) -> int:
        """The owner wants failed batches tried again; how many."""
        rows = self._db.execute("SELECT id FROM batches WHERE rule = ? AND state = 'failed'", (rule,)).fetchall()
        for (number,) in rows:
            self._db.execute(
                "UPDATE batches SET state = 'new', task = '', submission = ?, attempts = 0, next_try = 0, changed = ? "
                "WHERE id = ?",
                (str(uuid.uuid4()), now, number),
            )
        return len(rows)

    @_alone
    def last_run(self, rule: str, now: float) -> float:
        """When a timed rule last ran; a rule seen for the first time counts as having run now."""
        self._db.execute("INSERT OR IGNORE INTO runs VALUES (?, ?)", (rule, now))
        return float(self._db.execute("SELECT at FROM runs WHERE rule = ?", (rule,)).fetchone()[0])

    @_alone
    def ran(self, rule: str, now: float) -> None:
        """A timed rule runs now."""
        self._db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (rule, now))

    @_alone
    def counts(self, rule: str) -> dict[str, int]:
        """Batches by state."""
        rows = self._db.execute("SELECT state, count(*) FROM batches WHERE rule = ? GROUP BY state", (rule,))
        return dict(rows.fetchall())

    @_alone
    def last_reason(self, rule: str) -> str:
        """Why the last batch that has trouble has it."""
        row = self._db.execute(
            "SELECT reason FROM batches WHERE rule = ? AND reason != '' AND state != 'done' "
            "ORDER BY changed DESC LIMIT 1",
            (rule,),
        ).fetchone()
        return str(row[0]) if row else ""

    @_alone
    def _update(self, batch: Batch, changes: str, *values: object) -> None:
        # The changes are written in this file.
        self._db.execute(f"UPDATE batches SET {changes}, changed = ? WHERE id = ?", (*values, batch.id))  # noqa: S608


def _key(path: RelativePath) -> bytes:
    return b"/".join(path)


def _place(collection: str, destination: str) -> bytes:
    """One key for all spellings that may be one name at the destination."""
    return collection.encode() + b"/" + b"/".join(fold_key(name.encode()) for name in destination.split("/") if name)


def _batch(row: Sequence[object]) -> Batch:
    number, rule, submission, items, *rest = row
    assert isinstance(items, bytes)
    return msgspec.convert(
        {
            "id": number,
            "rule": rule,
            "submission": submission,
            "items": msgspec.msgpack.decode(items, type=list[Item]),
            **dict(zip(("state", "task", "attempts", "next_try", "reason"), rest, strict=True)),
        },
        Batch,
        from_attributes=True,
    )
