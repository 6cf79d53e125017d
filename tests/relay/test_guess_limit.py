"""Waiting after wrong secrets: a sliding window for each subject, in bounded memory."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from relay import server
from relay.auth.guess_memory import MAX_ROWS, GuessMemory
from relay.auth.guesses import GuessLimit
from relay.store.database import StoreBusy
from relay.store.sign_in_tables import guess_failures


def test_the_oldest_failure_decides_when_to_try_again() -> None:
    limit = GuessLimit(3, 60.0)
    for now in (0.0, 10.0, 20.0):
        assert limit.retry_after(["a"], now) == 0
        limit.failed(["a"], now)
    assert limit.retry_after(["a"], 20.0) == 40.0
    assert limit.retry_after(["b"], 20.0) == 0
    assert limit.retry_after(["a", "b"], 59.0) == 1.0
    assert limit.retry_after(["a"], 60.0) == 0
    limit.failed(["a"], 60.0)
    assert limit.retry_after(["a"], 60.0) == 10.0


def test_memory_is_bounded() -> None:
    limit = GuessLimit(1, 1e9)
    for index in range(30_000):
        limit.failed([str(index)], 0.0)
    assert limit.statistics().subjects == 20_000
    assert limit.statistics().failures == 30_000
    assert limit.retry_after(["29999"], 1.0) > 0


@given(st.lists(st.floats(0, 1000), max_size=60).map(sorted))
def test_no_window_ever_holds_more_failures_than_allowed(times: list[float]) -> None:
    limit, taken = GuessLimit(5, 100.0), []
    for now in times:
        if limit.retry_after(["a"], now) == 0:
            limit.failed(["a"], now)
            taken.append(now)
    for start in taken:
        assert sum(start <= moment < start + 100.0 for moment in taken) <= 5


async def test_a_restart_forgives_nothing(world: Any) -> None:
    client_id, secret = await world.client()
    form = {"grant_type": "client_credentials", "scope": "openid"}
    for _ in range(world.settings.sign_in.failures):
        assert (await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, "wrong"))).status_code == 401
    assert (await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).status_code == 429
    await world.relay.guess_memory.flush(world.clock.now)

    again = server.build(world.settings, world.store, world.clock)
    await again.guess_memory.load(world.clock.now)
    transport = httpx.ASGITransport(app=again.app)
    async with httpx.AsyncClient(transport=transport, base_url=world.settings.public_url) as http:
        assert (await http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).status_code == 429
        other, key = await world.client("other")
        assert (await http.post("/v2/oauth2/token", data=form, auth=(other, key))).status_code == 200
        world.clock.now += world.settings.sign_in.failures_window
        assert (await http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).status_code == 200


async def test_what_is_written_of_guesses_is_bounded_and_names_nobody(world: Any) -> None:
    limit = GuessLimit(2, 300.0)
    memory = GuessMemory(world.store, {"one": limit}, 300.0)
    for n in range(MAX_ROWS + 500):
        limit.failed([f"192.0.2.1 name{n}@example.org"], n / 1000)
        if n % 10_000 == 9_999:
            await memory.flush(n / 1000)
    await memory.flush(30.0)
    rows = await world.store.read(lambda connection: connection.execute(select(guess_failures)).all())
    assert len(rows) <= MAX_ROWS
    assert "name1" not in str(rows[:5])
    # The newest are kept, and what is over is forgotten.
    fresh = GuessLimit(1, 300.0)
    await GuessMemory(world.store, {"one": fresh}, 300.0).load(30.0)
    assert fresh.retry_after([f"192.0.2.1 name{MAX_ROWS + 499}@example.org"], 30.0) > 0
    limit.failed(["late"], 1000.0)
    await memory.flush(1000.0)
    rows = await world.store.read(lambda connection: connection.execute(select(guess_failures)).all())
    assert len(rows) == 1


async def test_what_could_not_be_written_is_written_the_next_time(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = GuessLimit(2, 300.0)
    memory = GuessMemory(world.store, {"one": limit}, 300.0)
    limit.failed(["a"], 1.0)

    async def broken(*_: Any, **__: Any) -> None:
        raise StoreBusy("busy")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "write", broken)
        with pytest.raises(StoreBusy):
            await memory.flush(2.0)
    await memory.flush(3.0)
    rows = await world.store.read(lambda connection: connection.execute(select(guess_failures)).all())
    assert len(rows) == 1
