"""Documents compared with the SDK's own examples, the SDK itself as client, and the traps that clients have shown."""

from __future__ import annotations

import importlib
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from protocol.control import Counters, Entry
from tests.relay.fake_agents import FakeAgent
from tests.relay.transfer_world import Person, TransferWorld, delete_document, open_world, transfer_document, until

MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?\+00:00")


def example(module: str, case: str = "default") -> dict[str, Any]:
    """The document the SDK's tests use for one method."""
    responses = importlib.import_module(f"globus_sdk.testing.data.transfer.{module}").RESPONSES
    document: dict[str, Any] = responses.lookup(case).json
    return document


def compare(theirs: Any, ours: Any, where: str = "document") -> None:
    """Every key of theirs is in ours with a value of the same type; null on either side fits anything."""
    if theirs is None or ours is None:
        return
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), where
        missing = set(theirs) - set(ours)
        assert not missing, f"{where}: {sorted(missing)} missing"
        for key, value in theirs.items():
            compare(value, ours[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert isinstance(ours, list), where
        if theirs and ours:
            compare(theirs[0], ours[0], f"{where}[0]")
    else:
        assert type(theirs) is type(ours), f"{where}: {theirs!r} and {ours!r}"
        if isinstance(theirs, str) and MOMENT.fullmatch(theirs):
            # Scripts read times with a fixed form.
            assert len(ours) == len(theirs) and MOMENT.fullmatch(ours), f"{where}: {theirs!r} and {ours!r}"


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world) as opened:
        yield opened


@pytest.fixture
async def alice(relay: TransferWorld) -> Person:
    return await relay.person("alice")


@pytest.fixture
async def laptop(relay: TransferWorld, alice: Person) -> tuple[str, FakeAgent]:
    id_, agent = await relay.collection(alice, "Laptop")
    agent.entries = {"file1.txt": Entry(name="file1.txt", type="file", size=4, mode=0o644, user="t", group="t")}
    relay.registry.up(agent)
    return id_, agent


async def test_endpoint_documents(relay: TransferWorld, alice: Person, laptop: tuple[str, FakeAgent]) -> None:
    id_, _ = laptop
    compare(example("get_endpoint"), await alice.get(f"/endpoint/{id_}"))
    compare(example("update_endpoint"), await alice.put(f"/endpoint/{id_}", {"description": "x"}))
    subscription = await alice.put(f"/endpoint/{id_}/subscription", {"subscription_id": None})
    compare(example("set_subscription_id"), subscription)
    verified = {"subscription_admin_verified": True}
    answer = await alice.put(f"/endpoint/{id_}/subscription_admin_verified", verified)
    compare(example("set_subscription_admin_verified"), answer)


async def test_operation_documents(alice: Person, laptop: tuple[str, FakeAgent]) -> None:
    path = f"/operation/endpoint/{laptop[0]}"
    compare(example("operation_stat"), await alice.get(f"{path}/stat", path="/~/file1.txt"))
    missing = await alice.ask("GET", f"{path}/stat", params={"path": "/~/none"})
    compare(example("operation_stat", "not_found"), missing.json())
    assert missing.json()["code"] == "NotFound"
    compare(example("operation_mkdir"), await alice.post(f"{path}/mkdir", {"path": "/~/d"}, status=202))
    renamed = await alice.post(f"{path}/rename", {"old_path": "/a", "new_path": "/b"})
    compare(example("operation_rename"), renamed)


async def test_task_documents(relay: TransferWorld, alice: Person, laptop: tuple[str, FakeAgent]) -> None:
    id_, agent = laptop
    second, _ = await relay.collection(alice, "Disk", agent=agent)
    compare(example("get_submission_id"), await alice.get("/submission_id"))
    submitted = await alice.post("/transfer", transfer_document(id_, second), status=202)
    compare(example("submit_transfer"), submitted)
    refused = await alice.ask("POST", "/transfer", json=transfer_document(id_, second, DATA=[]))
    compare(example("submit_transfer", "failure"), refused.json())
    assert refused.json()["code"] == example("submit_transfer", "failure")["code"]
    compare(example("submit_delete"), await alice.post("/delete", delete_document(id_), status=202))
    task_id = submitted["task_id"]
    await until(lambda: task_id in agent.tasks)
    agent.succeed(task_id, files=1, files_transferred=1, bytes_transferred=4)
    await relay.steward.wait_finished(task_id, 5)
    compare(example("task_list"), await alice.get("/task_list", orderby="type DESC"))
    compare(example("endpoint_manager_task_list"), await alice.get("/endpoint_manager/task_list"))
    compare(example("cancel_task"), await alice.post(f"/task/{task_id}/cancel"))
    agent.pages["successful"] = [{"source_path": "/a", "destination_path": "/b", "size": 1}]
    theirs = example("endpoint_manager_task_successful_transfers")
    compare(theirs, await alice.get(f"/task/{task_id}/successful_transfers"))


REFERENCE_ENDPOINT_KEYS = """
DATA_TYPE id display_name name canonical_name username owner_id owner_string entity_type is_globus_connect gcp_connected
gcp_paused globus_connect_setup_key public description organization department keywords contact_email contact_info
info_link user_message user_message_link location default_directory force_encryption disable_verify force_verify
disable_anonymous_writes subscription_id subscription_admin_verified shareable host_endpoint host_endpoint_id
host_endpoint_display_name host_path mapped_collection_id mapped_collection_display_name sharing_target_endpoint
sharing_target_root_path acl_available acl_editable my_effective_roles in_use non_functional non_functional_endpoint_id
non_functional_endpoint_display_name https_server tlsftp_server gcs_manager_url gcs_version high_assurance
authentication_timeout_mins authentication_policy_id authentication_assurance_timeout mfa_required
acl_max_expiration_period_mins network_use max_concurrency preferred_concurrency max_parallelism preferred_parallelism
local_user_info_available guest_collection_activity_notification_policy preserve_modtime
restrict_transfers_to_high_assurance auto_delete_timeout skip_auto_delete last_accessed_time associated_flow_policy
requester_pays activated expires_in expire_time myproxy_server myproxy_dn oauth_server s3_url s3_owner_activated
french_english_bilingual DATA
"""
REFERENCE_TASK_KEYS = """
DATA_TYPE task_id type status is_ok is_paused label username owner_id request_time completion_time deadline
source_endpoint_id source_endpoint_display_name source_endpoint destination_endpoint_id
destination_endpoint_display_name destination_endpoint sync_level encrypt_data verify_checksum delete_destination_extra
recursive_symlinks preserve_timestamp skip_source_errors fail_on_quota_errors filter_rules command history_deleted
faults files directories symlinks files_skipped files_transferred subtasks_total subtasks_pending subtasks_retrying
subtasks_succeeded subtasks_expired subtasks_canceled subtasks_failed subtasks_skipped_errors bytes_transferred
bytes_checksummed effective_bytes_per_second nice_status nice_status_short_description nice_status_details
nice_status_expires_in fatal_error canceled_by_admin canceled_by_admin_message source_base_path destination_base_path
"""


async def test_every_key_of_the_reference_is_always_there(
    relay: TransferWorld, alice: Person, laptop: tuple[str, FakeAgent]
) -> None:
    assert set(REFERENCE_ENDPOINT_KEYS.split()) <= set(await alice.get(f"/endpoint/{laptop[0]}"))
    never_set_up = (await alice.post("/endpoint", {"display_name": "New"}, status=201))["id"]
    assert set(REFERENCE_ENDPOINT_KEYS.split()) <= set(await alice.get(f"/endpoint/{never_set_up}"))
    document = delete_document(never_set_up, DATA=[{"path": "/old"}])
    task_id = (await alice.post("/delete", document, status=202))["task_id"]
    assert set(REFERENCE_TASK_KEYS.split()) <= set(await alice.get(f"/task/{task_id}"))
    await alice.post(f"/task/{task_id}/cancel")
    assert set(REFERENCE_TASK_KEYS.split()) <= set(await alice.get(f"/task/{task_id}"))


async def test_search_rows_have_what_strict_clients_demand(alice: Person, laptop: tuple[str, FakeAgent]) -> None:
    answer = await alice.get("/endpoint_search", filter_scope="my-endpoints")
    assert set(answer) >= {"DATA_TYPE", "DATA", "offset", "limit", "has_next_page"}
    for key in ("id", "display_name", "owner_id", "owner_string", "entity_type"):
        assert answer["DATA"][0][key] is not None


async def test_a_task_stays_active_while_its_endpoint_is_offline(
    relay: TransferWorld, alice: Person, laptop: tuple[str, FakeAgent]
) -> None:
    id_, agent = laptop
    task_id = (await alice.post("/delete", delete_document(id_), status=202))["task_id"]
    await until(lambda: task_id in agent.tasks)
    relay.registry.down(agent)
    shown = await alice.get(f"/task/{task_id}")
    # Waiting clients take every other status for finished.
    assert (shown["status"], shown["nice_status"], shown["is_ok"]) == ("ACTIVE", "GC_NOT_CONNECTED", False)
    assert "Laptop" in shown["nice_status_details"]
    assert "goes on when it is back" in shown["nice_status_details"]
    relay.registry.up(agent)
    agent.observe(task_id, "ACTIVE", counters=Counters(files=1))
    await until(lambda: bool(agent.acknowledged))
    assert (await alice.get(f"/task/{task_id}"))["nice_status"] == "OK"


async def test_permanent_errors_are_never_a_5xx_that_clients_repeat(
    relay: TransferWorld, alice: Person, laptop: tuple[str, FakeAgent]
) -> None:
    id_, agent = laptop
    relay.registry.down(agent)
    for verb in ("ls", "stat"):
        answer = await alice.ask("GET", f"/operation/endpoint/{id_}/{verb}")
        assert answer.status_code == 502
        assert "ExternalError" in answer.json()["code"]
    assert (await alice.ask("POST", "/shared_endpoint", json={})).status_code == 501


async def test_repeated_slashes_and_versions(alice: Person, relay: TransferWorld) -> None:
    answer = await relay.http.get(f"{relay.services.settings.public_url}//v0.10/task_list", headers=alice.headers)
    assert answer.status_code == 200
    assert answer.headers["x-transfer-api-version"] == "0.10"
    unknown = await alice.ask("GET", "/nothing")
    assert (unknown.status_code, unknown.headers["content-type"]) == (404, "application/json")
    assert set(unknown.json()) == {"code", "message", "request_id", "resource"}
