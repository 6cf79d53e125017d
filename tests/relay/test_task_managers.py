"""The tasks of others over HTTP, for those who watch over one of the collections."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from protocol.control import Counters
from tests.relay.transfer_pair import Pair, pair
from tests.relay.transfer_world import (
    until,
)

__all__ = ["pair"]


async def test_those_who_watch_over_a_collection_see_their_side_of_its_tasks(pair: Pair) -> None:
    bob, carol = await pair.relay.person("bob"), await pair.relay.person("carol")
    role = {"principal": bob.id, "role": "activity_monitor"}
    await pair.alice.post(f"/endpoint/{pair.b}/role", role, status=201)
    task_id = await pair.running()
    listed = await bob.get("/endpoint_manager/task_list", filter_status="ACTIVE")
    (row,) = listed["DATA"]
    assert (row["task_id"], row["owner_string"]) == (task_id, pair.alice.username)
    assert row["destination_endpoint_display_name"] == "B"
    assert (row["source_endpoint_id"], row["source_endpoint_display_name"], row["source_endpoint"]) == (None,) * 3
    assert listed["has_next_page"] is False
    assert (await bob.get(f"/endpoint_manager/task/{task_id}"))["source_endpoint_id"] is None
    await bob.refused("GET", f"/endpoint_manager/task/{task_id}/event_list", 403, "PermissionDenied")
    await bob.refused("GET", f"/task/{task_id}", 404, "TaskNotFound")
    await bob.refused("GET", f"/operation/endpoint/{pair.b}/ls", 403, "PermissionDenied")
    assert (await carol.get("/endpoint_manager/task_list"))["DATA"] == []
    await carol.refused("GET", f"/endpoint_manager/task/{task_id}", 404, "TaskNotFound")
    assert (await pair.alice.get(f"/endpoint_manager/task/{task_id}"))["source_endpoint_id"] == pair.a
    await pair.alice.refused("POST", "/endpoint_manager/admin_cancel", 501, "NotSupported", json={})


@pytest.mark.parametrize("away", ["source", "destination"])
async def test_who_watches_over_one_side_reads_no_words_about_the_other(pair: Pair, away: str) -> None:
    bob = await pair.relay.person("bob")
    await pair.alice.put(f"/endpoint/{pair.a}", {"display_name": "Secret project"})
    await pair.alice.post(f"/endpoint/{pair.b}/role", {"principal": bob.id, "role": "activity_monitor"}, status=201)
    task_id = await pair.running()
    watched = f"/endpoint_manager/task/{task_id}"
    secret = {
        "status_code": "FILE_NOT_FOUND",
        "status_sentence": "/Secret project/x does not exist.",
        "path": "direct tcp secret.example:1",
    }
    pair.destination.observe(task_id, "WAITING", **secret)
    await until(lambda: bool(pair.destination.acknowledged))
    shown = await bob.get(watched)
    assert (shown["nice_status"], shown["nice_status_details"]) == ("FILE_NOT_FOUND", None)
    assert "secret" not in str(shown).lower()
    assert "Secret" in (await pair.alice.get(watched))["nice_status_details"]
    # Of an agent that is away, those are told who watch over its side.
    pair.destination.observe(task_id, "WAITING", status_code="CONNECT_FAILED", status_sentence="secret.example: no")
    await until(lambda: pair.destination.acknowledged[-1:] == [2])
    pair.relay.registry.down(pair.source if away == "source" else pair.destination)
    shown = await bob.get(watched)
    assert shown["nice_status"] == "GC_NOT_CONNECTED"
    assert ("“B”" in (shown["nice_status_details"] or "")) == (away == "destination")
    assert "secret" not in str(shown).lower()
    await pair.alice.post(f"/task/{task_id}/cancel")
    pair.relay.registry.up(pair.source if away == "source" else pair.destination)
    pair.destination.observe(task_id, "FAILED", error_code="FILE_NOT_FOUND", status_sentence="Secret project: no.")
    assert "Secret" in (await pair.finished(task_id))["fatal_error"]["description"]
    shown = await bob.get(watched)
    assert shown["fatal_error"]["code"] == "FILE_NOT_FOUND"
    assert "secret" not in str(shown).lower()
    (row,) = (await bob.get("/endpoint_manager/task_list", filter_status="FAILED"))["DATA"]
    assert "secret" not in str(row).lower()


async def test_nobody_finds_out_by_filters_what_is_on_the_other_side(pair: Pair) -> None:
    bob = await pair.relay.person("bob")
    await pair.alice.put(f"/endpoint/{pair.a}", {"public": True})
    await pair.alice.post(f"/endpoint/{pair.b}/role", {"principal": bob.id, "role": "activity_monitor"}, status=201)
    await pair.running()
    route = "/endpoint_manager/task_list"
    assert len((await bob.get(route, filter_endpoint=pair.b, filter_endpoint_use="destination"))["DATA"]) == 1
    for use in ("source", ""):
        asked = {"filter_endpoint": pair.a, "filter_endpoint_use": use}
        await bob.refused("GET", route, 403, "PermissionDenied", params=asked)
    assert len((await pair.alice.get(route, filter_endpoint=pair.a))["DATA"]) == 1


async def test_a_page_after_a_task_tells_nothing_of_tasks_of_others(pair: Pair) -> None:
    alice, bob, route = pair.alice, await pair.relay.person("bob"), "/endpoint_manager/task_list"
    await alice.post(f"/endpoint/{pair.b}/role", {"principal": bob.id, "role": "activity_monitor"}, status=201)
    seen = await pair.running()
    c, _ = await pair.relay.collection(alice, "C")
    hidden = await pair.relay.transfer(alice, pair.a, c)
    assert [row["task_id"] for row in (await bob.get(route))["DATA"]] == [seen]
    for unseen in (hidden, str(uuid.uuid4())):
        await bob.refused("GET", route, 400, "ClientError.BadRequest", params={"last_key": unseen})


async def test_a_page_comes_after_a_task_that_is_seen_no_more(pair: Pair) -> None:
    route = "/endpoint_manager/task_list"
    last = await pair.running()
    pair.relay.base.clock.now += 1
    c, _ = await pair.relay.collection(pair.alice, "C")
    await pair.relay.transfer(pair.alice, c, c, path="/x")
    first = await pair.alice.get(route, limit="1")
    await pair.alice.delete(f"/endpoint/{c}")
    assert [row["task_id"] for row in (await pair.alice.get(route, last_key=first["last_key"]))["DATA"]] == [last]


async def test_every_filter_of_those_who_watch_counts(pair: Pair) -> None:
    alice, route = pair.alice, "/endpoint_manager/task_list"
    smooth, bumpy, paused = await pair.running(), await pair.running(), await pair.running()
    pair.destination.observe(bumpy, "ACTIVE", counters=Counters(faults=3))
    pair.destination.observe(paused, "PAUSED", status_code="PAUSED")
    await until(lambda: pair.destination.acknowledged[-1:] == [2])

    async def listed(**params: Any) -> set[str]:
        return {row["task_id"] for row in (await alice.get(route, **params))["DATA"]}

    assert await listed(filter_min_faults="0") == {smooth, bumpy, paused}
    assert await listed(filter_min_faults="3") == {bumpy}
    assert await listed(filter_min_faults="4") == set()
    assert await listed(filter_is_paused="true") == {paused}
    assert await listed(filter_is_paused="0") == {smooth, bumpy}
    assert await listed(filter_local_user="root") == set()
    first = await alice.get(route, limit="1")
    rest = await listed(last_key=first["last_key"])
    assert rest | {first["DATA"][0]["task_id"]} == {smooth, bumpy, paused}
    assert len(rest) == 2
    for wrong in (
        {"last_key": str(uuid.uuid4())},
        {"last_key": "x"},
        {"last_key": f"nan_{smooth}"},
        {"last_key": f"1.0_{smooth}x"},
        {"filter_min_faults": "-1"},
        {"filter_is_paused": "maybe"},
    ):
        await alice.refused("GET", route, 400, "ClientError.BadRequest", params=wrong)
    wrong_kind = {"filter_is_error": "maybe"}
    events = f"/endpoint_manager/task/{smooth}/event_list"
    await alice.refused("GET", events, 400, "ClientError.BadRequest", params=wrong_kind)
