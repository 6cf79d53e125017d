"""What is forgotten when its time is over, beside tokens."""

from __future__ import annotations

from sqlalchemy import Connection, delete

from relay.auth.public_clients import remove_unused_copies
from relay.store.sign_in_tables import browser_sessions, one_time_links, upstream_visits


def forget_old(connection: Connection, now: float) -> int:
    """Forget browser sessions, links and visits past their life, and unused copies. Returns how many rows went."""
    gone = sum(
        connection.execute(delete(table).where(table.c.expires <= now)).rowcount
        for table in (browser_sessions, one_time_links, upstream_visits)
    )
    return gone + remove_unused_copies(connection, now)
