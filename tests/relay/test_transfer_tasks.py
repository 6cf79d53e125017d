"""Tasks over HTTP: documents, lists, events, details, cancel, update."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

import pytest

from protocol.control import Counters
from tests.relay.transfer_pair import Pair, pair
from tests.relay.transfer_world import (
    delete_document,
    transfer_document,
    until,
)

__all__ = ["pair"]


async def test_a_task_from_submission_to_success(pair: Pair) -> None:
    task_id = await pair.running(label="first", sync_level=2, filter_rules=[{"method": "exclude", "name": "*.o"}])
    shown = await pair.alice.get(f"/task/{task_id}")
    assert (shown["status"], shown["nice_status"], shown["is_ok"]) == ("ACTIVE", "Queued", True)
    assert shown["completion_time"] is None
    assert shown["request_time"] == "2027-01-15T08:00:00+00:00"
    assert shown["source_endpoint_display_name"] == "A"
    assert shown["destination_endpoint_id"] == pair.b
    assert shown["filter_rules"] == [{"DATA_TYPE": "filter_rule", "method": "exclude", "name": "*.o", "type": None}]
    order = pair.destination.orders[task_id][0]
    assert order.session is not None
    assert order.items is not None
    assert order.options.sync_level == 2
    assert pair.source.sessions[order.session_id][0].peer.node_id == pair.destination.node_id

    pair.relay.base.clock.now += 10
    counters = Counters(files=4, directories=1, files_transferred=2, bytes_transferred=1000, retrying=1, faults=3)
    pair.destination.observe(task_id, "ACTIVE", counters=counters)
    await until(lambda: bool(pair.destination.acknowledged))
    shown = await pair.alice.get(f"/task/{task_id}")
    assert (shown["nice_status"], shown["files"], shown["faults"]) == ("OK", 4, 3)
    assert (shown["subtasks_total"], shown["subtasks_succeeded"]) == (5, 2)
    assert (shown["subtasks_retrying"], shown["subtasks_pending"]) == (1, 2)
    assert shown["effective_bytes_per_second"] == 100

    pair.destination.succeed(task_id, files=4, directories=1, files_transferred=4, bytes_transferred=2000)
    shown = await pair.finished(task_id)
    assert (shown["status"], shown["nice_status"], shown["is_ok"]) == ("SUCCEEDED", None, None)
    # As Globus writes it, and as scripts read it.
    assert datetime.datetime.strptime(shown["completion_time"], "%Y-%m-%dT%H:%M:%S+00:00")
    assert (shown["subtasks_total"], shown["subtasks_succeeded"], shown["subtasks_pending"]) == (5, 5, 0)
    events = await pair.alice.get(f"/task/{task_id}/event_list", limit="100")
    assert [event["code"] for event in events["DATA"]] == ["SUCCEEDED", "STARTED"]
    assert all(isinstance(event["details"], str) for event in events["DATA"])
    await until(lambda: pair.source.withdrawn == [order.session_id])


async def test_a_failure_tells_its_code_and_sentence(pair: Pair) -> None:
    task_id = await pair.running()
    pair.destination.observe(
        task_id,
        "FAILED",
        error_code="FILE_NOT_FOUND",
        status_sentence="There is no /~/data.",
        counters=Counters(failed=1),
    )
    shown = await pair.finished(task_id)
    assert shown["status"] == "FAILED"
    assert shown["fatal_error"] == {"code": "FILE_NOT_FOUND", "description": "There is no /~/data."}
    assert shown["subtasks_failed"] == 1


async def test_what_did_not_fail_of_a_task_that_came_to_its_end_has_succeeded(pair: Pair) -> None:
    """Folders are not counted one by one as they are made: none of them counts for failed because a file did."""
    task_id = await pair.running()
    pair.destination.observe(
        task_id,
        "FAILED",
        error_code="ITEMS_FAILED",
        status_sentence="1 of the task's items failed; see its skipped errors.",
        counters=Counters(files=6, directories=32, files_transferred=5, failed=1),
    )
    shown = await pair.finished(task_id)
    assert (shown["subtasks_total"], shown["subtasks_succeeded"], shown["subtasks_failed"]) == (38, 37, 1)


async def test_events_are_newest_first_and_filtered(pair: Pair) -> None:
    task_id = await pair.running()
    for number in range(5):
        time = f"2027-01-15T08:00:00.00000{number}+00:00"
        pair.destination.say(
            "event", task_id, code=f"FAULT_{number}", description="x", is_error=number % 2 == 1, time=time
        )
    await until(lambda: pair.destination.acknowledged[-1:] == [5])
    pair.relay.base.clock.now += 1
    path = f"/task/{task_id}/event_list"
    listed = await pair.alice.get(path, limit="2", offset="1")
    assert (listed["total"], listed["length"], listed["limit"], listed["offset"]) == (5, 2, 2, 1)
    # Times after "now" are held back to now, so these arrived in one moment: the later line is newer.
    assert [event["code"] for event in listed["DATA"]] == ["FAULT_3", "FAULT_2"]
    errors = await pair.alice.get(path, filter="is_error:1")
    assert [event["code"] for event in errors["DATA"]] == ["FAULT_3", "FAULT_1"]
    assert (await pair.alice.get(path, filter="is_error:0"))["total"] == 3
    assert (await pair.alice.get(path, filter=""))["total"] == 5
    await pair.alice.refused("GET", path, 400, "ClientError.BadRequest", params={"filter": "is_error:2"})


async def test_details_are_read_live_page_by_page(pair: Pair) -> None:
    task_id = await pair.running()
    pair.destination.pages["successful"] = [
        {"source_path": f"/a/{n}", "destination_path": f"/b/{n}", "size": n, "unknown": 1} for n in range(3)
    ]
    pair.destination.pages["skipped"] = [
        {
            "source_path": "/a/x",
            "destination_path": "/b/x",
            "error_code": "PERMISSION_DENIED",
            "error_details": "no",
            "error_time": "2027-01-15T08:00:00+00:00",
        }
    ]
    path = f"/task/{task_id}/successful_transfers"
    first = await pair.alice.get(path, limit="2")
    assert (first["DATA_TYPE"], first["marker"], first["next_marker"]) == ("successful_transfers", None, "2")
    second = await pair.alice.get(path, limit="2", marker="2")
    assert second["next_marker"] is None
    assert [row["size"] for row in first["DATA"] + second["DATA"]] == [0, 1, 2]
    assert set(first["DATA"][0]) == {
        "DATA_TYPE",
        "source_path",
        "destination_path",
        "size",
        "checksum",
        "checksum_algorithm",
        "dynamic",
    }
    skipped = await pair.alice.get(f"/task/{task_id}/skipped_errors")
    assert skipped["DATA"][0]["error_code"] == "PERMISSION_DENIED"
    assert skipped["DATA"][0]["is_directory"] is False
    pair.destination.pages["successful"] = [{"size": "many"}]
    await pair.alice.refused("GET", path, 502, "ExternalError.TaskDetailsFailed.EndpointError")
    pair.relay.registry.down(pair.destination)
    await pair.alice.refused("GET", path, 502, "ExternalError.TaskDetailsFailed.GCDisconnected")


async def test_details_of_a_task_that_no_agent_has_are_empty_and_of_a_delete_refused(pair: Pair) -> None:
    pair.relay.registry.down(pair.destination)
    task_id = await pair.relay.transfer(pair.alice, pair.a, pair.b)
    assert (await pair.alice.get(f"/task/{task_id}/successful_transfers"))["DATA"] == []
    delete = (await pair.alice.post("/delete", delete_document(pair.a), status=202))["task_id"]
    await pair.alice.refused("GET", f"/task/{delete}/successful_transfers", 400, "ClientError.BadRequest")


async def test_what_a_delete_left_out_has_no_destination(pair: Pair) -> None:
    task_id = (await pair.alice.post("/delete", delete_document(pair.b), status=202))["task_id"]
    await until(lambda: task_id in pair.destination.tasks)
    row = {"error_code": "FILE_NOT_FOUND", "error_details": "no", "error_time": "2027-01-15T08:00:00+00:00"}
    pair.destination.pages["skipped"] = [{"source_path": "/x", "destination_path": "/", **row}]
    (shown,) = (await pair.alice.get(f"/task/{task_id}/skipped_errors"))["DATA"]
    assert (shown["source_path"], shown["destination_path"]) == ("/x", None)


async def test_what_a_mirror_could_not_remove_has_no_source(pair: Pair) -> None:
    task_id = await pair.running()
    row = {"error_code": "PERMISSION_DENIED", "error_details": "no", "error_time": "2027-01-15T08:00:00+00:00"}
    row |= {"source_path": "/", "destination_path": "/x"}
    pair.destination.pages["skipped"] = [{**row, "is_delete_destination_extra": True}, row]
    shown, other = (await pair.alice.get(f"/task/{task_id}/skipped_errors"))["DATA"]
    assert (shown["source_path"], shown["destination_path"]) == (None, "/x")
    assert (other["source_path"], other["destination_path"]) == ("/", "/x")


async def test_cancel_in_its_three_ways(pair: Pair) -> None:
    pair.relay.registry.down(pair.destination)
    never_sent = await pair.relay.transfer(pair.alice, pair.a, pair.b)
    assert (await pair.alice.post(f"/task/{never_sent}/cancel"))["code"] == "Canceled"
    shown = await pair.alice.get(f"/task/{never_sent}")
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "CANCELED")
    events = (await pair.alice.get(f"/task/{never_sent}/event_list"))["DATA"]
    assert "CANCELED" in [event["code"] for event in events]
    assert (await pair.alice.post(f"/task/{never_sent}/cancel"))["code"] == "TaskComplete"

    pair.relay.registry.up(pair.destination)
    task_id = await pair.running()

    def confirm(method: str, path: str) -> None:
        orders = pair.destination.orders.get(task_id, [])
        if orders and orders[-1].desired == "cancel" and pair.destination.tasks[task_id].state != "CANCELED":
            pair.destination.observe(task_id, "CANCELED", counters=Counters(files=3, files_transferred=1))

    pair.destination.forget = confirm
    assert (await pair.alice.post(f"/task/{task_id}/cancel"))["code"] == "Canceled"
    shown = await pair.alice.get(f"/task/{task_id}")
    assert (shown["status"], shown["subtasks_canceled"], shown["subtasks_succeeded"]) == ("FAILED", 2, 1)


async def test_a_cancel_that_the_agent_has_not_confirmed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.api.transfer_tasks.CANCEL_PATIENCE", 0.05)
    task_id = await pair.running()
    answer = await pair.alice.post(f"/task/{task_id}/cancel")
    assert answer["code"] == "CancelAccepted"
    assert (await pair.alice.get(f"/task/{task_id}"))["status"] == "ACTIVE"
    # It finished before it heard of the cancel: that is what happened, and what is told.
    pair.destination.succeed(task_id, files=1, files_transferred=1)
    assert (await pair.finished(task_id))["status"] == "SUCCEEDED"
    assert (await pair.alice.post(f"/task/{task_id}/cancel"))["code"] == "TaskComplete"


async def test_nobody_waits_for_the_confirmation_of_an_agent_that_is_away(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = await pair.running()
    pair.relay.registry.down(pair.destination)
    waited: list[str] = []

    async def wait(task_id: str, _seconds: float) -> None:
        waited.append(task_id)

    monkeypatch.setattr(pair.relay.steward, "wait_finished", wait)
    assert (await pair.alice.post(f"/task/{task_id}/cancel"))["code"] == "CancelAccepted"
    assert waited == []
    pair.relay.registry.up(pair.destination)
    assert (await pair.alice.post(f"/task/{task_id}/cancel"))["code"] == "CancelAccepted"
    assert waited == [task_id]


async def test_update_and_remove(pair: Pair) -> None:
    task_id = await pair.running()
    await pair.alice.put(f"/task/{task_id}", {"DATA_TYPE": "task", "label": "new", "deadline": "2027-02-01 00:00:00"})
    shown = await pair.alice.get(f"/task/{task_id}")
    assert (shown["label"], shown["deadline"]) == ("new", "2027-02-01T00:00:00+00:00")
    await until(lambda: pair.destination.orders[task_id][-1].label == "new")
    assert pair.destination.orders[task_id][-1].items is None
    await pair.alice.put(f"/task/{task_id}", {"DATA_TYPE": "task", "towpath_bandwidth_limit": 5_000_000})
    await until(lambda: pair.destination.orders[task_id][-1].options.bandwidth_limit == 5_000_000)
    shown = await pair.alice.get(f"/task/{task_id}")
    assert (shown["label"], shown["towpath"]["bandwidth_limit"]) == ("new", 5_000_000)
    await pair.alice.put(f"/task/{task_id}", {"DATA_TYPE": "task", "towpath_bandwidth_limit": None})
    await until(lambda: pair.destination.orders[task_id][-1].options.bandwidth_limit is None)
    wrong_limit = {"towpath_bandwidth_limit": 3}
    for wrong in (
        {"label": "x" * 129},
        {"label": "a\nb"},
        {"label": "a "},
        {"deadline": "2001-01-01"},
        {"deadline": 3},
        wrong_limit,
        [],
    ):
        await pair.alice.refused("PUT", f"/task/{task_id}", 400, "ClientError.BadRequest", json=wrong)
    await pair.alice.refused("POST", f"/task/{task_id}/remove", 409, "Conflict")
    pair.destination.succeed(task_id)
    await pair.finished(task_id)
    await pair.alice.refused("PUT", f"/task/{task_id}", 409, "Conflict", json={"label": "late"})
    await pair.alice.post(f"/task/{task_id}/remove")
    assert (await pair.alice.get("/task_list"))["DATA"] == []
    assert (await pair.alice.get(f"/task/{task_id}"))["history_deleted"] is True


async def test_pause_info(pair: Pair) -> None:
    task_id = await pair.running()
    nothing = await pair.alice.get(f"/task/{task_id}/pause_info")
    assert nothing == {
        "DATA_TYPE": "pause_info_limited",
        "pause_rules": [],
        "source_pause_message": None,
        "destination_pause_message": None,
        "source_pause_message_share": None,
        "destination_pause_message_share": None,
    }
    pair.destination.observe(task_id, "PAUSED", status_code="PAUSED", status_sentence="Backup in progress.")
    await until(lambda: bool(pair.destination.acknowledged))
    assert (await pair.alice.get(f"/task/{task_id}/pause_info"))["destination_pause_message"] == "Backup in progress."
    shown = await pair.alice.get(f"/task/{task_id}")
    assert (shown["status"], shown["is_paused"], shown["nice_status"]) == ("ACTIVE", True, "PAUSED")


async def test_lists_filters_orders_and_pages(pair: Pair) -> None:
    alice, clock = pair.alice, pair.relay.base.clock
    ids = []
    for label in ("alpha", "beta_1", "beta-2", None):
        clock.now += 60
        ids.append(await pair.running(**({} if label is None else {"label": label})))
    # Within a second, of which documents show the beginning.
    clock.now += 60.5
    ids.append((await alice.post("/delete", delete_document(pair.b, label="gone"), status=202))["task_id"])
    await until(lambda: ids[4] in pair.destination.tasks)
    pair.destination.succeed(ids[0])
    await pair.finished(ids[0])

    async def listed(**params: Any) -> list[str]:
        return [row["task_id"] for row in (await alice.get("/task_list", **params))["DATA"]]

    assert await listed() == ids[::-1]
    assert await listed(orderby="request_time ASC") == ids
    assert (await listed(orderby="type ASC, request_time DESC"))[0] == ids[4]
    assert await listed(filter="type:DELETE") == [ids[4]]
    assert await listed(filter="type:TRANSFER,DELETE/status:ACTIVE,INACTIVE") == ids[:0:-1]
    assert await listed(filter="status:SUCCEEDED") == [ids[0]]
    assert await listed(filter=f"task_id:{ids[1]},{ids[2].upper()}") == [ids[2], ids[1]]
    assert await listed(filter="label:~BETA*") == [ids[2], ids[1]]
    assert await listed(filter="label:~beta?1") == [ids[1]]
    assert await listed(filter="label:~beta_*") == [ids[1]]
    assert await listed(filter="label:~beta*,!~*2") == [ids[1]]
    assert await listed(filter="label:alpha") == [ids[0]]
    assert await listed(filter="request_time:2027-01-15T08:02:30,") == ids[:1:-1]
    assert await listed(filter="request_time:,2027-01-15 08:02:30") == [ids[1], ids[0]]
    assert await listed(filter="completion_time:2027-01-01,2028-01-01") == [ids[0]]
    shown = (await alice.get(f"/task/{ids[0]}"))["completion_time"]
    assert await listed(filter=f"completion_time:{shown},{shown}") == [ids[0]]
    page = await alice.get("/task_list", limit="2", offset="3", fields="task_id")
    assert (page["total"], page["length"], page["limit"], page["offset"]) == (5, 2, 2, 3)
    assert page["DATA"] == [{"DATA_TYPE": "task", "task_id": id_} for id_ in ids[1::-1]]
    for wrong in (
        {"filter": "status:DONE"},
        {"filter": "colour:red"},
        {"filter": "type"},
        {"filter": "task_id:1"},
        {"filter": "request_time:yesterday,"},
        {"filter": "request_time:2027-01-01,2027-01-02,2027-01-03"},
        {"orderby": "size"},
        {"orderby": "label SIDEWAYS"},
        {"limit": "0"},
        {"limit": "1001"},
        {"offset": "-1"},
    ):
        await alice.refused("GET", "/task_list", 400, "ClientError.BadRequest", params=wrong)


@pytest.mark.parametrize(
    "filters",
    [
        ["label:" + ",".join(["~a"] * 1000)],
        ["label:" + ",".join(["!~a"] * 1000)],
        ["/".join(["type:DELETE"] * 1200)],
        ["type:DELETE"] * 1100,
        ["label:" + ",".join(["!~a"] * 100)] * 11,
        ["label:" + "a" * 20_000] * 2,
    ],
    ids=["labels", "negated labels", "clauses", "parameters", "labels of several", "characters"],
)
async def test_a_filter_that_the_database_would_not_take_is_refused_in_words(pair: Pair, filters: list[str]) -> None:
    said = await pair.alice.refused("GET", "/task_list", 400, "ClientError.BadRequest", params={"filter": filters})
    assert said.startswith("filter")


async def test_the_largest_filter_and_an_order_that_repeats_itself_are_taken(pair: Pair) -> None:
    task_id = await pair.running(label="b")
    labels = "label:" + ",".join(["!x"] * 200)
    filters = [labels, "/".join(["type:TRANSFER"] * 99)]
    order = ",".join(["label DESC", "label ASC"] * 1200)
    listed = await pair.alice.get("/task_list", filter=filters)
    assert [row["task_id"] for row in listed["DATA"]] == [task_id]
    other = await pair.running(label="a")
    listed = await pair.alice.get("/task_list", orderby=order)
    assert [row["task_id"] for row in listed["DATA"]] == [task_id, other], "the first mention decides"


@pytest.mark.parametrize(
    "moment", ["9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59.999999+00:00", "0001-01-01T00:00:00+12:00"]
)
async def test_a_time_outside_the_calendar_is_refused_and_spoils_no_answer(pair: Pair, moment: str) -> None:
    document = transfer_document(pair.a, pair.b, deadline=moment)
    await pair.alice.refused("POST", "/transfer", 400, "ClientError.BadRequest", json=document)
    task_id = await pair.running(deadline="9999-12-31T23:59:59+00:00")
    change = {"DATA_TYPE": "task", "deadline": moment}
    await pair.alice.refused("PUT", f"/task/{task_id}", 400, "ClientError.BadRequest", json=change)
    assert (await pair.alice.get(f"/task/{task_id}"))["deadline"] == "9999-12-31T23:59:59+00:00"
    assert pair.destination.orders[task_id][0].deadline == "9999-12-31T23:59:59.000000+00:00"


async def test_unknown_tasks_and_those_of_others_look_alike(pair: Pair) -> None:
    bob = await pair.relay.person("bob")
    task_id, nowhere = await pair.running(), str(uuid.uuid4())
    hidden = await bob.refused("GET", f"/task/{task_id}", 404, "TaskNotFound")
    unknown = await bob.refused("GET", f"/task/{nowhere}", 404, "TaskNotFound")
    assert hidden.replace(task_id, "ID") == unknown.replace(nowhere, "ID")
    assert (await bob.get("/task_list"))["total"] == 0
