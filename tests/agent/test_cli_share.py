"""Sharing folders with people by name: what is asked of the relay, and what is refused before anything is shared."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent.cli_scene import Run, relay, towpath
from tests.agent.fake_relay import ALPHA, CLIENT, FakeRelay, Refusal, entry

__all__ = ["relay", "towpath"]

BOB = {"id": "bbbbbbbb-0000-4000-8000-00000000000b", "username": "bob@example.org"}
EVE = {"id": "eeeeeeee-0000-4000-8000-00000000000e", "username": "eve@elsewhere.example"}
RULES = f"/v0.10/endpoint/{ALPHA}/access"
RULE = "99999999-0000-4000-8000-000000000009"


@pytest.fixture(autouse=True)
def folders(relay: FakeRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths with a dot are files."""
    relay.people = [BOB, EVE]
    monkeypatch.setattr(
        "tests.agent.fake_relay.entry", lambda name, *_a, **_m: entry(name, "file" if "." in name else "dir")
    )


def made(relay: FakeRelay) -> list[dict[str, Any]]:
    return [request.document for request in relay.sent("POST", RULES)]


def test_people_are_found_by_name_and_told_what_to_send(towpath: Run, relay: FakeRelay) -> None:
    code, out, err = towpath("share", "add", "alpha:/my results", "--with", "bob", "--with", EVE["id"], "--write")
    assert (code, out) == (
        0,
        "alpha:/my results/ is shared with bob@example.org, eve@elsewhere.example, to read and change.\n",
    )
    assert err == f"What to send them: towpath ls '{ALPHA}:/my results/'\n"
    assert [(rule["principal"], rule["path"], rule["permissions"]) for rule in made(relay)] == [
        (BOB["id"], "/my results/", "rw"),
        (EVE["id"], "/my results/", "rw"),
    ]
    assert not any("expiration_date" in rule for rule in made(relay))


def test_everybody_and_until_when(towpath: Run, relay: FakeRelay) -> None:
    assert towpath("share", "add", "alpha:/", "--with-everybody", "--until", "2999-01-01")[0] == 0
    (rule,) = made(relay)
    assert (rule["principal_type"], rule["principal"], rule["permissions"]) == ("all_authenticated_users", "", "r")
    assert rule["expiration_date"] == "2999-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["alpha:/data", "--with", "bob", "--with", "nobody"], 1, "Nobody here is called nobody@example.org"),
        (["alpha:/data"], 2, "Say with whom"),
        (["alpha:/data", "--with", "bob", "--with-everybody"], 2, "Say with whom"),
        (["alpha", "--with", "bob"], 2, "has no path"),
        (["alpha:data", "--with", "bob"], 1, "from the collection's root"),
        (["alpha:~/data", "--with", "bob"], 1, "from the collection's root"),
        (["alpha:/~/data", "--with", "bob"], 1, "from the collection's root"),
        (["alpha://~/data", "--with", "bob"], 1, "from the collection's root"),
        (["alpha:/" + "x" * 300, "--with", "bob"], 1, "255 bytes at most"),
        (["alpha:/data", "--with", "eve,bob"], 1, "several people"),
        (["alpha:/data.csv", "--with", "bob"], 1, "is a file, and only folders are shared"),
        (["alpha:/data", "--with", "bob", "--until", "soon"], 2, "neither a time"),
    ],
)
def test_nothing_is_shared(towpath: Run, relay: FakeRelay, arguments: list[str], code: int, words: str) -> None:
    ended, _, said = towpath("share", "add", *arguments)
    assert (ended, words in said) == (code, True), said
    assert made(relay) == []


def test_a_folder_that_is_not_there_is_not_shared_and_one_that_cannot_be_seen_is(
    towpath: Run, relay: FakeRelay
) -> None:
    stat = f"/v0.10/operation/endpoint/{ALPHA}/stat"
    relay.refusals[stat] = Refusal(404, "NotFound", "no")
    code, _, said = towpath("share", "add", "alpha:/dtaa", "--with", "bob")
    assert (code, said, made(relay)) == (1, "towpath: There is nothing at /dtaa; nothing is shared.\n", [])
    relay.refusals[stat] = Refusal(502, "ExternalError.DirListingFailed.GCDisconnected", "not connected")
    assert towpath("share", "add", "alpha:/data", "--with", "bob")[0] == 0
    assert len(made(relay)) == 1


@pytest.mark.parametrize("written", ["/data", "/data/", "//data", "/x/../data"])
def test_sharing_again_changes_what_may_be_done(towpath: Run, relay: FakeRelay, written: str) -> None:
    relay.refusals[RULES] = Refusal(409, "Exists", "There is a rule")
    rule = {"id": RULE, "principal_type": "identity", "principal": BOB["id"], "path": "/data/", "permissions": "r"}
    other = {**rule, "id": "88888888-0000-4000-8000-000000000008", "path": "/"}
    role = {**rule, "id": None, "role_type": "administrator"}
    relay.rows["access_list"] = [role, other, rule]
    assert towpath("share", "add", f"alpha:{written}", "--with", "bob", "--write")[0] == 0
    (change,) = relay.sent("PUT", f"{RULES}/{RULE}")
    assert (change.document["permissions"], change.document["expiration_date"]) == ("rw", None)


def test_rules_are_listed_with_names_and_taken_back(towpath: Run, relay: FakeRelay) -> None:
    rule = {"id": RULE, "principal_type": "identity", "principal": BOB["id"], "path": "/data/", "permissions": "r"}
    everybody = {**rule, "principal_type": "all_authenticated_users", "principal": "", "permissions": "rw"}
    unknown = {**rule, "principal": CLIENT, "id": None, "expiration_date": "2999-01-01"}
    relay.rows["access_list"] = [unknown, rule, everybody]
    code, out, _ = towpath("share", "list", "alpha")
    assert code == 0
    lines = [line.split("  ") for line in out.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines[1:]] == [
        ["(a role)", CLIENT, "read", "/data/", "2999-01-01"],
        [RULE, "bob@example.org", "read", "/data/", "-"],
        [RULE, "everybody who is signed in", "read and write", "/data/", "-"],
    ]
    assert towpath("share", "remove", "alpha", RULE)[0] == 0
    assert relay.sent("DELETE", f"{RULES}/{RULE}")


def test_whoever_was_given_one_folder_is_told_to_name_it(towpath: Run, relay: FakeRelay) -> None:
    relay.refusals[f"/v0.10/operation/endpoint/{ALPHA}/ls"] = Refusal(403, "PermissionDenied", "You may not.")
    code, _, said = towpath("ls", "alpha")
    assert (code, "name that: alpha:/FOLDER/." in said) == (1, True)
    assert "FOLDER" not in towpath("ls", "alpha:/x")[2]
