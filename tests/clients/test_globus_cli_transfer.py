"""The unmodified globus-cli against a whole world: relay, two agents, real files. One test for each kind of command."""

from __future__ import annotations

import json

import pytest

from tests.clients.lab import Lab

pytestmark = [pytest.mark.clients]


def test_whoami_and_identities(lab: Lab) -> None:
    assert lab.document["client_id"] in lab.run("whoami")
    identities = lab.json("get-identities", lab.document["user"])["identities"]
    assert [row["username"] for row in identities] == [lab.document["user"]]


def test_endpoints_are_found_and_shown(lab: Lab) -> None:
    found = lab.json("endpoint", "search", "alpha", "--filter-scope", "administered-by-me")["DATA"]
    assert [row["id"] for row in found] == [lab.alpha]
    assert "GCP Mapped Collection" in lab.run("endpoint", "show", lab.alpha) or lab.alpha in lab.run(
        "endpoint", "show", lab.alpha
    )
    lab.run("endpoint", "update", lab.alpha, "--description", "measured")
    assert lab.json("endpoint", "show", lab.alpha)["description"] == "measured"
    assert lab.json("endpoint", "my-shared-endpoint-list", lab.alpha)["DATA"] == []


def test_a_collection_is_made_and_deleted(lab: Lab) -> None:
    made = lab.json("gcp", "create", "mapped", "a new one")
    assert made["globus_connect_setup_key"]
    lab.run("endpoint", "delete", made["id"])
    lab.run("endpoint", "show", made["id"], code=1)


def test_files_are_listed(lab: Lab) -> None:
    assert "data1/" in lab.run("ls", lab.alpha)
    assert lab.run("ls", f"{lab.alpha}:~/data1").split() == ["100M.dat", "10M.dat", "1M.dat"]
    assert "10000000" in lab.run("ls", "-l", f"{lab.alpha}:/data1") or "10485760" in lab.run(
        "ls", "-l", f"{lab.alpha}:/data1"
    )
    assert "one/two" in lab.run("ls", "-r", f"{lab.alpha}:/sync-demo")
    assert lab.run("ls", "--filter", "~1M*", f"{lab.alpha}:/data1").split() == ["1M.dat"]
    assert "ClientError.NotFound" in lab.run("ls", f"{lab.alpha}:/nowhere", code=1)


def test_files_are_looked_at_made_and_renamed(lab: Lab) -> None:
    assert "1M.dat" in lab.run("stat", f"{lab.alpha}:/data1/1M.dat")
    assert "Nothing found" in lab.run("stat", f"{lab.alpha}:/data1/none")
    lab.run("mkdir", f"{lab.beta}:/made")
    lab.run("mkdir", f"{lab.beta}:/made", code=1)
    lab.run("rename", lab.beta, "/made", "/renamed")
    assert (lab.root("beta") / "renamed").is_dir()
    lab.run("rm", "--recursive", f"{lab.beta}:/renamed")
    assert not (lab.root("beta") / "renamed").exists()


def test_one_file_as_in_the_tutorial(lab: Lab) -> None:
    shown = lab.transfer(f"{lab.alpha}:~/data1/1M.dat", f"{lab.beta}:~/1M.dat", "--label", "tutorial")
    assert (shown["status"], shown["files_transferred"], shown["label"]) == ("SUCCEEDED", 1, "tutorial")
    assert (lab.root("beta") / "1M.dat").read_bytes() == (lab.root("alpha") / "data1" / "1M.dat").read_bytes()
    rows = lab.json("task", "show", shown["task_id"], "-t")["DATA"]
    assert [row["destination_path"] for row in rows] == ["/1M.dat"]
    codes = [event["code"] for event in lab.json("task", "event-list", shown["task_id"])["DATA"]]
    assert "SUCCEEDED" in codes
    assert "STARTED" in codes
    assert shown["task_id"] in lab.run("task", "list")
    lab.run("task", "pause-info", shown["task_id"])


def test_a_tree_with_options(lab: Lab) -> None:
    shown = lab.transfer("--recursive", f"{lab.alpha}:~/sync-demo", f"{lab.beta}:~/syncDemo", "--preserve-mtime")
    assert (shown["status"], shown["files"], shown["directories"]) == ("SUCCEEDED", 9, 3)
    again = lab.transfer("--recursive", f"{lab.alpha}:~/sync-demo", f"{lab.beta}:~/syncDemo", "--sync-level", "mtime")
    assert (again["files_skipped"], again["files_transferred"]) == (9, 0)
    filtered = lab.transfer(
        "--recursive", f"{lab.alpha}:~/sync-demo", f"{lab.beta}:~/some", "--include", "file1*", "--exclude", "*"
    )
    assert filtered["files_transferred"] == 3


def test_a_batch_with_checksums(lab: Lab) -> None:
    batch = f"data1/1M.dat b/one\n--external-checksum {'0' * 32} data1/1M.dat b/two\n"
    task = lab.json("transfer", f"{lab.alpha}:/", f"{lab.beta}:/", "--batch", "-", text=batch)["task_id"]
    lab.run("task", "wait", task, "--timeout", "60", "--polling-interval", "1", code=1)
    assert lab.json("task", "show", task)["status"] == "FAILED"
    assert sorted(path.name for path in (lab.root("beta") / "b").iterdir()) == ["one"]


def test_errors_that_may_be_skipped(lab: Lab) -> None:
    shown = lab.transfer("--skip-source-errors", f"{lab.alpha}:/nowhere", f"{lab.beta}:/nowhere")
    assert shown["status"] == "SUCCEEDED"
    rows = lab.json("task", "show", shown["task_id"], "--skipped-errors")["DATA"]
    assert [row["error_code"] for row in rows] == ["FILE_NOT_FOUND"]


def test_one_submission_id_is_one_task(lab: Lab) -> None:
    submission = lab.run("task", "generate-submission-id").strip()
    words = (f"{lab.alpha}:/data1/1M.dat", f"{lab.beta}:/once", "--submission-id", submission)
    assert lab.json("transfer", *words)["task_id"] == lab.json("transfer", *words)["task_id"]
    lab.run("transfer", f"{lab.alpha}:/data1/1M.dat", f"{lab.beta}:/dry", "--dry-run")
    assert not (lab.root("beta") / "dry").exists()


def test_deleting(lab: Lab) -> None:
    (lab.root("beta") / "gone" / "deep").mkdir(parents=True)
    (lab.root("beta") / "gone" / "deep" / "file").write_text("x")
    task = lab.json("delete", "--recursive", f"{lab.beta}:/gone")["task_id"]
    lab.run("task", "wait", task, "--timeout", "60", "--polling-interval", "1")
    assert not (lab.root("beta") / "gone").exists()


def test_cancel_and_update(lab: Lab) -> None:
    with (lab.root("alpha") / "sparse").open("wb") as file:
        # A little data in every block: what is all hole is not sent.
        for offset in range(0, 8 * 1024**3, 1024**2):
            file.seek(offset)
            file.write(b"x")
        file.truncate(8 * 1024**3)
    task = lab.json("transfer", f"{lab.alpha}:/sparse", f"{lab.beta}:/sparse")["task_id"]
    lab.run("task", "update", task, "--label", "to be cancelled")
    lab.run("task", "wait", task, "--timeout", "1", "--polling-interval", "1", "--timeout-exit-code", "66", code=66)
    assert "cancel" in lab.run("task", "cancel", task).lower()
    lab.run("task", "wait", task, "--timeout", "60", "--polling-interval", "1", code=1)
    shown = lab.json("task", "show", task)
    assert (shown["status"], shown["label"]) == ("FAILED", "to be cancelled")
    assert not (lab.root("beta") / "sparse").exists()
    (lab.root("alpha") / "sparse").unlink()


def test_bookmarks_and_plain_calls(lab: Lab) -> None:
    lab.run("bookmark", "create", f"{lab.alpha}:/data1/", "mine")
    assert "mine" in lab.run("bookmark", "list")
    lab.run("bookmark", "rename", "mine", "ours")
    assert lab.json("bookmark", "show", "ours")["endpoint_id"] == lab.alpha
    lab.run("bookmark", "delete", "ours")
    assert json.loads(lab.run("api", "transfer", "GET", f"/v0.10/endpoint/{lab.alpha}"))["id"] == lab.alpha
