"""Submissions: what is taken, what is refused and in which words, scopes of tickets."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.names import CollectionPath, is_within, parse_path_untrusted
from protocol.ticket import MAX_PATHS
from relay.refusal import ApiError
from relay.transfer.scopes import place, prefixes
from relay.transfer.submission import Submission, read_delete, read_transfer
from relay.transfer.task_rows import pack_items, unpack_items
from tests.relay.transfer_world import TransferWorld, delete_document, open_world, transfer_document

NOW = 1_800_000_000.0
A, B = str(uuid.uuid4()), str(uuid.uuid4())
HOME = (b"home", b"al")
HOMES: dict[str, CollectionPath | None] = {A: HOME, B: HOME}
ITEM = {"DATA_TYPE": "transfer_item", "source_path": "/a", "destination_path": "/b"}
SOON = "2027-06-01 12:00:00"


def transfer(**more: Any) -> Submission:
    return read_transfer(transfer_document(A, B, **more), homes=HOMES, max_items=1000, now=NOW)


def delete(**more: Any) -> Submission:
    return read_delete(delete_document(A, **more), homes=HOMES, max_items=1000, now=NOW)


def test_every_field_arrives() -> None:
    read = transfer(
        label="nightly",
        deadline=SOON,
        sync_level=3,
        verify_checksum=True,
        preserve_timestamp=True,
        encrypt_data=True,
        skip_source_errors=True,
        fail_on_quota_errors=True,
        delete_destination_extra=True,
        recursive_symlinks="keep",
        towpath_relay="until-direct",
        towpath_transport="tcp",
        towpath_compression="off",
        towpath_preserve_xattrs=True,
        towpath_preserve_acls=True,
        towpath_preserve_hard_links=True,
        filter_rules=[
            {"DATA_TYPE": "filter_rule", "method": "include", "name": "*.txt", "type": "file"},
            {"DATA_TYPE": "filter_rule", "method": "exclude", "name": "*", "type": None},
        ],
        notify_on_failed=False,
        store_base_path_info=True,
        perf_cc=4,
        DATA=[
            {**ITEM, "recursive": False, "external_checksum": "0" * 63 + "A", "checksum_algorithm": "sha256"},
            {"DATA_TYPE": "transfer_symlink_item", "source_path": "/l", "destination_path": "/m"},
        ],
    )
    options = read.options
    assert (read.label, read.deadline) == ("nightly", 1_811_851_200.0)
    assert (options.sync_level, options.recursive_symlinks) == (3, "keep")
    assert (options.relay_path, options.transport, options.compression) == ("until-direct", "tcp", "off")
    assert all(
        [
            options.verify_checksum,
            options.preserve_timestamp,
            options.encrypt_data,
            options.skip_source_errors,
            options.fail_on_quota_errors,
            options.delete_destination_extra,
            options.preserve_xattrs,
            options.preserve_acls,
            options.preserve_hard_links,
        ]
    )
    assert [(rule.method, rule.name, rule.type) for rule in options.filter_rules] == [
        ("include", "*.txt", "file"),
        ("exclude", "*", None),
    ]
    assert read.items[0].external_checksum == "0" * 63 + "a"
    assert read.items[0].checksum_algorithm == "SHA256"
    assert read.items[0].recursive is False
    assert read.items[1].symlink is True
    assert read.echo["notify_on_failed"] is False
    assert read.echo["perf_cc"] == 4
    assert read.echo["source_base_path"] == "/"


def test_a_label_is_any_one_line() -> None:
    for label in ("a: b/c, \u00e9 \U0001f600 'd' <e>", "x" * 128, "tab\tinside"):
        assert transfer(label=label).label == label
    assert transfer(label="").label is None


def test_defaults_are_those_of_the_api() -> None:
    options = transfer().options
    assert options.sync_level is None
    assert options.verify_checksum is False
    assert options.recursive_symlinks == "ignore"
    assert (options.relay_path, options.transport) == ("allow", "auto")
    assert not (options.preserve_xattrs or options.preserve_acls or options.preserve_hard_links)
    assert transfer(DATA=[ITEM]).items[0].recursive is None
    assert delete(recursive=None).options.recursive is False


WRONG_TRANSFERS: list[tuple[str, dict[str, Any]]] = [
    ("submission_id", {"submission_id": None}),
    ("submission_id", {"submission_id": "12"}),
    ("source_endpoint", {"source_endpoint": None}),
    ("destination_endpoint", {"destination_endpoint": "x"}),
    ("DATA_TYPE", {"DATA_TYPE": "delete"}),
    ("label", {"label": "x" * 129}),
    ("label", {"label": 5}),
    ("label", {"label": "a\x1b[2J"}),
    ("label", {"label": "two\nlines"}),
    ("label", {"label": "\r"}),
    ("label", {"label": " before"}),
    ("label", {"label": "after\t"}),
    ("label", {"label": " "}),
    ("deadline", {"deadline": "tomorrow"}),
    ("deadline", {"deadline": "2001-01-01"}),
    ("deadline", {"deadline": 7}),
    ("sync_level", {"sync_level": 4}),
    ("sync_level", {"sync_level": "3"}),
    ("sync_level", {"sync_level": True}),
    ("verify_checksum", {"verify_checksum": "yes"}),
    ("preserve_timestamp", {"preserve_timestamp": 1}),
    ("encrypt_data", {"encrypt_data": 0}),
    ("skip_source_errors", {"skip_source_errors": []}),
    ("fail_on_quota_errors", {"fail_on_quota_errors": "x"}),
    ("delete_destination_extra", {"delete_destination_extra": "x"}),
    ("notify_on_failed", {"notify_on_failed": "x"}),
    ("recursive_symlinks", {"recursive_symlinks": "follow"}),
    ("towpath_relay", {"towpath_relay": "sometimes"}),
    ("towpath_transport", {"towpath_transport": "pigeon"}),
    ("towpath_compression", {"towpath_compression": "tightly"}),
    ("towpath_preserve_xattrs", {"towpath_preserve_xattrs": "user"}),
    ("towpath_preserve_acls", {"towpath_preserve_acls": "numbers"}),
    ("towpath_bandwidth_limit", {"towpath_bandwidth_limit": 999}),
    ("towpath_bandwidth_limit", {"towpath_bandwidth_limit": "20 MB/s"}),
    ("filter_rules", {"filter_rules": {}}),
    ("filter rule", {"filter_rules": [{"name": "x"}]}),
    ("method", {"filter_rules": [{"method": "maybe", "name": "x"}]}),
    ("name", {"filter_rules": [{"method": "include"}]}),
    ("type", {"filter_rules": [{"method": "include", "name": "x", "type": "pipe"}]}),
    ("filter_rules", {"filter_rules": [{"method": "include", "name": "x"}] * 1001}),
    ("source_local_user", {"source_local_user": "root"}),
    ("perf_cc", {"perf_cc": -1}),
    ("DATA", {"DATA": {}}),
    ("DATA", {"DATA": [ITEM] * 1001}),
    ("DATA", {"DATA": ["/a"]}),
    ("DATA_TYPE", {"DATA": [{**ITEM, "DATA_TYPE": "delete_item"}]}),
    ("source_path", {"DATA": [{**ITEM, "source_path": None}]}),
    ("source_path", {"DATA": [{**ITEM, "source_path": ""}]}),
    ("source_path", {"DATA": [{**ITEM, "source_path": "/a\0"}]}),
    ("destination_path", {"DATA": [{**ITEM, "destination_path": ["/b"]}]}),
    ("destination_path", {"DATA": [{**ITEM, "destination_path": "/" + "n" * 256}]}),
    ("recursive", {"DATA": [{**ITEM, "recursive": "true"}]}),
    ("checksum_algorithm", {"DATA": [{**ITEM, "checksum_algorithm": "CRC7"}]}),
    ("external_checksum", {"DATA": [{**ITEM, "external_checksum": "zz" * 16}]}),
    ("external_checksum", {"DATA": [{**ITEM, "external_checksum": "00"}]}),
    ("external_checksum", {"DATA": [{**ITEM, "external_checksum": "0" * 32, "recursive": True}]}),
]


@pytest.mark.parametrize(
    ("named", "change"), WRONG_TRANSFERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_wrong_field_is_named(named: str, change: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        transfer(**change)
    assert (refused.value.status, refused.value.code) == (400, "ClientError.BadRequest")
    assert named in refused.value.message
    assert refused.value.message.endswith(".")


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": None},
        {"recursive": "x"},
        {"ignore_missing": 1},
        {"interpret_globs": "x"},
        {"local_user": "root"},
        {"DATA": [{"path": ""}]},
        {"DATA": [{"path": "/"}]},
        {"DATA": [{"path": "/a/.."}]},
        {"DATA": [{"path": "/*/x"}], "interpret_globs": True},
        {"DATA": [{"DATA_TYPE": "transfer_item", "path": "/x"}]},
    ],
    ids=str,
)
def test_wrong_deletes(change: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        delete(**change)
    assert refused.value.code == "ClientError.BadRequest"


def test_no_items() -> None:
    with pytest.raises(ApiError) as refused:
        transfer(DATA=[])
    assert refused.value.code == "ClientError.BadRequest.NoTransferItems"
    with pytest.raises(ApiError) as refused:
        delete(DATA=[])
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("source", "destination", "allowed"),
    [
        ("/a", "/a", False),
        ("/a/", "/a/b", False),
        ("/a", "/ab", True),
        ("/a/b", "/a", True),
        ("~/a", "/~/a/b", False),
        ("a", "~/a", False),
        ("/a/./b/..", "/a", False),
        ("~/../x", "~/../x", False),
        ("/a", "~/a", True),
        ("/home/al/a", "~/a", False),
        ("/home", "~/a", False),
        ("~", "~/../b", True),
    ],
)
def test_nothing_is_copied_onto_or_into_itself(source: str, destination: str, allowed: bool) -> None:
    item = {**ITEM, "source_path": source, "destination_path": destination}
    document = transfer_document(A, A, DATA=[item])
    if allowed:
        read_transfer(document, homes=HOMES, max_items=10, now=NOW)
    else:
        with pytest.raises(ApiError, match="itself"):
            read_transfer(document, homes=HOMES, max_items=10, now=NOW)


# --- scopes ------------------------------------------------------------------------------------------------------


def test_paths_are_resolved_at_home() -> None:
    item = {**ITEM, "source_path": "~/a/", "destination_path": "b/../c"}
    (read,) = transfer(DATA=[item]).items
    assert (read.source_path, read.destination_path) == ("/home/al/a/", "/home/al/c")
    (read,) = delete(DATA=[{"path": "~/../x"}]).items
    assert read.source_path == "/home/x"


def test_a_home_that_nobody_knows_is_not_guessed() -> None:
    item = {**ITEM, "source_path": "~/a"}
    with pytest.raises(ApiError, match="no agent serves this collection yet") as refused:
        read_transfer(transfer_document(A, B, DATA=[item]), homes={A: None, B: HOME}, max_items=1, now=NOW)
    assert (refused.value.status, refused.value.code) == (409, "Conflict")
    read_transfer(transfer_document(A, B, DATA=[ITEM]), homes={A: None, B: None}, max_items=1, now=NOW)


@pytest.mark.parametrize("path", ["/", "//", "/.", "~/../..", "/~/../../.."])
def test_the_root_of_a_collection_is_not_deleted(path: str) -> None:
    with pytest.raises(ApiError, match="root"):
        delete(DATA=[{"path": path}])


def test_scopes_begin_at_the_root() -> None:
    def scope(*paths: str) -> list[str]:
        return prefixes(place(path, "path", HOME) for path in paths)

    assert scope("/a/b/", "/a/b/c", "//x/../y") == ["/a/b", "/y"]
    assert scope("~/a", "/~/b/", "c") == ["/home/al/a", "/home/al/b", "/home/al/c"]
    assert scope("~/../x", "/a") == ["/a", "/home/x"]
    assert scope("/") == ["/"]
    assert scope("~") == ["/home/al"]
    assert scope("/a/~", "/␛7E/b") == ["/a/~", "/␛7E/b"]
    assert scope("//~/a") == ["/home/al/a"]


def test_globs_of_deletes_widen_the_scope_to_their_directory_only() -> None:
    assert delete(interpret_globs=True, DATA=[{"path": "/~/logs/*.txt"}]).destination_scope == ["/home/al/logs"]
    assert delete(interpret_globs=False, DATA=[{"path": "/~/logs/*.txt"}]).destination_scope == ["/home/al/logs/*.txt"]


names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=8)
paths = st.lists(names, min_size=0, max_size=6).map(lambda parts: "/" + "/".join(parts))


@given(st.lists(paths, min_size=1, max_size=30), st.sampled_from([(), (b"home", b"al")]))
def test_a_scope_covers_every_item_as_the_agent_will_read_it(texts: list[str], home: tuple[bytes, ...]) -> None:
    scope = [parse_path_untrusted(prefix) for prefix in prefixes(place(text, "path", home) for text in texts)]
    for text in texts:
        path = parse_path_untrusted(text, home)
        assert any(is_within(path, prefix) for prefix in scope)


def test_many_items_make_a_bounded_scope_that_still_covers_them() -> None:
    texts = [f"/data/{n % 50}/{n % 7}/file{n}" for n in range(20_000)]
    scope = prefixes(place(text, "path", ()) for text in texts)
    assert len(scope) <= MAX_PATHS
    assert scope != ["/"]
    covers = [parse_path_untrusted(prefix) for prefix in scope]
    assert all(any(is_within(parse_path_untrusted(text), prefix) for prefix in covers) for text in texts[:500])


def test_a_hundred_thousand_items_are_packed_small_and_come_back() -> None:
    items = [{**ITEM, "source_path": f"/d/{n}", "destination_path": f"/e/{n}"} for n in range(100_000)]
    document = transfer_document(A, B, DATA=items)
    read = read_transfer(document, homes=HOMES, max_items=100_000, now=NOW)
    packed = pack_items(read.items)
    assert len(packed) < 4_000_000
    assert unpack_items(packed) == read.items
    assert read.source_scope == ["/d"]


# --- over HTTP ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world) as opened:
        yield opened


async def test_accepted_and_duplicate(relay: TransferWorld) -> None:
    alice, bob = await relay.person("alice"), await relay.person("bob")
    a, _ = await relay.collection(alice, "A")
    b, _ = await relay.collection(alice, "B")
    value = (await alice.get("/submission_id"))["value"]
    document = transfer_document(a, b, submission_id=value.upper())
    first = await alice.post("/transfer", document, status=202)
    assert (first["DATA_TYPE"], first["code"], first["submission_id"]) == ("transfer_result", "Accepted", value)
    assert first["task_link"]["href"] == f"/v0.10/task/{first['task_id']}?format=json"
    for again in (document, {**document, "label": "changed"}, {"submission_id": value}):
        answer = await alice.post("/transfer", again, status=202)
        assert (answer["code"], answer["task_id"]) == ("Duplicate", first["task_id"])
    assert (await alice.get("/task_list"))["total"] == 1
    # A task of the other kind is not what was asked for.
    for other in (delete_document(a, submission_id=value), {"submission_id": value}):
        assert "A transfer was submitted" in await alice.refused("POST", "/delete", 409, "Conflict", json=other)
    # Another user's submission ids are another matter.
    c, _ = await relay.collection(bob, "C")
    d, _ = await relay.collection(bob, "D")
    theirs = await bob.post("/transfer", transfer_document(c, d, submission_id=value), status=202)
    assert theirs["code"] == "Accepted"
    assert theirs["task_id"] != first["task_id"]


async def test_one_submission_id_used_many_times_at_once_is_one_task(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    a, _ = await relay.collection(alice, "A")
    b, _ = await relay.collection(alice, "B")
    document = transfer_document(a, b, submission_id=(await alice.get("/submission_id"))["value"])
    answers: list[dict[str, Any]] = []

    async def submit() -> None:
        answers.append(await alice.post("/transfer", document, status=202))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(submit)
    codes = Counter(answer["code"] for answer in answers)
    assert codes == {"Accepted": 1, "Duplicate": 49}
    assert len({answer["task_id"] for answer in answers}) == 1
    assert (await alice.get("/task_list"))["total"] == 1
    print(f"submissions: {len(answers)}, {dict(codes)}")


async def test_a_read_only_destination_is_refused_at_submission(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    a, _ = await relay.collection(alice, "A")
    b, agent = await relay.collection(alice, "B", read_only=True)
    relay.registry.up(agent)
    while not (await alice.get(f"/endpoint/{b}"))["read_only"]:
        pass
    await alice.refused("POST", "/transfer", 403, "PermissionDenied", json=transfer_document(a, b))
    await alice.refused("POST", "/delete", 403, "PermissionDenied", json=delete_document(b))
    assert (await alice.post("/transfer", transfer_document(b, a), status=202))["code"] == "Accepted"


async def test_a_large_submission_is_taken(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    a, _ = await relay.collection(alice, "A")
    b, _ = await relay.collection(alice, "B")
    items = [{**ITEM, "source_path": f"/d/{n}", "destination_path": f"/e/{n}"} for n in range(100_000)]
    started = time.process_time()
    answer = await alice.post("/transfer", transfer_document(a, b, DATA=items), status=202)
    spent = time.process_time() - started
    # A guard against quadratic work, not a measurement.
    assert spent < 60
    assert (await alice.get(f"/task/{answer['task_id']}"))["towpath"]["item_count"] == 100_000
    items.append(ITEM)
    document = transfer_document(a, b, DATA=items)
    await alice.refused("POST", "/transfer", 400, "ClientError.BadRequest", json=document)
