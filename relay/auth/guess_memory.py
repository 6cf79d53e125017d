"""Wrong guesses outlive a restart of the relay: their counts are written down soon after, and read again at the start.

Who guessed at what is kept as a digest only. What a relay that is killed had not written yet is a few seconds' worth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from relay.auth.guesses import GuessLimit
from relay.store.database import Store
from relay.store.sign_in_tables import guess_failures

INTERVAL = 2.0
MAX_ROWS = 20_000


class GuessMemory:
    """``limits`` by the names under which they are stored; ``window`` is the longest of theirs, in seconds."""

    def __init__(self, store: Store, limits: Mapping[str, GuessLimit], window: float) -> None:
        self._store = store
        self._limits = limits
        self._window = window

    async def load(self, now: float) -> None:
        """Take up what was counted before. Raises the store's errors."""

        def work(connection: Connection) -> list[tuple[str, str, str]]:
            recent = guess_failures.c.last > now - self._window
            query = select(guess_failures.c.counter, guess_failures.c.subject, guess_failures.c.times)
            rows = connection.execute(query.where(recent).order_by(guess_failures.c.last))
            return [(row.counter, row.subject, row.times) for row in rows]

        for counter, subject, times in await self._store.read(work):
            if counter in self._limits:
                self._limits[counter].restore(subject, json.loads(times))

    async def flush(self, now: float) -> None:
        """Write down what has changed since the last time. Raises the store's errors; nothing is lost by that."""
        changed = {name: limit.changed() for name, limit in self._limits.items()}
        rows = [
            {"counter": name, "subject": subject, "times": json.dumps(times), "last": max(times)}
            for name, subjects in changed.items()
            for subject, times in subjects.items()
            if times
        ]
        if not rows:
            return
        try:
            await self._store.write(lambda connection: _keep(connection, rows, now - self._window), aside=True)
        except BaseException:
            for name, subjects in changed.items():
                self._limits[name].mark_changed(subjects)
            raise


def _keep(connection: Connection, rows: list[dict[str, object]], too_old: float) -> None:
    table = guess_failures.c
    statement = insert(guess_failures)
    statement = statement.on_conflict_do_update(
        index_elements=["counter", "subject"],
        set_={"times": statement.excluded.times, "last": statement.excluded.last},
    )
    connection.execute(statement, rows)
    connection.execute(delete(guess_failures).where(table.last <= too_old))
    if connection.execute(select(func.count()).select_from(guess_failures)).scalar_one() > MAX_ROWS:
        newest = select(table.last).order_by(table.last.desc()).offset(MAX_ROWS).limit(1).scalar_subquery()
        connection.execute(delete(guess_failures).where(table.last <= newest))
