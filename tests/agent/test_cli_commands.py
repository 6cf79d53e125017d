"""The user's commands against a fake relay: what they send, what they print, how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from agent.cli.task import CANCELS_AT_ONCE
from tests.agent.cli_scene import Run, relay, towpath
from tests.agent.fake_relay import ALPHA, BETA, BOOKMARK, TASK, FakeRelay, Refusal, Request, collection, entry
from tests.agent.fake_relay import task as task_document

__all__ = ["relay", "towpath"]


def sent_document(relay: FakeRelay, kind: str = "transfer") -> dict[str, Any]:
    (request,) = relay.sent("POST", f"/v0.10/{kind}")
    document: dict[str, Any] = request.document
    return document


# --- files -----------------------------------------------------------------------------------------------


def test_ls_finds_a_collection_by_name_and_marks_what_is_no_file(towpath: Run, relay: FakeRelay) -> None:
    relay.listings["/data"] = [entry("a.txt"), entry("sub", "dir"), entry("link", link_target="a.txt")]
    assert towpath("ls", "alpha:/data") == (0, "a.txt\nsub/\nlink -> a.txt\n", "")
    (request,) = relay.sent("GET", f"/v0.10/operation/endpoint/{ALPHA}/ls")
    assert request.query["show_hidden"] == ["0"]


def test_ls_long_filter_order_and_hidden(towpath: Run, relay: FakeRelay) -> None:
    relay.listings["/data"] = [entry("a.txt")]
    code, out, _ = towpath("ls", "-l", "-a", "--filter", "*.txt", "--orderby", "size:desc", f"{ALPHA}:/data")
    assert code == 0
    assert out.splitlines()[1].split() == ["0644", "ada", "staff", "5", "2026-01-02", "03:04:05+00:00", "file", "a.txt"]
    (request,) = relay.sent("GET", f"/v0.10/operation/endpoint/{ALPHA}/ls")
    assert request.query["filter"] == ["name:~*.txt"]
    assert request.query["orderby"] == ["size DESC"]
    assert request.query["show_hidden"] == ["1"]


def test_ls_joins_pages(towpath: Run, relay: FakeRelay) -> None:
    relay.listings["/many"] = [entry(f"f{number:04}") for number in range(2500)]
    code, out, _ = towpath("ls", "-F", "json", f"{ALPHA}:/many")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["DATA"]] == [f"f{number:04}" for number in range(2500)]


def test_ls_recursive_stops_at_its_depth_and_follows_no_symlink(towpath: Run, relay: FakeRelay) -> None:
    relay.listings["/d"] = [entry("one", "dir"), entry("loop", "dir", link_target="..")]
    relay.listings["/d/one"] = [entry("two", "dir")]
    relay.listings["/d/one/two"] = [entry("deep")]
    _, out, _ = towpath("ls", "-r", "--recursive-depth-limit", "1", f"{ALPHA}:/d")
    assert out.splitlines() == ["one/", "loop/ -> ..", "one/two/"]
    _, out, _ = towpath("ls", "-r", f"{ALPHA}:/d")
    assert out.splitlines() == ["one/", "loop/ -> ..", "one/two/", "one/two/deep"]


def test_ls_of_a_file_shows_the_file(towpath: Run, relay: FakeRelay) -> None:
    code = "ExternalError.DirListingFailed.NotDirectory"
    relay.refusals[f"/v0.10/operation/endpoint/{ALPHA}/ls"] = Refusal(502, code, "is a file")
    assert towpath("ls", f"{ALPHA}:/data/a.txt") == (0, "a.txt\n", "")


def test_names_from_a_peer_cannot_act_on_the_terminal(towpath: Run, relay: FakeRelay) -> None:
    relay.listings["/"] = [entry("\x1b]0;gotcha\x07"), entry("\u202egpj.exe"), entry("a\nb"), entry("[red]x[/red]")]
    for option in ([], ["-l"]):
        _, out, _ = towpath("ls", *option, f"{ALPHA}:/")
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "␛1B]0;gotcha␛07" in out
        assert "a␛0Ab" in out
        assert "[red]x[/red]" in out
    _, out, _ = towpath("ls", "-F", "json", f"{ALPHA}:/")
    assert out.isascii()
    assert json.loads(out)["DATA"][0]["name"] == "\x1b]0;gotcha\x07"


def test_stat_tells_what_is_there_and_what_is_not(towpath: Run, relay: FakeRelay) -> None:
    code, out, _ = towpath("stat", "alpha:/data/a.txt")
    assert code == 0
    assert out.startswith("Name:          a.txt\n")
    relay.refusals[f"/v0.10/operation/endpoint/{ALPHA}/stat"] = Refusal(404, "NotFound", "no")
    assert towpath("stat", "alpha:/nope") == (1, "", "towpath: There is nothing at alpha:/nope.\n")


def test_mkdir_and_rename(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("mkdir", "alpha:/new") == (0, "POST done.\n", "")
    assert relay.sent("POST", f"/v0.10/operation/endpoint/{ALPHA}/mkdir")[0].document["path"] == "/new"
    assert towpath("rename", "alpha:/new", "alpha:/newer")[0] == 0
    document = relay.sent("POST", f"/v0.10/operation/endpoint/{ALPHA}/rename")[0].document
    assert (document["old_path"], document["new_path"]) == ("/new", "/newer")
    assert towpath("mkdir", "alpha")[0] == 2


def test_an_ambiguous_name_is_refused_with_the_choices(towpath: Run, relay: FakeRelay) -> None:
    relay.collections.append(collection(TASK, "alpha"))
    code, _, err = towpath("ls", "alpha:/")
    assert code == 1
    assert ALPHA in err
    assert TASK in err
    assert not relay.sent("GET", f"/v0.10/operation/endpoint/{ALPHA}/ls")


def test_a_name_must_fit_whole(towpath: Run) -> None:
    code, _, err = towpath("ls", "alph:/")
    assert code == 1
    assert "called 'alph'" in err


# --- transfer and delete -----------------------------------------------------------------------------------


def test_transfer_sends_what_was_asked_and_nothing_else(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("transfer", "alpha:/a", "beta:/b") == (0, f"Accepted.\nTask ID: {TASK}\n", "")
    document = sent_document(relay)
    assert (document["source_endpoint"], document["destination_endpoint"]) == (ALPHA, BETA)
    assert document["DATA"] == [{"DATA_TYPE": "transfer_item", "source_path": "/a", "destination_path": "/b"}]
    assert document["verify_checksum"] is True
    for absent in ("sync_level", "label", "deadline", "recursive_symlinks", "filter_rules", "notify_on_failed"):
        assert absent not in document


def test_transfer_options_reach_the_document(towpath: Run, relay: FakeRelay) -> None:
    submission = "12345678-1234-4234-8234-123456789abc"
    code, out, _ = towpath(
        *("transfer", "alpha:/a/", "beta:/b/", "-r", "-F", "json", "--label", "my label", "--sync-level", "mtime"),
        *("--preserve-mtime", "--no-verify-checksum", "--delete", "--skip-source-errors", "--fail-on-quota-errors"),
        *("--exclude", "*.tmp", "--include", "*.txt", "--exclude=*", "--symlinks", "keep", "--notify", "failed"),
        *("--xattrs", "--acls", "--hard-links", "--deadline", "2999-01-01T00:00:00", "--submission-id", submission),
    )
    assert code == 0
    assert json.loads(out)["task_id"] == TASK
    document = sent_document(relay)
    assert document["DATA"][0]["recursive"] is True
    assert [(rule["method"], rule["name"], rule["type"]) for rule in document["filter_rules"]] == [
        ("exclude", "*.tmp", "file"),
        ("include", "*.txt", "file"),
        ("exclude", "*", "file"),
    ]
    expected = {
        "label": "my label",
        "sync_level": 2,
        "preserve_timestamp": True,
        "verify_checksum": False,
        "delete_destination_extra": True,
        "skip_source_errors": True,
        "fail_on_quota_errors": True,
        "recursive_symlinks": "keep",
        "towpath_preserve_xattrs": True,
        "towpath_preserve_acls": True,
        "towpath_preserve_hard_links": True,
        "notify_on_succeeded": False,
        "notify_on_failed": True,
        "notify_on_inactive": False,
        "deadline": "2999-01-01T00:00:00+00:00",
        "submission_id": submission,
    }
    assert {name: document[name] for name in expected} == expected


def test_transfer_batch_from_standard_input(towpath: Run, relay: FakeRelay) -> None:
    lines = "one uno\n# a remark\n'two words' \"dos palabras\" -r\nsame\nsum s --external-checksum abc\n"
    assert towpath("transfer", "alpha:/from", "beta:/to", "--batch", "-", stdin=lines)[0] == 0
    items = sent_document(relay)["DATA"]
    assert [(item["source_path"], item["destination_path"]) for item in items] == [
        ("/from/one", "/to/uno"),
        ("/from/two words", "/to/dos palabras"),
        ("/from/same", "/to/same"),
        ("/from/sum", "/to/s"),
    ]
    assert items[1]["recursive"] is True
    assert items[3]["external_checksum"] == "abc"


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["transfer", "alpha", "beta:/x"], "", "both sides need a path"),
        (["transfer", "alpha:/a", "beta:/b", "--no-recursive", "--include", "x"], "", "add --recursive"),
        (["transfer", "alpha:/a", "beta:/b", "-r", "--external-checksum", "x"], "", "does not go with"),
        (["transfer", "alpha:/a", "beta:/b", "--batch", "-"], "x y z\n", "Line 1 of the batch has 3 paths"),
        (["transfer", "alpha:/a", "beta:/b", "--batch", "-"], "x\n'y", "Line 2 of the batch has unbalanced quotes"),
        (["transfer", "alpha:/a", "beta:/b", "--batch", "-"], "x y --wat\n", "Line 1 of the batch"),
        (["transfer", "alpha:/a", "beta:/b", "--batch", "-"], "# nothing\n", "no lines"),
        (["transfer", "alpha:/a", "beta:/b", "--deadline", "soon"], "", "neither a time"),
        (["transfer", "alpha:/a", "beta:/b", "--deadline", "2001-01-01"], "", "already passed"),
        (["transfer", "alpha:/a", "beta:/b", "--notify", "never"], "", "comma list"),
        (["transfer", ":/a", "beta:/b"], "", "names no collection"),
        (["delete", "alpha"], "", "A path is needed"),
        (["delete", "alpha", "--batch", "-"], "a b\n", "one path and nothing else"),
        (["ls", "alpha", "--orderby", "colour"], "", "is not FIELD"),
        (["task", "cancel"], "", "either one task id or --all"),
        (["task", "update", TASK], "", "Give --label, --deadline or --bandwidth-limit"),
        (["endpoint", "search"], "", "Give a text"),
        (["endpoint", "update", "alpha"], "", "at least one thing"),
        (["no-such-command"], "", "No such command"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_submits_nothing(
    towpath: Run, relay: FakeRelay, arguments: list[str], stdin: str, words: str
) -> None:
    code, _, err = towpath(*arguments, stdin=stdin)
    assert (code, words in err) == (2, True), err
    assert not [request for request in relay.requests if request.path in ("/v0.10/transfer", "/v0.10/delete")]


def test_dry_run_shows_the_document_and_submits_nothing(towpath: Run, relay: FakeRelay) -> None:
    code, out, _ = towpath("transfer", "--dry-run", "alpha:/a", "beta:/b")
    assert code == 0
    assert json.loads(out)["DATA"][0]["source_path"] == "/a"
    assert not relay.sent("POST", "/v0.10/transfer")


def test_delete_and_rm(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("delete", "-r", "-f", "alpha:/old")[0] == 0
    document = sent_document(relay, "delete")
    assert document["DATA"] == [{"DATA_TYPE": "delete_item", "path": "/old"}]
    assert (document["recursive"], document["ignore_missing"], document["interpret_globs"]) == (True, True, False)
    relay.requests.clear()
    relay.refusals[f"/v0.10/operation/endpoint/{ALPHA}/stat"] = Refusal(404, "NotFound", "no")
    code, out, _ = towpath("rm", "alpha:/x*")
    assert (code, out) == (0, f"Task {TASK} is done.\n")
    assert sent_document(relay, "delete")["interpret_globs"] is True


@pytest.mark.parametrize(
    ("arguments", "globs"),
    [(["alpha:/run[1].dat"], False), (["--globs", "alpha:/run[1].dat"], True), (["alpha:/run1.dat"], True)],
)
def test_rm_takes_a_name_that_is_there_for_itself(
    towpath: Run, relay: FakeRelay, arguments: list[str], globs: bool
) -> None:
    """As a pattern it would delete run1.dat, and leave run[1].dat."""
    code, _, err = towpath("rm", *arguments)
    assert code == 0
    assert sent_document(relay, "delete")["interpret_globs"] is globs
    assert ("called just so" in err) is not globs


def test_rm_deletes_nothing_when_it_cannot_tell_a_name_from_a_pattern(towpath: Run, relay: FakeRelay) -> None:
    relay.refusals[f"/v0.10/operation/endpoint/{ALPHA}/stat"] = Refusal(502, "ExternalError", "not connected")
    assert towpath("rm", "alpha:/run[1].dat")[0] == 1
    assert not relay.sent("POST", "/v0.10/delete")


# --- exit codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (task_document("SUCCEEDED"), 0),
        (task_document("SUCCEEDED", subtasks_skipped_errors=2), 3),
        (task_document("FAILED", fatal_error={"code": "ITEMS_FAILED", "description": "no"}), 4),
        (task_document("FAILED", fatal_error={"code": "CANCELED", "description": "stopped"}), 5),
        (task_document("INACTIVE"), 7),
        (task_document(is_paused=True, nice_status="PAUSED_BY_OWNER"), 7),
        (task_document(nice_status="NO_SPACE", towpath={"who": "destination owner"}), 7),
    ],
)
def test_the_exit_code_tells_how_the_task_ended(
    towpath: Run, relay: FakeRelay, answer: dict[str, Any], code: int
) -> None:
    for arguments in (["task", "wait", TASK], ["transfer", "--wait", "alpha:/a", "beta:/b"], ["rm", "alpha:/a"]):
        relay.task_answers = [task_document(), answer]
        assert towpath(*arguments, "--polling-interval", "0.1")[0] == code
        relay.task_answers = [answer]
        found, out, _ = towpath(*arguments, "--format", "json")
        assert (found, json.loads(out)["status"]) == (code, answer["status"])


def test_a_mirror_tells_how_much_it_has_deleted(towpath: Run, relay: FakeRelay) -> None:
    relay.task_answers = [task_document("SUCCEEDED", delete_destination_extra=True, towpath={"deleted": 3})]
    assert f"Task {TASK} is done, 3 deleted at the destination." in towpath("task", "wait", TASK)[1]
    assert ["Deleted", "at", "the", "destination:", "3"] in [
        line.split() for line in towpath("task", "show", TASK)[1].splitlines()
    ]
    # A relay of before, and a transfer that deletes nothing.
    relay.task_answers = [task_document("SUCCEEDED", delete_destination_extra=True)]
    assert f"Task {TASK} is done." in towpath("task", "wait", TASK)[1]
    relay.task_answers = [task_document("SUCCEEDED", towpath={"deleted": 0})]
    assert f"Task {TASK} is done." in towpath("task", "wait", TASK)[1]
    assert "Deleted" not in towpath("task", "show", TASK)[1]


@pytest.mark.parametrize(("found", "brought", "said"), [(1, 0, "1 symlink"), (5, 2, "3 symlinks"), (2, 2, "")])
def test_symlinks_that_were_left_out_are_told(
    towpath: Run, relay: FakeRelay, found: int, brought: int, said: str
) -> None:
    """They are when a task says nothing of links, and it succeeds without a row of errors."""
    beside = {"symlinks_transferred": brought}
    relay.task_answers = [task_document("SUCCEEDED", recursive_symlinks="ignore", symlinks=found, towpath=beside)]
    told = f", {said} left out (see `towpath transfer --symlinks`)" if said else ""
    assert f"Task {TASK} is done{told}.\n" in towpath("task", "wait", TASK)[1]
    assert ["Symlinks:", f"{found},", str(brought), "transferred"] in [
        line.split() for line in towpath("task", "show", TASK)[1].splitlines()
    ]
    # Of a relay of before it is not known how many were brought, and links that a sync level left are there.
    for document in ({"recursive_symlinks": "ignore"}, {"recursive_symlinks": "keep", "towpath": beside}):
        relay.task_answers = [task_document("SUCCEEDED", symlinks=found, **document)]
        assert f"Task {TASK} is done.\n" in towpath("task", "wait", TASK)[1]


def test_waiting_stops_in_time_with_exit_code_6(towpath: Run, relay: FakeRelay) -> None:
    relay.task_answers = [task_document()]
    code, out, _ = towpath("task", "wait", "--timeout", "0", TASK)
    assert code == 6
    assert f"towpath task wait {TASK}" in out


def test_an_offline_endpoint_is_waited_for(towpath: Run, relay: FakeRelay) -> None:
    away = task_document(nice_status="GC_NOT_CONNECTED", towpath={"who": "destination owner"})
    relay.task_answers = [away, away, task_document("SUCCEEDED")]
    assert towpath("task", "wait", "--polling-interval", "0.1", TASK)[0] == 0


def test_a_relay_that_is_away_is_waited_for(towpath: Run, relay: FakeRelay) -> None:
    away = Refusal(502, "ExternalError.Away", "not now")
    relay.task_answers = [task_document(), away, away, task_document("SUCCEEDED")]
    code, _, err = towpath("task", "wait", "--polling-interval", "0.1", TASK)
    assert code == 0
    assert err.count("waiting for the relay") == 1


def test_a_failed_task_names_what_failed(towpath: Run, relay: FakeRelay) -> None:
    relay.task_answers = [task_document("FAILED", fatal_error={"code": "ITEMS_FAILED", "description": "One failed"})]
    relay.rows["skipped_errors"] = [
        {"source_path": "/a\x1b[2J", "error_code": "FILE_NOT_FOUND", "error_details": "gone"},
        {"source_path": None, "destination_path": "/extra", "error_code": "PERMISSION_DENIED", "error_details": None},
    ]
    code, out, _ = towpath("task", "wait", TASK)
    assert code == 4
    assert out.splitlines()[:3] == [
        f"Task {TASK} failed: One failed.",
        "  /a␛1B[2J: gone",
        "  /extra: PERMISSION_DENIED",
    ]


def test_ctrl_c_stops_watching_and_not_the_task(relay: FakeRelay) -> None:
    relay.task_answers = [task_document()]
    command = [sys.executable, "-c", "from agent.cli.main import main; main()", "task", "wait", TASK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert relay.asked.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"`towpath task wait {TASK}` watches it again" in err
    assert "Traceback" not in out + err
    assert not relay.sent("POST", f"/v0.10/task/{TASK}/cancel")


# --- tasks, bookmarks, endpoints --------------------------------------------------------------------------------


def test_task_list_and_show(towpath: Run, relay: FakeRelay) -> None:
    relay.task_answers = [task_document(label="\x1b[31mred")]
    code, out, _ = towpath("task", "list", "--status", "ACTIVE", "--label", "r*")
    assert code == 0
    assert "␛1B[31mred" in out
    (request,) = relay.sent("GET", "/v0.10/task_list")
    assert request.query["filter"] == ["type:TRANSFER,DELETE/status:ACTIVE/label:~r*"]
    code, out, _ = towpath("task", "show", TASK)
    assert "Bytes transferred: 512 B of 1.00 KiB" in out
    assert "ccess lists" not in out
    assert "Mended by" not in out


def test_task_show_names_who_can_mend_what_holds_it_up(towpath: Run, relay: FakeRelay) -> None:
    relay.task_answers = [task_document(nice_status="NO_SPACE", towpath={"who": "destination owner"})]
    _, out, _ = towpath("task", "show", TASK)
    assert [line.split() for line in out.splitlines() if "owner" in line] == [
        ["Mended", "by:", "the", "destination's", "owner"]
    ]


def test_what_became_of_access_lists_is_shown(towpath: Run, relay: FakeRelay) -> None:
    """Also when none was kept, as by a destination's agent that knows no such choice."""
    beside = {"preserve_acls": True, "acls_kept": 0, "acls_not_kept": 3, "acls_refused": 2}
    relay.task_answers = [task_document(towpath=beside)]
    _, out, _ = towpath("task", "show", TASK)
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in out.splitlines())}
    assert found["Access lists kept"] == "0"
    assert found["Access lists not kept in full"] == "3"
    assert found["Access lists refused by the file system"] == "2"


def test_task_rows(towpath: Run, relay: FakeRelay) -> None:
    relay.rows["successful_transfers"] = [{"source_path": "/a", "destination_path": "/b", "size": 3}]
    relay.rows["skipped_errors"] = [{"source_path": "/c", "destination_path": "/d", "error_code": "GONE"}]
    relay.rows["event_list"] = [{"time": "t", "code": "PROGRESS", "is_error": False, "details": '{"bytes": 3}'}]
    assert towpath("task", "show", "-t", TASK)[1].splitlines()[1].split() == ["/a", "/b", "3", "-", "-"]
    assert towpath("task", "show", "--skipped-errors", TASK)[1].splitlines()[1].split() == ["/c", "/d", "GONE", "-"]
    assert towpath("task", "event-list", "--filter-errors", TASK)[1].splitlines()[1].split() == [
        *("t", "PROGRESS", "no", "bytes=3")
    ]
    assert relay.sent("GET", f"/v0.10/task/{TASK}/event_list")[0].query["filter"] == ["is_error:1"]


def test_task_pause_info_names_rules(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("task", "pause-info", TASK) == (0, f"Nothing pauses task {TASK}.\n", "")
    rule = {"endpoint_display_name": "beta", "message": "maintenance", "pause_task_transfer_write": True}
    relay.rows["pause_rules"] = [rule]
    assert towpath("task", "pause-info", TASK)[1] == "beta: transfer to paused: maintenance\n"


def test_many_cancels_wait_beside_one_another(towpath: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for its agent; they are told of in the order of the list, and one that fails is not passed over."""
    ids = [f"00000000-0000-4000-8000-{number:012}" for number in range(20)]
    relay.task_answers = [task_document(task_id=each) for each in ids]
    answer, together = relay.answer, threading.Barrier(CANCELS_AT_ONCE)

    def waiting(request: Request, headers: Any) -> dict[str, Any]:
        # Each of the first ones is answered when all of them have come.
        if request.path.endswith("/cancel") and request.path.split("/")[3] in ids[:CANCELS_AT_ONCE]:
            together.wait(20)
        return answer(request, headers)

    monkeypatch.setattr(relay, "answer", waiting)
    code, out, _ = towpath("task", "cancel", "--all")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ids
    relay.refusals[f"/v0.10/task/{ids[9]}/cancel"] = Refusal(409, "Conflict", "not this one")
    code, _, err = towpath("task", "cancel", "--all")
    assert (code, "not this one" in err) == (1, True)


def test_task_cancel_update_and_ids(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("task", "cancel", TASK)[0] == 0
    assert towpath("task", "cancel", "--all")[0] == 0
    assert len(relay.sent("POST", f"/v0.10/task/{TASK}/cancel")) == 2
    assert towpath("task", "update", TASK, "--label", "new")[0] == 0
    assert relay.sent("PUT", f"/v0.10/task/{TASK}")[0].document == {"DATA_TYPE": "task", "label": "new"}
    for text, limit in (("20 MB/s", 20_000_000), ("none", None)):
        assert towpath("task", "update", TASK, "--bandwidth-limit", text)[0] == 0
        sent = relay.sent("PUT", f"/v0.10/task/{TASK}")[-1].document
        assert sent == {"DATA_TYPE": "task", "towpath_bandwidth_limit": limit}
    assert towpath("task", "update", TASK, "--bandwidth-limit", "fast")[0] == 2
    assert towpath("task", "generate-submission-id")[1].strip() == "ffffffff-0000-4000-8000-000000000006"


def test_bookmarks_name_places(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("bookmark", "create", "alpha:/data", "mine")[1] == f"Bookmark mine is {BOOKMARK}.\n"
    assert relay.sent("POST", "/v0.10/bookmark")[0].document == {"endpoint_id": ALPHA, "path": "/data/", "name": "mine"}
    relay.bookmarks = [{"id": BOOKMARK, "name": "mine", "endpoint_id": ALPHA, "path": "/data/", "pinned": False}]
    relay.listings["/data/sub"] = [entry("x")]
    assert towpath("ls", "mine:sub")[1] == "x\n"
    assert towpath("bookmark", "show", "mine")[1] == f"{ALPHA}:/data/\n"
    assert "alpha" in towpath("bookmark", "list")[1]
    assert towpath("bookmark", "rename", "mine", "yours")[0] == 0
    assert towpath("bookmark", "delete", BOOKMARK)[0] == 0
    code, _, err = towpath("bookmark", "show", "other")
    assert code == 1
    assert "towpath bookmark list" in err


def test_endpoints(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("endpoint", "search", "alpha")[1].splitlines()[1].split() == [
        ALPHA,
        "ada@example.org",
        "alpha",
        "yes",
    ]
    assert "Your roles:        administrator" in towpath("endpoint", "show", "alpha")[1]
    assert towpath("endpoint", "update", "alpha", "--description", "", "--public")[0] == 0
    assert relay.sent("PUT", f"/v0.10/endpoint/{ALPHA}")[0].document == {"description": None, "public": True}
    code, _, err = towpath("endpoint", "delete", "alpha", stdin="n\n")
    assert (code, err.endswith("towpath: Nothing was changed.\n")) == (1, True)
    code, _, err = towpath("endpoint", "delete", "alpha")
    assert (code, "Nobody answered, and nothing was changed; --yes" in err) == (1, True)
    assert not relay.sent("DELETE", f"/v0.10/endpoint/{ALPHA}")
    assert towpath("endpoint", "delete", "-y", "alpha")[0] == 0
    assert relay.sent("DELETE", f"/v0.10/endpoint/{ALPHA}")


# --- trouble ---------------------------------------------------------------------------------------------------


def test_refusals_become_one_sentence(towpath: Run, relay: FakeRelay) -> None:
    path = f"/v0.10/operation/endpoint/{ALPHA}/ls"
    relay.refusals[path] = Refusal(
        502, "ExternalError.DirListingFailed.GCDisconnected", "The agent is \x1b[1mnot there"
    )
    code, _, err = towpath("ls", ALPHA)
    assert (code, len(err.splitlines())) == (1, 1)
    assert err == "towpath: The agent is ␛1B[1mnot there; start it on its machine (`towpath start`) and try again.\n"
    relay.refusals[path] = Refusal(403, "EndpointPermissionDenied", "No access.")
    assert towpath("ls", ALPHA)[2] == "towpath: No access. (EndpointPermissionDenied)\n"
    relay.refusals[path] = Refusal(401, "ClientError.AuthenticationFailed", "dead")
    assert "towpath login" in towpath("ls", ALPHA)[2]
