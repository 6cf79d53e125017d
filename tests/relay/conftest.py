"""What the relay's tests share: a relay of their own (`world`), somebody signed in there (`ada`), and two machines in
virtual time (`scene`)."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from trio.testing import MockClock

from relay import server
from relay.initialise import initialise
from relay.settings import Settings
from relay.settings import load as load_settings
from relay.store.database import Store
from tests.relay.cheap_secrets import set_cheap
from tests.relay.relay_world import RelayWorld, SetClock
from tests.relay.sign_in_world import Person, add_person
from tests.relay.steward_scene import Scene, open_scene


@pytest.fixture(scope="session", autouse=True)
def cheap_secrets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        set_cheap(patch)
        yield


@pytest.fixture(scope="session")
def initialised_relay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relay's directory as `towpath-relay init` leaves it; copy it, do not use it."""
    directory = tmp_path_factory.mktemp("initialised") / "relay"
    initialise(directory, host="127.0.0.1", port=8443, url=None, name=None)
    return directory


@pytest.fixture
def relay_directory(initialised_relay: Path, tmp_path: Path) -> Path:
    """A relay's directory of this test's own."""
    return Path(shutil.copytree(initialised_relay, tmp_path / "relay"))


@pytest.fixture
def relay_settings(relay_directory: Path) -> Settings:
    return load_settings(relay_directory / "relay.yaml")


@pytest.fixture
def relay_store(relay_settings: Settings) -> Iterator[Store]:
    """The database of the test's relay."""
    store = Store(relay_settings.database_url)
    yield store
    store.close()


@pytest.fixture
async def world(relay_settings: Settings, relay_store: Store) -> AsyncIterator[RelayWorld]:
    """The relay, put together as in production, answering HTTP without a port."""
    clock = SetClock()
    relay = server.build(relay_settings, relay_store, clock)
    transport = httpx.ASGITransport(app=relay.app)
    async with httpx.AsyncClient(transport=transport, base_url=relay_settings.public_url) as http:
        yield RelayWorld(relay, relay_settings, relay_store, clock, http)


@pytest.fixture
def clock() -> MockClock:
    """The clock of a test's run, for tests that ask for it by name."""
    # Time stands still at first: the fixtures' database calls run in threads, which the clock takes for idleness.
    return MockClock()


@pytest.fixture
async def scene(world: Any, clock: MockClock) -> AsyncIterator[Scene]:
    """Alice with two machines that are not linked yet, and the steward at work."""
    async with open_scene(world, clock) as opened:
        yield opened


@pytest.fixture
async def ada(world: RelayWorld) -> Person:
    """Ada, signed in at her browser."""
    person = Person(world)
    await person.arrive(await add_person(world, "ada"))
    return person
