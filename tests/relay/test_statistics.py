"""How the relay does is told to its administrators alone, in numbers whose count does not grow with what it holds."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from relay.api.statistics import EXPOSITION, exposition
from relay.auth.administrators import make_administrator
from relay.auth.scopes import AUTH_SERVER

PATHS = ("/metrics", "/towpath/v1/statistics")
METRIC = re.compile(r"# TYPE (towpath_[a-z0-9_]+) untyped\n\1 (\S+)\n")


async def person(world: Any, name: str, *, administrator: bool = False) -> dict[str, str]:
    identity = await world.user(f"{name}@example.org")
    program, _ = await world.client()
    if administrator:
        await world.store.write(lambda connection: make_administrator(connection, identity.id, 1.0))
    return dict(await world.bearer(identity.id, program))


@pytest.mark.parametrize("path", PATHS)
async def test_only_administrators_of_the_relay_are_told(world: Any, path: str) -> None:
    assert (await world.http.get(path)).status_code == 401
    answer = await world.http.get(path, headers=await person(world, "somebody"))
    assert (answer.status_code, answer.json()["code"]) == (403, "PermissionDenied")
    assert (await world.http.get(path, headers=await person(world, "admin", administrator=True))).status_code == 200
    identity = await world.user("other@example.org")
    await world.store.write(lambda connection: make_administrator(connection, identity.id, 1.0))
    program, _ = await world.client()
    wrong_service = await world.bearer(identity.id, program, AUTH_SERVER)
    assert (await world.http.get(path, headers=wrong_service)).status_code == 401


async def test_the_text_is_what_prometheus_reads_and_does_not_grow(world: Any) -> None:
    headers = await person(world, "admin", administrator=True)
    before = await world.http.get("/metrics", headers=headers)
    assert before.headers["content-type"] == EXPOSITION
    assert "".join(match[0] for match in METRIC.finditer(before.text)) == before.text
    values = {name: float(value) for name, value in METRIC.findall(before.text)}
    assert len(values) > 30
    assert not any(math.isnan(value) for value in values.values())
    assert values["towpath_requests_subjects"] == 1
    for n in range(20):
        await world.http.get("/v0.10/task_list", headers=await person(world, f"p{n}"))
    text = (await world.http.get("/metrics", headers=headers)).text
    after = {name: float(value) for name, value in METRIC.findall(text)}
    assert set(after) == set(values)
    assert after["towpath_requests_subjects"] == 21
    assert after["towpath_store_reads"] > values["towpath_store_reads"]


async def test_the_document_has_the_same_numbers(world: Any) -> None:
    headers = await person(world, "admin", administrator=True)
    document = (await world.http.get("/towpath/v1/statistics", headers=headers)).json()
    assert {"web", "links", "tasks", "store", "audit", "requests"} <= set(document)
    assert "towpath_links_connected 0\n" in "".join(exposition(document))


def test_what_is_no_number_is_left_out_and_names_are_clean() -> None:
    parts = {"a-b": {"x": 1, "y": "text", "z": None, "ok": True, "d": {"k": 1}}}
    assert "".join(exposition(parts)) == (
        "# TYPE towpath_a_b_ok untyped\ntowpath_a_b_ok 1\n# TYPE towpath_a_b_x untyped\ntowpath_a_b_x 1\n"
    )
