"""What the relay asks again and again does not cost more with every task that somebody has."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, insert

from relay.auth.identities import add_identity
from relay.store.database import Store
from relay.store.migrate import upgrade
from relay.store.transfer_tables import collections, tasks
from relay.transfer import closed_owners, rules, task_turns

NOW = 1_800_000_000.0
# Steps of SQLite's machine. One task looked at costs four or more.
FEW = 400
MANY = 1000


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """A relay with many tasks that run, of many people, and one task of ``ada``."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('crowd') / 'relay.sqlite'}")
    upgrade(store.writing_engine)
    with store.writing_engine.begin() as connection:
        switches = [column.name for column in collections.c if str(column.type) == "BOOLEAN"]
        place = dict.fromkeys(switches, False) | {"id": "place", "owner_id": "ada", "display_name": "x", "created": NOW}
        connection.execute(insert(collections).values(place))
        for name in ("ada", *(f"person {number}" for number in range(20))):
            add_identity(
                connection,
                username=f"{name}@here.org".replace(" ", "-"),
                now=NOW,
                provider_id="p",
                identity_id=name,
                kind="login",
                name=name,
            )
        owners = ["ada", *(f"person {number % 20}" for number in range(MANY))]
        connection.execute(insert(tasks), [_task(number, owner) for number, owner in enumerate(owners)])
    with store.writing_engine.begin() as connection:
        yield connection
    store.close()


def _task(number: int, owner: str) -> dict[str, Any]:
    return {
        "id": str(uuid.UUID(int=number)),
        "owner_id": owner,
        "owner": owner,
        "submission_id": str(number),
        "session_id": str(number),
        "type": "DELETE",
        "requested": NOW + number,
        "deadline": NOW + 86400 + number,
        "source_id": "place",
        "status": "ACTIVE",
        "state": "ACTIVE",
        "options": "{}",
        "submitted": "{}",
        "item_count": 1,
        "hidden": False,
        "desired": "cancel" if number == MANY else "run",
        "cancel_time": NOW if number == MANY else None,
        "revision": 1,
        "delivered": 1,
        "attempted": True,
        "last_seq": 0,
        "session_open": True,
        "ticket_issued": NOW + number,
        "closed": False,
    }


def steps(connection: Connection, work: Callable[[Connection], Any]) -> tuple[int, Any]:
    """How many steps SQLite takes for something, and what came of it."""
    driver: Any = connection.connection.dbapi_connection
    counted = 0

    def step() -> int:
        nonlocal counted
        counted += 1
        return 0

    driver.set_progress_handler(step, 1)
    try:
        result = work(connection)
    finally:
        driver.set_progress_handler(None, 1)
    return counted, result


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda c: task_turns.count_of_owner(c, "ada"), 1),
        (lambda c: task_turns.next_expiry(c, 60.0), NOW + 60),
        (lambda c: task_turns.next_renewal(c, NOW + MANY, 3600.0), NOW + 3600),
        (task_turns.closed_linked_ones, frozenset()),
        (closed_owners.changed, False),
        (rules.next_expiry, None),
    ],
    ids=["count of one's tasks", "expiry", "renewal", "linked", "closed accounts", "rules"],
)
def test_nobody_elses_tasks_are_looked_at(
    crowd: Connection, work: Callable[[Connection], Any], expected: object
) -> None:
    counted, result = steps(crowd, work)
    assert result == expected
    assert counted < FEW
