"""The relay's database: what is written here is safe when `write` returns.

Work is a plain function of a SQLAlchemy connection. It runs in a bounded number of threads, never on the trio
loop, and as one transaction: all of it or nothing. Readers see one consistent state and cannot write.

SQLite runs with a write-ahead log and ``synchronous=FULL``: an acknowledged write survives SIGKILL and power loss.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
import trio
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url

from protocol.errors import NeedsPerson, RetryLater
from relay.quota.turns import Turns

# Longer than any transaction of ours takes; the administrator's commands write beside a running relay.
BUSY_TIMEOUT_MS = 15_000

T = TypeVar("T")

# What the request or command in progress adds to each of its transactions that change something, right before the
# commit: it gets the connection and the result of the work, and its effect stands or falls with that of the work.
companion: ContextVar[Callable[[Connection, object], None] | None] = ContextVar("companion", default=None)
# For whom the request in progress asks: a person, a program, or as long as neither is known an address. Empty for the
# relay's own work.
asking: ContextVar[str] = ContextVar("asking", default="")


@dataclass(frozen=True)
class StoreStatistics:
    """Counts since the store was opened."""

    reads: int
    writes: int
    waiting_readers: int
    waiting_writers: int


class Store:
    """A database under a SQLAlchemy URL. Only ``sqlite:///<file>`` is understood so far.

    However much one of those asks for whom requests are answered (`asking`), half of the readers and the next turn to
    write are for others.

    Opening makes no connection; the schema is put in place by `relay.store.migrate.upgrade`. Close it when no call is
    under way. Raises ValueError for a URL of another kind.
    """

    def __init__(self, url: str, *, readers: int = 4) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
            raise ValueError(f"The database must be a SQLite file (sqlite:///FILE), not {url!r}.")
        self.url = url
        self.path = Path(parsed.database)
        self._writer = _engine(url, "BEGIN IMMEDIATE", pool_size=1, query_only=False)
        self._reader = _engine(url, "BEGIN", pool_size=readers, query_only=True)
        # SQLite has one writer at a time: a queue of one here costs less than waiting inside SQLite.
        self._write_limit = trio.CapacityLimiter(1)
        self._read_limit = trio.CapacityLimiter(readers)
        self._read_turns = Turns(max(1, readers // 2))
        self._write_turns = Turns(1)
        self._reads = 0
        self._writes = 0

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a read-only transaction and return its result.

        Cancellation counts until the work has started. Raises what ``work`` raises, `StoreBusy` or `StoreBroken`.
        """
        self._reads += 1
        async with _turn(self._read_turns):
            return await trio.to_thread.run_sync(_transact, self._reader, work, limiter=self._read_limit)

    async def write(self, work: Callable[[Connection], T], *, aside: bool = False) -> T:
        """Run ``work`` in one writing transaction; when this returns, its effect is on disk.

        An exception from ``work`` undoes all of it. Cancellation counts until the work has started, so a call that was
        cancelled while waiting has changed nothing. ``aside`` is for what is not the subject of the request in
        progress, so that its `companion` stays out.
        """
        self._writes += 1
        beside = None if aside else companion.get()
        async with _turn(self._write_turns):
            return await trio.to_thread.run_sync(_transact, self._writer, work, beside, limiter=self._write_limit)

    def statistics(self) -> StoreStatistics:
        """What the store has done and who waits for it."""
        return StoreStatistics(
            reads=self._reads,
            writes=self._writes,
            waiting_readers=self._read_limit.statistics().tasks_waiting,
            waiting_writers=self._write_limit.statistics().tasks_waiting,
        )

    @property
    def writing_engine(self) -> Engine:
        """For migrations and the backup, which own the database while they run."""
        return self._writer

    def close(self) -> None:
        """Close all connections."""
        self._reader.dispose()
        self._writer.dispose()


@contextmanager
def for_all() -> Iterator[None]:
    """What is asked inside is for everybody who waits: it is nobody's turn, whoever happens to ask."""
    mine = asking.set("")
    try:
        yield
    finally:
        asking.reset(mine)


def _turn(turns: Turns) -> AbstractAsyncContextManager[None]:
    caller = asking.get()
    return turns.of(caller) if caller else nullcontext()


class StoreBusy(RetryLater):
    """Another process held the database longer than we wait."""

    default_code = "DATABASE_BUSY"


class StoreBroken(NeedsPerson):
    """The database cannot be written or read: full disk, no permission, damage."""

    default_code = "DATABASE_UNAVAILABLE"


def _transact(
    engine: Engine, work: Callable[[Connection], T], beside: Callable[[Connection, object], None] | None = None
) -> T:
    try:
        with engine.begin() as connection:
            before = _changes(connection)
            result = work(connection)
            if beside is not None and _changes(connection) > before:
                beside(connection, result)
            return result
    except sqlalchemy.exc.DatabaseError as error:
        raise_explained(error)
        raise


def _changes(connection: Connection) -> int:
    """How many rows this connection has changed since it was opened."""
    driver: Any = connection.connection.dbapi_connection
    return int(driver.total_changes)


def raise_explained(error: sqlalchemy.exc.DatabaseError) -> None:
    """Raise `StoreBusy` or `StoreBroken` for an error of SQLite that has a meaning for people, else return."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        raise StoreBusy("The relay's database is busy; try again in a moment.", who="relay operator") from error
    if code == sqlite3.SQLITE_FULL:
        sentence = "The disk of the relay's database is full; free some space there."
    elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        sentence = (
            "The relay's database is damaged. Stop the relay and put a backup in its place with "
            "`towpath-relay restore --force FILE`, which keeps what is there now."
        )
    elif code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        sentence = "The relay's database cannot be read or written; see the relay's log."
    else:
        return
    raise StoreBroken(sentence, who="relay operator") from error


def _engine(url: str, begin: str, *, pool_size: int, query_only: bool) -> Engine:
    engine = sqlalchemy.create_engine(
        url,
        # A connection wanders between the threads of the pool, one at a time.
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000},
        poolclass=sqlalchemy.pool.QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        # Statements with their values would put secrets' digests and names into tracebacks and logs.
        hide_parameters=True,
    )

    def on_connect(connection: Any, _record: object) -> None:
        # The driver must not open transactions by itself: the hook below says which kind.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if query_only:
            connection.execute("PRAGMA query_only = ON")

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine
