"""A relay that cannot start says why in a sentence, and makes nothing worse."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from sqlalchemy import text

from relay import server
from relay.listen import PortUnusable, open_port
from relay.settings import Settings
from relay.store.database import Store, StoreBroken
from relay.store.migrate import NoDatabase
from tests.relay.test_operator_commands import Operator


@pytest.mark.parametrize("left", [None, b""])
async def test_a_relay_whose_database_is_away_does_not_begin_anew(relay_settings: Settings, left: bytes | None) -> None:
    """An empty one would know nobody: every agent would be told to set itself up again."""
    database = relay_settings.directory_path / relay_settings.database.file
    database.unlink()
    if left is not None:
        database.write_bytes(left)
    with pytest.raises(NoDatabase, match=r"database\.file.*mounted.*restore a backup"):
        await server.serve(relay_settings)
    assert (database.read_bytes() if database.exists() else None) == left


def damage(settings: Settings, at: int) -> Path:
    database = settings.directory_path / settings.database.file
    with database.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * 40_000)
    return database


@pytest.mark.parametrize("at", [0, 4096])
async def test_a_damaged_database_is_told_in_a_sentence(relay_settings: Settings, at: int) -> None:
    damage(relay_settings, at)
    with pytest.raises(StoreBroken, match=r"damaged.*restore --force"):
        await server.serve(relay_settings)


def test_commands_tell_it_too(relay_directory: Path, relay_settings: Settings) -> None:
    operator = Operator(relay_directory)
    assert "no database of a relay" not in operator.run("user", "list")
    damage(relay_settings, 4096)
    assert "is damaged" in operator.run("user", "list", code=1)
    (relay_settings.directory_path / relay_settings.database.file).write_bytes(b"")
    assert "no database of a relay" in operator.run("user", "list", code=1)


async def test_damage_that_a_running_relay_finds_is_told_in_a_sentence(relay_store: Store) -> None:
    await relay_store.read(lambda connection: connection.execute(text("SELECT 1")))
    with relay_store.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (relay_store.path.stat().st_size - 4096))
    relay_store.close()
    with pytest.raises(StoreBroken, match="damaged"):
        await relay_store.read(lambda connection: connection.execute(text("SELECT * FROM identities")).all())


async def test_a_port_that_cannot_be_had_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortUnusable, match=rf"127\.0\.0\.1 port {port}: Address already in use; another program"):
            await open_port("127.0.0.1", port, 1)
    for host in ("192.0.2.1", "300.1.1.1"):
        with pytest.raises(PortUnusable, match="must be an address of this machine"):
            await open_port(host, 0, 1)
