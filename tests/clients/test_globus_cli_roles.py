"""The unmodified globus-cli gives and takes roles; what it takes away ends a transfer that is under way, at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.clients.lab import Lab

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif("GLOBUS_CLI" not in os.environ, reason="GLOBUS_CLI does not name the globus command"),
]
# Withdrawn within two seconds, as docs/architecture.md says; the rest is for a busy machine.
BOUND = 10.0


@pytest.fixture
def friend(lab: Lab) -> tuple[Lab, dict[str, Any]]:
    """The same world through the eyes of another client, which nobody has given anything."""
    configuration = Path(lab.document["ca_file"]).parents[1] / "relay.yaml"
    command = [Path(sys.executable).with_name("towpath-relay"), "--config", configuration]
    made = subprocess.run([*command, "client", "add", "friend", "--json"], capture_output=True, text=True, check=True)
    account = json.loads(made.stdout)
    secrets = {
        "GLOBUS_CLI_CLIENT_ID": account["client_id"],
        "GLOBUS_CLI_CLIENT_SECRET": account["client_secret"],
        "HOME": lab.environment["HOME"] + "/" + account["client_id"],
    }
    Path(secrets["HOME"]).mkdir()
    return replace(lab, environment={**lab.environment, **secrets}), account


def test_roles_are_given_listed_shown_and_taken(lab: Lab, friend: tuple[Lab, dict[str, Any]]) -> None:
    other, account = friend
    other.run("endpoint", "show", lab.alpha, code=1)
    made = lab.json(
        "endpoint", "role", "create", lab.alpha, "--identity", account["username"], "--role", "activity_monitor"
    )
    assert made["principal"] == account["client_id"]
    assert "activity_monitor" in lab.run("endpoint", "role", "list", lab.alpha)
    assert made["id"] in lab.run("endpoint", "role", "show", lab.alpha, made["id"]) or account["username"] in lab.run(
        "endpoint", "role", "show", lab.alpha, made["id"]
    )
    assert other.json("endpoint", "show", lab.alpha)["my_effective_roles"] == ["activity_monitor"]
    assert "PermissionDenied" in other.run("ls", f"{lab.alpha}:/", code=1)
    assert "PermissionDenied" in other.run("endpoint", "role", "delete", lab.alpha, made["id"], code=1)
    lab.run("endpoint", "role", "delete", lab.alpha, made["id"])
    other.run("endpoint", "show", lab.alpha, code=1)


def test_access_rules_need_the_owners_configuration(lab: Lab, friend: tuple[Lab, dict[str, Any]]) -> None:
    _, account = friend
    words = ("--identity", account["username"], "--permissions", "r", f"{lab.alpha}:/data1/")
    assert "cannot be shared" in lab.run("endpoint", "permission", "create", *words, code=1)
    assert "/" in lab.run("endpoint", "permission", "list", lab.alpha)


def test_a_role_that_is_taken_away_ends_the_transfer_under_way(lab: Lab, friend: tuple[Lab, dict[str, Any]]) -> None:
    other, account = friend
    given = ("--identity", account["username"], "--role", "administrator")
    role = lab.json("endpoint", "role", "create", lab.alpha, *given)["id"]
    lab.run("endpoint", "role", "create", lab.beta, *given)
    # Real data, since holes would arrive at once, and slowly enough to be under way for a while.
    (lab.root("alpha") / "large").write_bytes(os.urandom(256 * 1024**2))
    configuration = ("--config", lab.document["endpoints"]["alpha"]["config_file"])
    lab.towpath("config", "set", *configuration, "limits.bandwidth.send", "200 Mbit/s")
    task = other.json("transfer", f"{lab.alpha}:/large", f"{lab.beta}:/large")["task_id"]
    deadline = time.monotonic() + 60
    while not other.json("task", "show", task)["bytes_transferred"]:
        assert time.monotonic() < deadline, other.json("task", "show", task)
        time.sleep(0.2)
    lab.run("endpoint", "role", "delete", lab.alpha, role)
    taken = time.monotonic()
    shown = other.json("task", "show", task)
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "CANCELED")
    root = lab.root("beta")

    def written() -> int:
        return sum(path.stat().st_blocks for path in root.rglob("*") if path.is_file())

    before = -1
    while before != (now := written()):
        assert time.monotonic() < taken + BOUND, "data still flows after the role was taken away"
        before = now
        time.sleep(0.5)
    assert not (root / "large").exists()
    other.run("ls", f"{lab.alpha}:/", code=1)
    lab.towpath("config", "unset", *configuration, "limits.bandwidth.send")
    (lab.root("alpha") / "large").unlink()
