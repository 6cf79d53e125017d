"""`towpath share` against a real relay: a folder whose name needs quoting, reached with the words that it says to send,
and the same rule in the unmodified globus-cli."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.lab import Lab, eventually

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif("GLOBUS_CLI" not in os.environ, reason="GLOBUS_CLI does not name the globus command"),
]
FOLDER = 'it\'s $HOME; "new" ü 100%'


def test_a_folder_is_shared_and_taken_back(lab: Lab) -> None:
    configuration = Path(lab.document["ca_file"]).parents[1] / "relay.yaml"
    command = [Path(sys.executable).with_name("towpath-relay"), "--config", configuration]
    made = subprocess.run([*command, "client", "add", "reader", "--json"], capture_output=True, text=True, check=True)
    account = json.loads(made.stdout)
    (lab.root("alpha") / FOLDER).mkdir()
    (lab.root("alpha") / FOLDER / "result").write_bytes(b"1")
    agent = ("--config", lab.document["endpoints"]["alpha"]["config_file"])
    where = f"{lab.alpha}:/{FOLDER}"
    session = {
        "TOWPATH_RELAY_URL": lab.document["relay_url"],
        "TOWPATH_CA_FILE": lab.document["ca_file"],
        "TOWPATH_CLIENT_ID": lab.document["client_id"],
        "TOWPATH_CLIENT_SECRET": lab.document["client_secret"],
    }
    assert "--sharing" in lab.towpath("share", "add", where, "--with", account["client_id"], code=1, **session)
    lab.towpath("collection", "update", *agent, lab.alpha, "--sharing")
    try:

        def shared() -> str:
            words = ["share", "add", where, "--with", account["client_id"]]
            result = subprocess.run(
                [Path(sys.executable).with_name("towpath"), *words],
                env={**lab.environment, **session},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return result.stderr if result.returncode == 0 else ""

        sentence = eventually(shared).rpartition("What to send them: ")[2]
        # As whoever was told pastes it.
        theirs = {
            **lab.environment,
            **session,
            "TOWPATH_CLIENT_ID": account["client_id"],
            "TOWPATH_CLIENT_SECRET": account["client_secret"],
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        pasted = subprocess.run(["sh", "-c", sentence], env=theirs, capture_output=True, text=True, check=False)
        assert (pasted.returncode, "result" in pasted.stdout) == (0, True), pasted.stderr
        (rule,) = [
            row for row in lab.json("endpoint", "permission", "list", lab.alpha)["DATA"] if row["path"] == f"/{FOLDER}/"
        ]
        assert (rule["principal"], rule["permissions"]) == (account["client_id"], "r")
        # Another spelling of the folder: the rule is changed, and globus-cli sees that.
        again = f"{lab.alpha}://x/../{FOLDER}/"
        lab.towpath("share", "add", again, "--with", account["client_id"], "--write", **session)
        assert lab.json("endpoint", "permission", "show", lab.alpha, rule["id"])["permissions"] == "rw"
        lab.run("endpoint", "permission", "delete", lab.alpha, rule["id"])
        assert FOLDER not in lab.towpath("share", "list", lab.alpha, **session)
    finally:
        lab.towpath("collection", "update", *agent, lab.alpha, "--no-sharing")
