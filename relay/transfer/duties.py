"""What is due for tasks by the clock: deadlines, tickets, rules that run out, and what other processes have changed.

Accounts are closed and opened, and agents revoked, by the operator's commands, so that nobody says when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sqlalchemy import Connection

from relay.transfer import closed_owners, revocation, rules, task_turns

# An agent that was asked to stop and is away has this long to confirm; then the relay ends the task itself.
CANCEL_GRACE = 600.0


@dataclass(frozen=True)
class Done:
    """Ids of the tasks that have lost a permission by now, or whose owner's account was closed or opened, or an agent
    of which was revoked, and of others that have changed. ``closed`` are the linked identities that are closed."""

    cut: list[str]
    changed: list[str]
    closed: frozenset[str]


class Duties:
    """``ticket_life`` in seconds. What the methods do is part of the caller's transaction."""

    def __init__(self, ticket_life: float) -> None:
        self._half_life = ticket_life / 2
        # After a restart all of them are as if they had just been closed.
        self._closed: frozenset[str] = frozenset()

    def next(self, connection: Connection, now: float) -> float:
        """When `do` will have something to do, which may be now or past."""
        told = (
            closed_owners.changed(connection)
            or task_turns.closed_linked_ones(connection) != self._closed
            or revocation.changed(connection)
        )
        moments = (
            task_turns.next_expiry(connection, CANCEL_GRACE),
            task_turns.next_renewal(connection, now, self._half_life),
            rules.next_expiry(connection),
            now if told else None,
        )
        return min((moment for moment in moments if moment is not None), default=math.inf)

    def do(self, connection: Connection, now: float, *, all_tickets: bool) -> Done:
        """All that is due; ``all_tickets`` renews those that last, too. Give it to `note` once it is stored."""
        cut = task_turns.end_where_rules_ran_out(connection, now)
        cut += closed_owners.follow(connection, now)
        cut += revocation.follow(connection, now)
        closed = task_turns.closed_linked_ones(connection)
        if closed - self._closed:
            cut += task_turns.end_where_linked_ones_were_closed(connection, now)
        changed = task_turns.expire(connection, now, CANCEL_GRACE)
        changed += task_turns.renew(connection, now, -math.inf if all_tickets else self._half_life)
        return Done(cut, changed, closed)

    def note(self, done: Done) -> None:
        """What was done is stored: tasks are looked at again when more is closed."""
        self._closed = done.closed
