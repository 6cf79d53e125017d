"""Limits for each user: what is allowed is answered and counted, what is too much waits, and nobody else notices."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.app import create_app
from relay.quota.allowance import Allowance
from tests.relay.transfer_world import TransferWorld, open_world, transfer_document

LIMIT = 10


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    limits = msgspec.structs.replace(world.settings.limits, user_requests=LIMIT, user_tasks=2)
    settings = msgspec.structs.replace(world.settings, limits=limits)
    services = dataclasses.replace(
        world.relay.services, settings=settings, requests=Allowance(LIMIT, limits.user_requests_period)
    )
    world = dataclasses.replace(world, settings=settings, relay=dataclasses.replace(world.relay, services=services))
    async with open_world(world, run=False) as made:
        yield made


async def test_too_many_requests_wait_and_say_how_long(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    left = []
    for _ in range(LIMIT):
        answer = await alice.ask("GET", "/task_list")
        assert answer.status_code == 200
        left.append(int(answer.headers["RateLimit-Remaining"]))
    assert left == list(range(LIMIT - 1, -1, -1))
    answer = await alice.ask("GET", "/task_list")
    assert (answer.status_code, answer.json()["code"]) == (429, "TooManyRequests")
    assert set(answer.json()) >= {"code", "message", "request_id", "resource"}
    wait = int(answer.headers["Retry-After"])
    relay.base.clock.now += wait
    assert (await alice.ask("GET", "/task_list")).status_code == 200


async def test_a_noisy_user_holds_nobody_else_up_and_gains_nothing_by_many_tokens(relay: TransferWorld) -> None:
    noisy, quiet = await relay.person("noisy"), await relay.person("quiet")
    program, _ = await relay.base.client("another program")
    other = await relay.base.bearer(noisy.id, program)
    statuses: dict[int, int] = {}
    for n in range(20 * LIMIT):
        headers = noisy.headers if n % 2 else other
        answer = await relay.http.get("/v0.10/task_list", headers=headers)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        if n % (4 * LIMIT) == 0:
            assert (await quiet.ask("GET", "/task_list")).status_code == 200
    assert statuses == {200: LIMIT, 429: 19 * LIMIT}
    assert relay.services.requests.statistics().refused == 19 * LIMIT


async def test_the_auth_api_answers_in_its_own_words(relay: TransferWorld) -> None:
    from relay.auth.scopes import AUTH_SERVER

    alice = await relay.person("alice")
    program, _ = await relay.base.client("program")
    headers = await relay.base.bearer(alice.id, program, AUTH_SERVER)
    answers = [await relay.http.get("/v2/oauth2/userinfo", headers=headers) for _ in range(LIMIT + 1)]
    assert [answer.status_code for answer in answers] == [200] * LIMIT + [429]
    assert answers[-1].json()["errors"][0]["code"] == "TOO_MANY_REQUESTS"
    assert "Retry-After" in answers[-1].headers


async def test_tasks_that_are_not_over_are_bounded_and_shown(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    first, _ = await relay.collection(alice, "A")
    second, _ = await relay.collection(alice, "B")
    document = transfer_document(first, second)
    task = await alice.post("/transfer", document, status=202)
    await alice.post("/transfer", transfer_document(first, second), status=202)
    answer = await alice.ask("POST", "/transfer", json=transfer_document(first, second))
    assert (answer.status_code, answer.json()["code"]) == (429, "TooManyRequests")
    assert answer.headers["Retry-After"] == "60"
    # A repeated submission is no further task.
    assert (await alice.post("/transfer", document, status=202))["task_id"] == task["task_id"]
    shown = (await relay.http.get("/towpath/v1/quota", headers=alice.headers)).json()
    assert shown["tasks"] == {"limit": 2, "used": 2, "remaining": 0, "period": None}
    assert (shown["requests"]["limit"], shown["requests"]["used"]) == (LIMIT, 5)
    await alice.post(f"/task/{task['task_id']}/cancel")
    await alice.post("/transfer", transfer_document(first, second), status=202)


async def test_no_limit_is_no_limit(world: Any) -> None:
    services = dataclasses.replace(world.relay.services, requests=Allowance(0, 60.0))
    app = create_app(services)
    user, (program, _) = await world.user("a@example.org"), await world.client()
    headers = await world.bearer(user.id, program, "auth.globus.org")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="https://relay") as http:
        answer = await http.get("/v2/oauth2/userinfo", headers=headers)
    assert (answer.status_code, "RateLimit-Limit" in answer.headers) == (200, False)


@given(
    st.integers(1, 20),
    st.floats(0.5, 100),
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(-5, 20, allow_nan=False)), max_size=80),
)
def test_never_more_than_the_allowance_and_one_bucket_each(
    limit: int, period: float, asked: list[tuple[str, float]]
) -> None:
    allowance, now = Allowance(limit, period), 1000.0
    granted: dict[str, list[float]] = {"a": [], "b": []}
    for subject, step in asked:
        now += max(0.0, step)
        balance = allowance.take(subject, now)
        assert balance is not None
        assert 0 <= balance.remaining <= limit
        if not balance.wait:
            granted[subject].append(now)
    for times in granted.values():
        for start in times:
            # A full bucket, and what flows in meanwhile.
            within = [one for one in times if start <= one < start + period]
            assert len(within) <= 2 * limit + 1
