"""Tokens from issue to end: expiry, refresh, revocation, cleaning up, and nothing readable in the database."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select, update

from relay.auth.clients import Client
from relay.auth.grants import GrantRefused, Lives, Replayed, refresh
from relay.auth.scopes import AUTH_SERVER, TRANSFER_ALL, TRANSFER_SERVER
from relay.auth.tokens import MAX_TOKEN, IssuedToken, find, remove_expired, revoke
from relay.store.auth_tables import identities, sessions, tokens

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld

LIVES = Lives(access=100.0, refresh=1000.0)
BOTH = {AUTH_SERVER: ["openid"], TRANSFER_SERVER: [TRANSFER_ALL]}


def client_named(client_id: str) -> Client:
    return Client(id=client_id, name="program", public=False, owner_id=None, created=0.0)


async def alive(world: RelayWorld, token: str) -> bool:
    return await world.store.read(lambda connection: find(connection, token, world.clock.now)) is not None


async def refreshed(world: RelayWorld, client_id: str, token: str | None, scope: str = "") -> IssuedToken | Replayed:
    """What a client gets for a refresh token now. Raises `GrantRefused`."""
    assert token is not None
    return await world.store.write(
        partial(
            refresh,
            client=client_named(client_id),
            refresh_token=token,
            scope=scope,
            now=world.clock.now,
            lives=LIVES,
        )
    )


async def test_a_token_counts_until_its_last_second(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    issued = (await world.tokens(client_id, client_id, BOTH))[TRANSFER_SERVER]
    assert issued.refresh_token is None
    start = world.clock.now
    world.clock.now = start + issued.expires_in - 1
    assert await alive(world, issued.access_token)
    world.clock.now = start + issued.expires_in
    assert not await alive(world, issued.access_token)


async def test_no_token_can_be_read_from_the_database_file(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    issued = await world.tokens(client_id, client_id, BOTH, refresh=True)
    content = b"".join(path.read_bytes() for path in world.settings.directory_path.rglob("relay.sqlite*"))
    # It is the database that was looked at.
    assert client_id.encode() in content
    assert secret.encode() not in content
    assert len(issued) == len(BOTH)
    for token in issued.values():
        assert token.access_token.encode() not in content
        assert token.refresh_token is not None
        assert token.refresh_token.encode() not in content


async def test_refreshing_gives_a_new_access_token_and_keeps_the_refresh_token(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    first = (await world.tokens(client_id, client_id, BOTH, refresh=True))[TRANSFER_SERVER]
    assert first.refresh_token is not None
    # Far longer than one refresh token lives, in steps shorter than that: use keeps it alive.
    for _ in range(5):
        world.clock.now += 900
        again = await refreshed(world, client_id, first.refresh_token)
        assert isinstance(again, IssuedToken)
        assert again.refresh_token == first.refresh_token
        assert again.access_token != first.access_token
        assert (again.resource_server, again.scope) == (TRANSFER_SERVER, TRANSFER_ALL)
        assert await alive(world, again.access_token)
    world.clock.now += 1001
    with pytest.raises(GrantRefused) as caught:
        await refreshed(world, client_id, first.refresh_token)
    assert caught.value.code == "invalid_grant"


@pytest.mark.parametrize("scope", [f"openid {TRANSFER_ALL}", "a["])
async def test_refreshing_never_widens(world: RelayWorld, scope: str) -> None:
    client_id, _ = await world.client()
    issued = (await world.tokens(client_id, client_id, BOTH, refresh=True))[TRANSFER_SERVER]
    with pytest.raises(GrantRefused) as caught:
        await refreshed(world, client_id, issued.refresh_token, scope)
    assert caught.value.code == "invalid_scope"


async def test_a_refresh_token_serves_its_own_client_alone(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    other_id, _ = await world.client("other")
    issued = (await world.tokens(client_id, client_id, BOTH, refresh=True))[TRANSFER_SERVER]
    for token, who in ((issued.refresh_token, other_id), (issued.access_token, client_id), ("", client_id)):
        with pytest.raises(GrantRefused) as caught:
            await refreshed(world, who, token)
        assert caught.value.code == "invalid_grant"


async def test_revoking_a_refresh_token_takes_its_access_tokens_along(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    issued = await world.tokens(client_id, client_id, BOTH, refresh=True)
    assert issued[TRANSFER_SERVER].refresh_token is not None
    await world.store.write(partial(revoke, token=issued[TRANSFER_SERVER].refresh_token))
    assert not await alive(world, issued[TRANSFER_SERVER].access_token)
    assert not await alive(world, issued[TRANSFER_SERVER].refresh_token)
    assert await alive(world, issued[AUTH_SERVER].access_token)


async def test_revoking_an_access_token_ends_it_alone(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    issued = (await world.tokens(client_id, client_id, BOTH, refresh=True))[TRANSFER_SERVER]
    assert await world.store.write(partial(revoke, token=issued.access_token))
    assert not await world.store.write(partial(revoke, token=issued.access_token))
    assert not await alive(world, issued.access_token)
    assert issued.refresh_token is not None
    assert await alive(world, issued.refresh_token)


async def test_tokens_of_a_closed_identity_are_dead(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    person = await world.user("ada@example.org")
    issued = (await world.tokens(person.id, client_id, BOTH))[AUTH_SERVER]
    assert await alive(world, issued.access_token)
    closing = update(identities).where(identities.c.id == person.id).values(status="closed")
    await world.store.write(lambda connection: connection.execute(closing).rowcount)
    assert not await alive(world, issued.access_token)


@pytest.mark.parametrize("token", ["", "x", "é", "x" * (MAX_TOKEN + 1), "x" * 1_000_000])
async def test_strings_that_are_no_tokens(world: RelayWorld, token: str) -> None:
    assert not await alive(world, token)


async def test_cleaning_forgets_what_is_over_and_nothing_else(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    old = (await world.tokens(client_id, client_id, BOTH))[AUTH_SERVER]
    world.clock.now += old.expires_in - 1
    new = (await world.tokens(client_id, client_id, BOTH))[AUTH_SERVER]
    world.clock.now += 1
    assert await world.store.write(partial(remove_expired, now=world.clock.now)) == 2
    assert await alive(world, new.access_token)
    left = [select(func.count()).select_from(table) for table in (tokens, sessions)]
    assert await world.store.read(lambda c: [c.execute(query).scalar_one() for query in left]) == [2, 1]
