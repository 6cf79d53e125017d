"""What was given for one purpose is worth nothing for another: tokens at other services, keys a second time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from sqlalchemy import Connection, func, select

from protocol.identity import NodeKey
from relay.auth.scopes import (
    AUTH_SERVER,
    GROUPS_SERVER,
    MANAGE_PROJECTS,
    SEARCH_SERVER,
    TIMERS_ID,
    TRANSFER_ALL,
    TRANSFER_SERVER,
)
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer.enrolment import create_mapped_collection
from tests.relay.test_transfer_authorization import ROUTES
from tests.relay.transfer_world import TransferWorld, open_world

# Every service with the widest scopes its tokens can carry.
WIDEST = {
    AUTH_SERVER: ["openid", "profile", "email", MANAGE_PROJECTS],
    TRANSFER_SERVER: [TRANSFER_ALL],
    GROUPS_SERVER: [f"urn:globus:auth:scope:{GROUPS_SERVER}:all"],
    SEARCH_SERVER: [f"urn:globus:auth:scope:{SEARCH_SERVER}:all"],
    TIMERS_ID: [f"https://auth.globus.org/scopes/{TIMERS_ID}/timer"],
}
AUTH_ROUTES = [
    ("GET", "/v2/oauth2/userinfo"),
    ("GET", "/v2/api/identities?ids=00000000-0000-0000-0000-000000000000"),
    ("GET", "/v2/api/projects"),
    ("POST", "/v2/api/projects"),
    ("GET", "/v2/api/clients"),
    ("GET", "/v2/api/policies"),
]


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world, run=False) as made:
        yield made


async def test_a_token_of_one_service_is_no_token_at_another(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    endpoint, _ = await relay.collection(alice, "Disk")
    program, _ = await relay.base.client("program")
    wide = {**WIDEST, endpoint: [f"https://auth.globus.org/scopes/{endpoint}/https"]}
    # Even a token that names a foreign scope counts only where it was issued for.
    wide[GROUPS_SERVER] = [*wide[GROUPS_SERVER], TRANSFER_ALL, MANAGE_PROJECTS, "openid"]
    issued = await relay.base.tokens(alice.id, program, wide, refresh=True)
    values = dict.fromkeys(("endpoint_id", "task_id", "bookmark_id", "role_id", "rule_id"), endpoint)
    values |= {"server_id": "0", "rest": "x"}
    transfer = [(method, path.replace(":path", "").format(**values)) for method, path in ROUTES]
    for server, tokens in issued.items():
        for routes, own in ((transfer, TRANSFER_SERVER), (AUTH_ROUTES, AUTH_SERVER)):
            for method, path in routes:
                shown = [tokens.refresh_token] if server == own else [tokens.access_token, tokens.refresh_token]
                for token in shown:
                    headers = {"Authorization": f"Bearer {token}"}
                    answer = await relay.http.request(method, path, headers=headers, json={})
                    assert answer.status_code == 401, f"{server} at {method} {path}: {answer.text[:200]}"


async def test_a_client_learns_nothing_of_tokens_of_others_and_uses_none(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    first, _ = await relay.base.client("first")
    second, secret = await relay.base.client("second")
    issued = (await relay.base.tokens(alice.id, first, {TRANSFER_SERVER: [TRANSFER_ALL]}, refresh=True))[
        TRANSFER_SERVER
    ]
    for token in (issued.access_token, issued.refresh_token):
        for verb in ("validate", "introspect"):
            answer = await relay.http.post(f"/v2/oauth2/token/{verb}", data={"token": token}, auth=(second, secret))
            assert answer.json() == {"active": False}
    form = {"grant_type": "refresh_token", "refresh_token": issued.refresh_token}
    assert (await relay.http.post("/v2/oauth2/token", data=form, auth=(second, secret))).status_code == 401


@pytest.mark.parametrize("seed", range(3))
async def test_of_a_hundred_uses_of_one_setup_key_exactly_one_wins(relay: TransferWorld, seed: int) -> None:
    alice = await relay.person("alice")
    settings, now = relay.services.settings, relay.services.clock()
    collection_id, key = await create_mapped_collection(
        relay.store, settings, alice.id, {"display_name": f"Disk {seed}"}, now=now
    )
    won: list[str] = []
    lost: list[str] = []

    async def use() -> None:
        try:
            won.append((await relay.enrol(key, NodeKey.generate())).node_id)
        except ApiError as error:
            lost.append(error.code)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(use)
    assert (len(won), lost) == (1, ["SetupKeyInvalid"] * 99)

    def held(connection: Connection) -> tuple[int, str]:
        nodes = connection.execute(select(func.count()).select_from(tables.nodes)).scalar_one()
        serving = select(tables.collections.c.node_id).where(tables.collections.c.id == collection_id)
        return nodes, str(connection.execute(serving).scalar_one())

    # The losers left nothing behind.
    assert await relay.store.read(held) == (1, won[0])
