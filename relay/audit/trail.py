"""The audit log: who did what, when, from where, and how it ended. It is only ever added to.

Each entry's hash covers the entry and the hash before it, so that a change, an omission or an insertion shows in
`verify`. Whoever holds a copy of the last hash can tell whether the end was cut off as well. Entries hold names and
ids; secrets never come here, because bodies, query strings and headers of requests are not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sqlalchemy import Connection, insert, select

from relay.store.audit_tables import audit_log
from relay.times import iso

FIRST = "0" * 64
MAX_VALUE = 2000
_PAGE = 1000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One deed. ``who`` is an identity's id (None: nobody who was known), ``outcome`` a word, ``facts`` what more to
    say: ids, names, roles."""

    time: float
    action: str
    outcome: str
    who: str | None = None
    client: str | None = None
    origin: str = ""
    request: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    def canonical(self) -> str:
        """The text that is stored and hashed."""
        document = {
            "time": iso(self.time),
            "action": self.action[:MAX_VALUE],
            "outcome": self.outcome[:MAX_VALUE],
            "who": self.who,
            "client": self.client,
            "origin": self.origin[:MAX_VALUE],
            "request": self.request,
            "facts": {key: str(value)[:MAX_VALUE] for key, value in self.facts.items()},
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"))


def chained(previous: str, n: int, entry: str) -> str:
    """The hash of an entry: SHA-256 over the hash before it, its number and its text."""
    return hashlib.sha256(f"{previous}\n{n}\n{entry}".encode()).hexdigest()


def append(connection: Connection, entries: Iterable[Entry]) -> None:
    """Add entries. In the transaction of what they tell of, or right after it."""
    last = connection.execute(select(audit_log.c.n, audit_log.c.hash).order_by(audit_log.c.n.desc()).limit(1)).first()
    n, previous = (0, FIRST) if last is None else (last.n, last.hash)
    rows = []
    for entry in entries:
        n, text = n + 1, entry.canonical()
        previous = chained(previous, n, text)
        rows.append({"n": n, "time": entry.time, "entry": text, "hash": previous})
    if rows:
        connection.execute(insert(audit_log), rows)


def lines(connection: Connection, after: int = 0) -> Iterator[str]:
    """The log as JSON lines, oldest first, from the entry after number ``after``."""
    for row in _rows(connection, after):
        document: dict[str, Any] = {"n": row.n, **json.loads(row.entry), "hash": row.hash}
        yield json.dumps(document)


@dataclass(frozen=True)
class Verdict:
    """How many entries there are, the last hash, and the number of the first entry that is not as it was written."""

    entries: int
    head: str
    broken: int | None


def verify(connection: Connection) -> Verdict:
    """Whether the log is whole."""
    previous, n = FIRST, 0
    for row in _rows(connection, 0):
        n += 1
        if row.n != n or row.hash != chained(previous, n, row.entry):
            return Verdict(n - 1, previous, row.n)
        previous = row.hash
    return Verdict(n, previous, None)


def _rows(connection: Connection, after: int) -> Iterator[Any]:
    return chain.from_iterable(pages(connection, after))


def pages(connection: Connection, after: int = 0, since: float | None = None) -> Iterator[Sequence[Any]]:
    """The rows after number ``after``, or those of them from the moment ``since`` (Unix seconds) on, oldest first, many
    at a time."""
    while True:
        wanted = select(audit_log).where(audit_log.c.n > after)
        if since is not None:
            # The hashes do not cover this column: who wants to see all rows must not ask for it.
            wanted = wanted.where(audit_log.c.time >= since)
        page = connection.execute(wanted.order_by(audit_log.c.n).limit(_PAGE)).all()
        yield page
        if len(page) < _PAGE:
            return
        after = page[-1].n
