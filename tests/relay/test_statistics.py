"""How the relay does is told to its administrators alone, in numbers whose count does not grow with what it holds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from relay.api.statistics import EXPOSITION
from relay.auth import service_tokens
from relay.auth.administrators import make_administrator
from relay.auth.scopes import AUTH_SERVER
from relay.metrics import METRICS, exposition

PATHS = ("/metrics", "/towpath/v1/statistics")


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


def parse(text: str) -> dict[str, Any]:
    """The families of a text by name, as Prometheus's own reader understands it."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is in the extra `test`")
    families = list(parser.text_string_to_metric_families(text))
    # Every line belongs to a family that says what it is.
    assert len(families) == text.count("# TYPE ") == text.count("# HELP ")
    return {family.name: family for family in families}


def values_of(families: dict[str, Any]) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }


async def test_the_text_is_what_prometheus_reads_and_does_not_grow(world: Any) -> None:
    headers = await person(world, "admin", administrator=True)
    before = await world.http.get("/metrics", headers=headers)
    assert before.headers["content-type"] == EXPOSITION
    families = parse(before.text)
    values = values_of(families)
    assert len(values) > 60
    assert not any(math.isnan(value) for value in values.values())
    assert values["towpath_relay_active_users", ()] == 1
    for n in range(20):
        await world.http.get("/v0.10/task_list", headers=await person(world, f"p{n}"))
    after = values_of(parse((await world.http.get("/metrics", headers=headers)).text))
    assert set(after) == set(values)
    assert after["towpath_relay_active_users", ()] == 21
    reads = "towpath_relay_database_operations_total", ("read",)
    assert after[reads] > values[reads]
    assert after["towpath_relay_tasks", ("run",)] == after["towpath_relay_agents_enrolled", ()] == 0
    assert after["towpath_relay_database_size_bytes", ()] > 10_000
    assert after["towpath_relay_resident_memory_bytes", ()] > 1e6


async def test_a_token_for_machines_is_enough_to_read_them(world: Any) -> None:
    identity = await world.user("monitoring@example.org")

    def work(connection: Any) -> str:
        make_administrator(connection, identity.id, 1.0)
        return service_tokens.make(connection, identity.id, "prometheus", life=86400.0, now=world.clock())

    headers = {"Authorization": f"Bearer {await world.store.write(work)}"}
    assert (await world.http.get("/metrics", headers=headers)).status_code == 200


async def test_names_are_as_prometheus_wants_them(world: Any) -> None:
    """Counters end in _total, units are base units at the end, and everything is explained with its own words."""
    headers = await person(world, "admin", administrator=True)
    families = parse((await world.http.get("/metrics", headers=headers)).text)
    for name, family in families.items():
        # The reader takes _total off the name of a counter.
        assert re.fullmatch(r"towpath_relay_[a-z]+(_[a-z]+)*", name), name
        assert family.type in ("counter", "gauge"), name
        assert all(sample.name == name + "_total" * (family.type == "counter") for sample in family.samples)
        assert not re.search(r"_(ms|mb|kb|kib|mib|minutes|hours|percent|count)(_|$)", name), name
        assert len(family.documentation) > 10, name
    explained = [family.documentation for family in families.values()]
    assert len(set(explained)) == len(explained)


async def test_every_number_of_the_relay_has_a_name(world: Any) -> None:
    headers = await person(world, "admin", administrator=True)
    document = (await world.http.get("/towpath/v1/statistics", headers=headers)).json()
    assert {"web", "links", "tasks", "store", "audit", "requests", "kept", "process"} <= set(document)
    numbers = {
        (part, field)
        for part, fields in document.items()
        for field, value in fields.items()
        if not isinstance(value, str | list | None)
    }
    assert numbers == set(METRICS)


def test_a_table_becomes_labels_and_what_is_not_known_is_left_out() -> None:
    parts = {
        "tunnel": {"outcomes": {"closed": 2, 'odd"\n\\': 1}, "pairs": 3, "nonsense": 7},
        "keys": {"root_present": True, "ticket_key_expires": None},
    }
    values = values_of(parse(exposition('1"\n\\', parts)))
    assert values == {
        ("towpath_relay_info", ('1"\n\\',)): 1,
        ("towpath_relay_tunnels", ()): 3,
        ("towpath_relay_tunnels_ended_total", ("closed",)): 2,
        ("towpath_relay_tunnels_ended_total", ('odd"\n\\',)): 1,
        ("towpath_relay_root_key_present", ()): 1,
    }


def test_the_alerts_of_the_documentation_are_about_metrics_that_there_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "operating.md"
    named = set(re.findall(r"towpath_relay_[a-z_]+", page.read_text()))
    assert len(named) > 8
    assert named <= {f"towpath_relay_{metric.name}" for metric, _ in METRICS.values()}
