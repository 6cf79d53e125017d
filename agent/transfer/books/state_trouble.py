"""Trouble with the agent's own state directory (journals, manifests, the list of tasks), as errors that say who can
mend it. A task whose state cannot be written waits; nothing that was told to anybody is forgotten."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

from protocol.errors import NeedsPerson


class StateTrouble(NeedsPerson):
    """The state directory cannot be used as it is; whoever used it opens it again later."""

    default_code = "STATE_UNAVAILABLE"


class StateDamaged(StateTrouble):
    """A file of the state directory holds something that was never written to it."""

    default_code = "STATE_DAMAGED"


_FULL = "The disk with the agent's state directory {place} is full. Free some space; the work then goes on by itself."
_QUOTA = "The quota for the agent's state directory {place} is used up. Free some space; the work then goes on."
# Primary result codes of SQLite (https://www.sqlite.org/rescode.html) and what they mean for whoever runs the agent.
_REASONS = {
    sqlite3.SQLITE_READONLY: "may only be read",
    sqlite3.SQLITE_PERM: "may not be used by the account the agent runs as",
    sqlite3.SQLITE_AUTH: "may not be used by the account the agent runs as",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_BUSY: "is in use by another program or another machine",
    sqlite3.SQLITE_LOCKED: "is in use by another program or another machine",
    sqlite3.SQLITE_PROTOCOL: "is in use by another program or another machine",
    sqlite3.SQLITE_IOERR: "could not be read or written; the disk or the file server reported a fault",
}


def of_sqlite(error: sqlite3.Error, path: Path) -> StateTrouble:
    """What a failed call of SQLite on the file ``path`` means. To be raised ``from`` the error."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StateTrouble(_FULL.format(place=path.parent), code="NO_SPACE", who="destination owner")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_SCHEMA):
        return StateDamaged(f"The agent's state file {path} is damaged.", who="destination owner")
    reason = _REASONS.get(code, f"cannot be used ({error})")
    return StateTrouble(
        f"The agent's state file {path} {reason}. See to it that the state directory is writable and that no other "
        "agent uses it; the work then goes on by itself.",
        who="destination owner",
    )


def of_system(error: OSError, path: Path) -> StateTrouble:
    """What a failed system call on the file ``path`` of the state directory means."""
    if error.errno == errno.ENOSPC:
        return StateTrouble(_FULL.format(place=path.parent), code="NO_SPACE", who="destination owner")
    if error.errno == errno.EDQUOT:
        return StateTrouble(_QUOTA.format(place=path.parent), code="QUOTA_EXCEEDED", who="destination owner")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StateTrouble(
        f"The agent's state file {path} cannot be used: {reason}. The work goes on by itself when it can.",
        who="destination owner",
    )


def put_aside(path: Path) -> None:
    """Move a damaged database with what belongs to it out of the way, for whoever wants to look at it.

    Raises `StateTrouble`.
    """
    try:
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.replace(path.with_name(path.name + ".damaged" + suffix))
    except OSError as error:
        raise of_system(error, path) from error
