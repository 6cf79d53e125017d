"""The unmodified globus-cli: long listings, filters, searches, deadlines, checksums, and a collection of one's own."""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.lab import Lab, eventually

pytestmark = [pytest.mark.clients]


# --- the slides of the Globus tutorial, as they are written ----------------------------------------------------------


def test_the_commands_of_the_tutorial(lab: Lab) -> None:
    assert lab.alpha in lab.run("endpoint", "search", "alpha")
    assert "data1/" in lab.run("ls", lab.alpha)
    assert "1M.dat" in lab.run("ls", f"{lab.alpha}:~/data1")
    one = lab.json("transfer", f"{lab.alpha}:~/data1/1M.dat", f"{lab.beta}:~/tutorial/1M.dat")["task_id"]
    words = ("--recursive", f"{lab.alpha}:~/sync-demo", f"{lab.beta}:~/tutorial/syncDemo")
    tree = lab.json("transfer", *words)["task_id"]
    assert (lab.wait(one)["status"], lab.wait(tree)["status"]) == ("SUCCEEDED", "SUCCEEDED")
    assert _names(lab.root("beta") / "tutorial" / "syncDemo") == _names(lab.root("alpha") / "sync-demo")


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- looking around --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(lab: Lab) -> Iterator[str]:
    """A folder with more entries than any page."""
    folder = lab.root("alpha") / "crowd"
    folder.mkdir()
    for number in range(10_500):
        (folder / f"file{number:05d}.{'txt' if number % 2 else 'log'}").touch()
    (folder / "folder").mkdir()
    (folder / ".hidden").write_text("three")
    yield f"{lab.alpha}:/crowd"
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_a_folder_of_many_is_listed_whole(lab: Lab, crowd: str) -> None:
    names = lab.run("ls", crowd).split()
    assert len(names) == 10_501
    assert names == sorted(names)
    assert len(lab.json("ls", "--all", crowd)["DATA"]) == 10_502
    assert ".hidden" in lab.run("ls", "-a", crowd).split()
    path = f"/v0.10/operation/endpoint/{lab.alpha}/ls"
    page = lab.json("api", "transfer", "GET", path, "-Q", "path=/crowd", "-Q", "limit=100", "-Q", "offset=10400")
    assert (page["total"], len(page["DATA"]), page["DATA"][0]["name"]) == (10_502, 100, "file10399.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("file00001.txt", ["file00001.txt"]),
        ("=file00001.txt", ["file00001.txt"]),
        ("~file0000?.txt", [f"file0000{n}.txt" for n in (1, 3, 5, 7, 9)]),
        ("~file0000[13].*", ["file00001.txt", "file00003.txt"]),
        ("~file0000*", [f"file0000{n}.{'txt' if n % 2 else 'log'}" for n in range(10)]),
        ("!~file*", ["folder/"]),
        ("=FILE00001.TXT", []),
    ],
)
def test_listings_are_filtered(lab: Lab, crowd: str, pattern: str, expected: list[str]) -> None:
    assert lab.run("ls", "--filter", pattern, crowd).split() == expected


def test_everything_but_one_name(lab: Lab, crowd: str) -> None:
    assert len(lab.run("ls", "--filter", "!file00001.txt", crowd).split()) == 10_500


def test_listings_are_ordered_and_long(lab: Lab, crowd: str) -> None:
    assert lab.run("ls", "--orderby", "name:DESC", crowd).split()[:2] == ["folder/", "file10499.txt"]
    names = lab.run("ls", "--orderby", "size:DESC", "--orderby", "name:ASC", f"{lab.alpha}:/data1").split()
    assert names == ["100M.dat", "10M.dat", "1M.dat"]
    head, _, first, *_ = lab.run("ls", "--long", f"{lab.alpha}:/data1").splitlines()
    assert head.split(" | ")[0].strip() == "Permissions"
    assert "100M.dat" in first
    shallow = lab.run("ls", "--recursive", "--recursive-depth-limit", "0", f"{lab.alpha}:/sync-demo")
    assert "one/two" not in shallow


def test_stat_tells_kinds_apart(lab: Lab) -> None:
    assert lab.json("stat", f"{lab.alpha}:~/data1/1M.dat")["type"] == "file"
    assert lab.json("stat", f"{lab.alpha}:data1")["type"] == "dir"
    assert lab.json("stat", f"{lab.alpha}:/")["type"] == "dir"
    (lab.root("alpha") / "a link").symlink_to("data1/1M.dat")
    shown = lab.json("stat", f"{lab.alpha}:/a link")
    assert (shown["type"], shown["link_target"]) == ("file", "data1/1M.dat")
    (lab.root("alpha") / "a link").unlink()


# --- finding collections ---------------------------------------------------------------------------------------------


def test_every_scope_of_a_search(lab: Lab) -> None:
    made = lab.json("gcp", "create", "mapped", "of my own")["id"]
    lab.wait(lab.json("transfer", f"{lab.alpha}:/data1/1M.dat", f"{lab.beta}:/searched")["task_id"])
    waiting = lab.json("transfer", f"{lab.alpha}:/data1/1M.dat", f"{made}:/x")["task_id"]
    expected = {
        "administered-by-me": {lab.alpha, lab.beta, made},
        "my-endpoints": {made},
        "my-gcp-endpoints": {made},
        "recently-used": {lab.alpha, lab.beta, made},
        "in-use": {lab.alpha, made},
        "shared-by-me": set(),
        "shared-with-me": {lab.alpha, lab.beta},
    }
    found = {scope: _found(lab, "--filter-scope", scope) for scope in expected}
    assert {scope: found[scope] & {lab.alpha, lab.beta, made} for scope in expected} == expected
    assert _found(lab, "own", "--filter-scope", "all") >= {made}
    assert _found(lab, "nothing has this name") == set()
    owner = lab.document["user"]
    assert _found(lab, "a", "--filter-owner-id", owner) == {lab.alpha, lab.beta}
    assert _found(lab, "alpha", "--filter-entity-type", "gcp_mapped_collection", "--limit", "5") == {lab.alpha}
    assert _found(lab, "alpha", "--filter-entity-type", "gcsv5_endpoint") == set()
    lab.run("task", "cancel", waiting)
    lab.run("endpoint", "delete", made)


def _found(lab: Lab, *words: str) -> set[str]:
    return {row["id"] for row in lab.json("endpoint", "search", *words)["DATA"]}


# --- options of tasks ------------------------------------------------------------------------------------------------


def test_a_batch_of_deletes(lab: Lab) -> None:
    root = lab.root("beta") / "batch"
    for name in ("one", "two words", "folder/deep/file", "kept"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    batch = "# a comment\n\none\n'two words'\nfolder  # all of it\n"
    task = lab.json("delete", "--recursive", "--batch", "-", f"{lab.beta}:/batch", text=batch)["task_id"]
    assert lab.wait(task)["status"] == "SUCCEEDED"
    assert [path.name for path in root.iterdir()] == ["kept"]
    words = ("delete", f"{lab.beta}:/batch/none")
    assert lab.wait(lab.json(*words)["task_id"], code=1)["status"] == "FAILED"
    assert lab.wait(lab.json(*words, "--ignore-missing", "--label", "none")["task_id"])["label"] == "none"
    lab.run("delete", "--dry-run", f"{lab.beta}:/batch/kept")
    task = lab.json("delete", "--enable-globs", "--star-silent", f"{lab.beta}:/batch/k*")["task_id"]
    assert lab.wait(task)["status"] == "SUCCEEDED"
    assert list(root.iterdir()) == []


def test_a_deadline_ends_what_could_not_be_done_until_then(lab: Lab) -> None:
    started = time.monotonic()
    made = lab.json("gcp", "create", "mapped", "never set up")["id"]
    # A second of the clock that is surely still ahead when the relay reads it, however slow commands are today.
    ahead = 4 + 4 * (time.monotonic() - started)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
    deadline = ("--deadline", soon.strftime("%Y-%m-%dT%H:%M:%S"))
    moved = lab.json("transfer", f"{lab.alpha}:/data1/1M.dat", f"{made}:/x", *deadline)["task_id"]
    removed = lab.json("delete", f"{made}:/x", *deadline)["task_id"]
    for task in (moved, removed):
        shown = lab.wait(task, code=1)
        assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "DEADLINE_EXPIRED")
        assert shown["deadline"].startswith(soon.strftime("%Y-%m-%dT%H:%M:%S"))
        codes = [event["code"] for event in lab.json("task", "event-list", task)["DATA"]]
        assert "DEADLINE_EXPIRED" in codes
    assert "deadline lies in the past" in lab.run(
        "transfer", f"{lab.alpha}:/data1/1M.dat", f"{lab.beta}:/late", "--deadline", "2020-01-01", code=1
    )
    lab.run("endpoint", "delete", made)


def test_checksums(lab: Lab) -> None:
    source, digest = f"{lab.alpha}:/data1/1M.dat", hashlib.sha256(_content(lab)).hexdigest()
    for number, words in enumerate(
        [
            ("--no-verify-checksum",),
            ("--verify-checksum", "--checksum-algorithm", "SHA256"),
            ("--external-checksum", digest, "--checksum-algorithm", "sha-256"),
            ("--external-checksum", hashlib.md5(_content(lab), usedforsecurity=False).hexdigest()),
            ("--encrypt-data", "--fail-on-quota-errors", "--notify", "off"),
        ]
    ):
        shown = lab.transfer(source, f"{lab.beta}:/checked/{number}", *words)
        assert shown["status"] == "SUCCEEDED"
        assert shown["verify_checksum"] is ("--no-verify-checksum" not in words)
        assert shown["fail_on_quota_errors"] is ("--fail-on-quota-errors" in words)
        assert (lab.root("beta") / "checked" / str(number)).read_bytes() == _content(lab)
    wrong = ("--external-checksum", digest[::-1], "--checksum-algorithm", "SHA256")
    assert lab.transfer(source, f"{lab.beta}:/checked/wrong", *wrong, code=1)["status"] == "FAILED"
    assert not (lab.root("beta") / "checked" / "wrong").exists()
    assert "checksum_algorithm" in lab.run(
        "transfer", source, f"{lab.beta}:/x", "--external-checksum", digest, "--checksum-algorithm", "CRC8", code=1
    )


def _content(lab: Lab) -> bytes:
    return (lab.root("alpha") / "data1" / "1M.dat").read_bytes()


def test_mirroring(lab: Lab) -> None:
    (lab.root("beta") / "mirror" / "extra").mkdir(parents=True)
    words = ("--recursive", "--delete-destination-extra", "--sync-level", "checksum", "--no-verify-checksum")
    shown = lab.transfer(*words, f"{lab.alpha}:/sync-demo", f"{lab.beta}:/mirror")
    assert shown["status"] == "SUCCEEDED"
    assert not (lab.root("beta") / "mirror" / "extra").exists()
    for level in ("exists", "size"):
        assert lab.transfer("-r", "-s", level, f"{lab.alpha}:/sync-demo", f"{lab.beta}:/mirror")["files_skipped"] == 9


def test_pause_info_and_lists_of_tasks(lab: Lab) -> None:
    words = ("--label", "of the list")
    task = lab.json("transfer", f"{lab.alpha}:/data1/1M.dat", f"{lab.beta}:/listed", *words)["task_id"]
    assert lab.json("task", "pause-info", task)["pause_rules"] == []
    shown = lab.wait(task)
    words = ("--limit", "1", "--filter-status", "SUCCEEDED", "--filter-type", "TRANSFER")
    assert [row["task_id"] for row in lab.json("task", "list", *words)["DATA"]] == [task]
    labelled = lab.json("task", "list", "--filter-label", "of the list")["DATA"]
    assert [row["task_id"] for row in labelled] == [task]
    assert task in lab.run("task", "list", "--filter-task-id", task, "--filter-not-label", "something else")
    # Times as the command shows them can be asked for; the last second counts as a whole.
    begun, ended = shown["request_time"][:19], shown["completion_time"][:19]
    words = ("--filter-requested-after", begun, "--filter-requested-before", begun, "--filter-label", "of the list")
    words += ("--filter-completed-after", ended, "--filter-completed-before", ended)
    assert task in lab.run("task", "list", *words, "--exact")
    assert "one line" in lab.run(
        "transfer", f"{lab.alpha}:/data1/1M.dat", f"{lab.beta}:/listed", "--label", "two\nlines", code=1
    )


# --- a collection of one's own ---------------------------------------------------------------------------------------


def test_a_collection_is_created_set_up_and_used(lab: Lab, tmp_path: Path) -> None:
    """``gcp create mapped`` → ``towpath setup`` with its key, with a home that is not the root."""
    root = tmp_path / "root"
    (root / "people" / "al").mkdir(parents=True)
    (root / "people" / "al" / "notes").write_text("of al")
    made = lab.json("gcp", "create", "mapped", "of al", "--description", "A place")
    key, id_ = made["globus_connect_setup_key"], made["id"]
    assert "GCDisconnected" in lab.run("ls", f"{id_}:/", code=1)
    assert "no agent serves" in lab.run("transfer", f"{id_}:~/notes", f"{lab.beta}:/x", code=1)
    config = ("--config", tmp_path / "agent.yaml")
    lab.towpath("setup", *config, "--root", root, "--home", "/people/al", TOWPATH_SETUP_KEY=key)
    text = (tmp_path / "agent.yaml").read_text()
    (tmp_path / "agent.yaml").write_text(_on_loopback(text))
    lab.towpath("start", *config)
    try:
        eventually(lambda: lab.json("endpoint", "show", id_)["gcp_connected"])
        assert lab.run("ls", id_).split() == lab.run("ls", f"{id_}:~").split() == ["notes"]
        assert lab.run("ls", f"{id_}:/").split() == ["people/"]
        assert lab.transfer(f"{id_}:~/notes", f"{lab.beta}:/of al")["status"] == "SUCCEEDED"
        assert lab.transfer(f"{lab.alpha}:~/data1/1M.dat", f"{id_}:in/1M.dat")["status"] == "SUCCEEDED"
        assert (root / "people" / "al" / "in" / "1M.dat").read_bytes() == _content(lab)
        lab.run("mkdir", f"{id_}:~/made")
        lab.run("rename", id_, "~/made", "/people/renamed")
        task = lab.json("delete", "--recursive", f"{id_}:../renamed")["task_id"]
        assert lab.wait(task)["status"] == "SUCCEEDED"
        assert sorted(path.name for path in root.rglob("*") if path.is_dir()) == ["al", "in", "people"]
        lab.run("endpoint", "update", id_, "--default-directory", "/people/")
        assert lab.run("ls", id_).split() == ["al/"]
        inside = lab.transfer("-r", f"{id_}:~/", f"{id_}:/people/copy")
        assert (inside["status"], inside["files_transferred"]) == ("SUCCEEDED", 2)
    finally:
        lab.towpath("stop", *config)
    lab.run("endpoint", "delete", id_)


def _on_loopback(text: str) -> str:
    assert "allow_loopback: false" in text
    text = text.replace("allow_loopback: false", "allow_loopback: true")
    return text.replace("advertise: []", "advertise: [127.0.0.1]")


def test_two_agents_of_one_key_are_refused(lab: Lab, tmp_path: Path) -> None:
    made = lab.json("gcp", "create", "mapped", "once")
    said = []
    for number, code in ((1, 0), (2, 1)):
        config = tmp_path / str(number) / "agent.yaml"
        os.makedirs(config.parent)
        key = made["globus_connect_setup_key"]
        said.append(lab.towpath("setup", "--config", config, "--root", tmp_path, code=code, TOWPATH_SETUP_KEY=key))
    assert "is set up" in said[0]
    assert "was already used" in said[1]
    assert not (tmp_path / "2" / "agent.yaml").exists()
    lab.run("endpoint", "delete", made["id"])
