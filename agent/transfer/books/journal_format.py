"""The tables of a task's journal: made, brought up from older formats, and looked through for damage when it is opened.

Every row carries a checksum over its table and values: a bit that flipped on the disk must not turn a block that is
missing, or a file that failed, into one that is there.
"""

from __future__ import annotations

import sqlite3
import zlib
from pathlib import Path

import msgspec

from agent.state_files import pragmas
from agent.transfer.books.state_trouble import StateDamaged, StateTrouble

VERSION = 4

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE items (id INTEGER PRIMARY KEY, done INTEGER NOT NULL, crc INTEGER NOT NULL) STRICT;
CREATE TABLE directories (
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL,
    source BLOB NOT NULL,
    destination BLOB NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ancestry BLOB NOT NULL,
    state INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    UNIQUE (item, destination)
) STRICT;
CREATE INDEX directories_state ON directories (state, id);
CREATE TABLE finished (
    directory INTEGER NOT NULL,
    name BLOB NOT NULL,
    outcome INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (directory, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE partial (
    directory INTEGER NOT NULL,
    name BLOB NOT NULL,
    temporary BLOB NOT NULL,
    version BLOB NOT NULL,
    block INTEGER NOT NULL,
    done BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (directory, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE extras (
    destination BLOB NOT NULL,
    name BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (destination, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE hard_links (source BLOB PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT
"""

# What the checksum of a row covers. The id of a directory is left out: it is given by the insertion, its rows in other
# tables cover it, and SQLite's own check knows a sequence that is broken.
_CHECKED = {
    "meta": "key, value",
    "items": "id, done",
    "directories": "item, source, destination, mtime_ns, ancestry, state",
    "finished": "directory, name, outcome",
    "partial": "directory, name, temporary, version, block, done",
    "extras": "destination, name",
    "hard_links": "source, body",
    "events": "seq, body",
}

# What each format needs to become the next one.
_UPGRADES = {
    1: [
        "CREATE TABLE extras (destination BLOB NOT NULL, name BLOB NOT NULL, PRIMARY KEY (destination, name)) "
        "STRICT, WITHOUT ROWID"
    ],
    2: [
        statement
        for table, columns in _CHECKED.items()
        if table != "hard_links"
        for statement in (
            f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
            f"UPDATE {table} SET crc = crc_of('{table}', {columns})",  # noqa: S608 - names of this file
        )
    ],
    3: [
        "CREATE TABLE hard_links (source BLOB PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL) "
        "STRICT, WITHOUT ROWID"
    ],
}
# The format once more, under a checksum: a flipped bit in the one SQLite keeps must not look like another version.
_FORMAT = "format"


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make a connection to the journal ``path`` ready: its tables are there, in this format, and undamaged.

    Raises `StateDamaged`, `StateTrouble` (JOURNAL_NEWER), `sqlite3.Error`.
    """
    connection.create_function("crc_of", -1, _crc_of, deterministic=True)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version and not _says(connection, version):
        raise _damaged(path)
    if version > VERSION:
        raise StateTrouble(
            f"The journal of the task was written by a newer agent (format {version}, this one knows {VERSION}). "
            "Update the agent, or go back to the newer one; the task then goes on by itself.",
            code="JOURNAL_NEWER",
            who="destination owner",
        )
    for pragma in pragmas(path.parent):
        connection.execute(pragma)
    if (version < VERSION and not _bring_up(connection, version)) or not _is_whole(connection):
        raise _damaged(path)


def _crc_of(*values: object) -> int:
    return zlib.crc32(msgspec.msgpack.encode(values))


def _damaged(path: Path) -> StateDamaged:
    return StateDamaged(f"The journal {path} is damaged.", who="destination owner")


def _says(connection: sqlite3.Connection, version: int) -> bool:
    """Whether the format that SQLite keeps is the one written down under a checksum; formats up to 2 had none."""
    try:
        row = connection.execute(
            "SELECT value FROM meta WHERE key = ? AND crc = crc_of('meta', key, value)", (_FORMAT,)
        ).fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        # No such column.
        return version < 3
    return row is not None and row[0] == b"%d" % version


def _pages_are_whole(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok")


def _is_whole(connection: sqlite3.Connection) -> bool:
    """Whether every page and every row is as it was written."""
    try:
        return _pages_are_whole(connection) and not any(
            connection.execute(
                f"SELECT 1 FROM {table} WHERE crc IS NOT crc_of('{table}', {columns}) LIMIT 1"  # noqa: S608 - as above
            ).fetchone()
            for table, columns in _CHECKED.items()
        )
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        # A table or column of another name, or a value that is no value.
        return False


def _bring_up(connection: sqlite3.Connection, version: int) -> bool:
    """Make the tables, or bring those of an older format up to this one; False if they are damaged."""
    if version == 0:
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
            return False
        statements = _SCHEMA.split(";")
    else:
        if not _pages_are_whole(connection):
            return False
        statements = [statement for step in range(version, VERSION) for statement in _UPGRADES[step]]
    connection.execute("BEGIN IMMEDIATE")
    for statement in statements:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    value = b"%d" % VERSION
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?1, ?2, crc_of('meta', ?1, ?2))", (_FORMAT, value))
    connection.execute("COMMIT")
    return True
