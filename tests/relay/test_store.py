"""The database: transactions hold or leave nothing, readers cannot write, migrations match the tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, insert, select, text

import relay.store.sign_in_tables
import relay.store.transfer_tables  # noqa: F401 - fills the metadata
from protocol.errors import NeedsPerson
from relay.store.auth_tables import identities
from relay.store.database import Store, StoreBroken
from relay.store.metadata import metadata
from relay.store.migrate import SchemaTooNew, configuration, current_revision, newest_revision, upgrade


def add(connection: Connection, name: str) -> None:
    connection.execute(
        insert(identities).values(
            id=name, username=f"{name}@x", kind="login", status="used", provider_id="p", created=1.0
        )
    )


def count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(identities)).scalar_one()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path / 'relay.sqlite'}")
    upgrade(made.writing_engine)
    yield made
    made.close()


async def test_a_write_is_seen_by_later_reads(store: Store) -> None:
    await store.write(lambda connection: add(connection, "a"))
    assert await store.read(count) == 1


async def test_a_failed_write_leaves_nothing(store: Store) -> None:
    def work(connection: Connection) -> None:
        add(connection, "a")
        raise LookupError("on purpose")

    with pytest.raises(LookupError):
        await store.write(work)
    assert await store.read(count) == 0


async def test_readers_cannot_write(store: Store) -> None:
    with pytest.raises(StoreBroken):
        await store.read(lambda connection: add(connection, "a"))
    assert await store.read(count) == 0


async def test_safety_settings_hold_on_every_connection(store: Store) -> None:
    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return [connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in names]

    full = 2
    assert await store.write(pragmas) == ["wal", full, 1]
    assert await store.read(pragmas) == ["wal", full, 1]


async def test_concurrent_writers_take_turns(store: Store) -> None:
    def increment(connection: Connection) -> None:
        # A lost update would show if two transactions could read the same count.
        add(connection, str(count(connection)))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(store.write, increment)
    assert await store.read(count) == 50
    assert store.statistics().writes == 50


async def test_two_stores_on_one_file_take_turns(store: Store) -> None:
    other = Store(store.url)

    def increment(connection: Connection) -> None:
        add(connection, str(count(connection)))

    async with trio.open_nursery() as nursery:
        for index in range(40):
            nursery.start_soon((store, other)[index % 2].write, increment)
    assert await other.read(count) == 40
    other.close()


async def test_a_cancelled_write_that_waited_changed_nothing(store: Store) -> None:
    inside, go_on = trio.Event(), trio.Event()

    def slow(connection: Connection) -> None:
        add(connection, "slow")
        trio.from_thread.run_sync(inside.set)
        trio.from_thread.run(go_on.wait)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.write, slow)
        await inside.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.write(lambda connection: add(connection, "late"))
        assert scope.cancelled_caught
        go_on.set()
    assert await store.read(lambda c: c.execute(select(identities.c.id)).scalars().all()) == ["slow"]


def test_only_sqlite_files_are_taken() -> None:
    for url in ("sqlite://", "sqlite:///:memory:", "postgresql://localhost/relay"):
        with pytest.raises(ValueError, match="SQLite file"):
            Store(url)


def test_migrations_and_tables_agree(store: Store) -> None:
    with store.writing_engine.begin() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    assert differences == []


def test_upgrading_twice_changes_nothing(store: Store) -> None:
    before = current_revision(store.writing_engine)
    upgrade(store.writing_engine)
    assert current_revision(store.writing_engine) == before == newest_revision()


def test_a_database_of_a_newer_version_is_left_alone(store: Store) -> None:
    with store.writing_engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaTooNew):
        upgrade(store.writing_engine)


async def test_a_missing_place_is_reported_as_such(tmp_path: Path) -> None:
    gone = Store(f"sqlite:///{tmp_path / 'missing' / 'relay.sqlite'}")
    with pytest.raises(NeedsPerson):
        await gone.read(count)
    gone.close()


def test_migrations_form_one_line(store: Store) -> None:
    scripts = ScriptDirectory.from_config(configuration())
    assert scripts.get_heads() == [newest_revision()]


def test_an_older_database_keeps_its_rows(tmp_path: Path) -> None:
    """SQLite rebuilds tables for some changes, and dropping the old one can take its dependants along."""
    old = Store(f"sqlite:///{tmp_path / 'old.sqlite'}")
    with old.writing_engine.begin() as connection:
        options = configuration()
        options.attributes["connection"] = connection
        command.upgrade(options, "0002")
    with old.writing_engine.begin() as connection:
        connection.execute(
            text("INSERT INTO identities VALUES ('i', 'a@b.c', 'login', 'used', NULL, NULL, NULL, 'p', 1)")
        )
        connection.execute(text("INSERT INTO clients VALUES ('c', 'client', 0, 'i', 1)"))
        connection.execute(text("INSERT INTO client_secrets VALUES ('s', 'c', 'd', 1)"))
        connection.execute(text("INSERT INTO sessions VALUES ('n', 'i', 'c', 1, 1)"))
        connection.execute(text("INSERT INTO tokens VALUES ('t', 'access', 'n', 'i', 'c', 'server', 'scope', 1, 2)"))
    upgrade(old.writing_engine)
    with old.writing_engine.begin() as connection:
        for table in ("identities", "clients", "client_secrets", "sessions", "tokens"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 1, table
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    old.close()
