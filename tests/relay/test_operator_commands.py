"""What the operator does about people at the command line: tokens of long life, closed and opened accounts."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection

from relay import machines
from relay.auth import service_tokens
from relay.auth.tokens import find
from relay.cli import cli
from relay.store.database import Store


class Operator:
    """Somebody with a shell on the relay's machine."""

    def __init__(self, directory: Path) -> None:
        self._config = ["--config", str(directory / "relay.yaml")]

    def run(self, *words: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, [*self._config, *words])
        assert (done.exit_code == 0) == (code == 0), done.output
        return done.output if code == 0 else str(done.exception or done.output)

    def run_anyhow(self, *words: str) -> str:
        """What a command says that ends with 1 when it finds something."""
        done = CliRunner().invoke(cli, [*self._config, *words])
        assert done.exit_code == 1, done.output
        return done.output

    def document(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json"))


@pytest.fixture
def operator(relay_directory: Path) -> Operator:
    return Operator(relay_directory)


def make_token(store: Store, identity_id: str, name: str, days: int) -> str:
    with store.writing_engine.begin() as connection:
        return service_tokens.make(connection, identity_id, name, life=days * 86400.0, now=time.time())


def alive(store: Store, secret: str) -> bool:
    def work(connection: Connection) -> bool:
        return find(connection, secret, time.time()) is not None

    with store.writing_engine.begin() as connection:
        return work(connection)


def test_tokens_are_listed_and_ended(operator: Operator, relay_store: Store) -> None:
    ada, bob = (operator.document("user", "add", name, "--no-link") for name in ("ada", "bob"))
    beamline = make_token(relay_store, ada["id"], "beamline", 90)
    cluster = make_token(relay_store, bob["id"], "cluster", 5)
    rows = operator.document("token", "list")
    assert [(row["name"], row["username"], row["is_ending"]) for row in rows] == [
        ("cluster", bob["username"], True),
        ("beamline", ada["username"], False),
    ]
    assert beamline not in json.dumps(rows)
    assert [row["name"] for row in operator.document("token", "list", "--user", "ada")] == ["beamline"]
    operator.run("token", "end", rows[0]["id"])
    assert (alive(relay_store, beamline), alive(relay_store, cluster)) == (True, False)
    operator.run("token", "end", rows[0]["id"], code=1)
    # Sessions of applications are no tokens of long life.
    assert [row["name"] for row in operator.document("token", "list")] == ["beamline"]


def test_a_closed_account_is_opened_again_without_what_it_had(operator: Operator, relay_store: Store) -> None:
    ada = operator.document("user", "add", "ada", "--no-link")
    secret = make_token(relay_store, ada["id"], "beamline", 90)
    operator.run("user", "open", "ada", code=1)
    operator.run("user", "close", "ada")
    assert not alive(relay_store, secret)
    operator.run("user", "open", "ada")
    assert not alive(relay_store, secret)
    assert [row["status"] for row in operator.document("user", "list")] == ["used"]


def test_commands_load_no_web_server() -> None:
    program = (
        "import sys, relay.accounts, relay.applications.operator;"
        "sys.exit(' '.join({'fastapi', 'starlette', 'hypercorn'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_an_account_names_the_programs_that_go_on(operator: Operator) -> None:
    operator.run("user", "add", "ada", "--no-link")
    operator.run("user", "add", "bob", "--no-link")
    program = operator.document("client", "add", "beamline", "--owner", "ada")["client_id"]
    assert "go on; close each" not in operator.run("user", "close", "bob")
    said = operator.run("user", "close", "ada")
    assert f"  {program}  beamline" in said
    operator.run("user", "close", program)
    operator.run("user", "open", "ada")
    document = operator.document("user", "close", "ada")
    assert (document["username"].partition("@")[0], document["open"], document["programs"]) == ("ada", False, [])
    assert program not in operator.run("user", "close", "ada")


def test_administrators_come_and_go(operator: Operator) -> None:
    for name in ("ada", "bob"):
        operator.run("user", "add", name, "--no-link")

    def roles() -> dict[str, str]:
        return {row["username"].partition("@")[0]: row["role"] for row in operator.document("user", "list")}

    assert "/welcome?key=" in operator.run("user", "administrator")
    operator.run("user", "administrator", "--add", "ada")
    assert roles() == {"ada": "administrator", "bob": "user"}
    assert "has an administrator" in operator.run("user", "administrator")
    # The only one leaves: without a link nobody could become one any more.
    operator.run("user", "close", "ada")
    assert "/welcome?key=" in operator.run("user", "administrator")
    assert "closed" in operator.run("user", "administrator", "--add", "ada", code=1)
    operator.run("user", "administrator", "--add", "bob")
    operator.run("user", "administrator", "--remove", "ada")
    assert roles() == {"ada": "user", "bob": "administrator"}
    assert "is no administrator" in operator.run("user", "administrator", "--remove", "ada", code=1)
    program = operator.document("client", "add", "portal")
    assert "a program" in operator.run("user", "administrator", "--add", program["client_id"], code=1)


def test_what_programs_read(operator: Operator, relay_directory: Path) -> None:
    operator.run("user", "add", "ada", "--no-link")
    assert "/welcome?key=" in operator.document("user", "link", "ada")["link"]
    shown = operator.document("root", "show")
    assert shown["root_public"].startswith("-----BEGIN PUBLIC KEY-----")
    assert (shown["root_here"], shown["relay_id"]) == (
        True,
        (relay_directory / "keys" / "relay-id").read_text().strip(),
    )
    assert shown["ticket_key_expires"].endswith("+00:00")
    before = (relay_directory / "tls" / "ca.pem").read_bytes()
    renewed = operator.document("authority", "renew")
    assert renewed["file"] == str(relay_directory / "tls" / "ca.pem")
    assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(Path(renewed["file"]).read_text())).hexdigest() == renewed["sha256"]
    assert Path(renewed["file"]).read_bytes() != before
    assert renewed["expires"] >= renewed["former_expires"]
    assert "make new ones" in operator.run("authority", "renew")
    assert "authority renew" in operator.run("audit", "show")
    made = operator.document("backup", str(relay_directory.parent / "backup.tar.gz"))
    assert made["bytes"] == Path(made["file"]).stat().st_size
    verdict = operator.document("audit", "verify")
    assert (verdict["broken"], len(verdict["head"])) == (None, 64)
    with sqlite3.connect(relay_directory / "relay.sqlite") as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("UPDATE audit_log SET entry = '{}' WHERE n = 2")
    connection.close()
    assert json.loads(operator.run_anyhow("audit", "verify", "--json"))["broken"] == 2


def test_lists_say_what_their_columns_are(operator: Operator) -> None:
    operator.run("user", "add", "ada", "--no-link", "--full-name", "Ada Lovelace")
    operator.run("user", "add", "b", "--no-link")
    heading, first, second = operator.run("user", "list").splitlines()
    assert heading.split() == ["Id", "Username", "Status", "Role", "Name"]
    for column in ("Username", "Status", "Role", "Name"):
        place = heading.index(column)
        assert {line[place - 1] for line in (first, second)} == {" "}
        assert " " not in {line[place] for line in (first, second)}
    assert operator.run("agent", "list").split()[:2] == ["Node", "id"]


def test_times_in_lists_are_given_to_the_second(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"owner": "ada", "state": "enrolled", "version": "1", "hostname": "h", "collections": ["c"]}
    rows = [
        {"node_id": "n", "last_linked": "2026-11-30T21:22:01.291996+00:00", **told},
        {"node_id": "m", "last_linked": None, **told},
    ]

    async def work(_store: Store) -> Any:
        return rows

    monkeypatch.setattr(machines, "listing_agents", lambda _settings, _who: work)
    first, second = operator.run("agent", "list").splitlines()[1:]
    assert first.split() == ["n", "ada", "enrolled", "2026-11-30", "21:22:01", "1", "h", "c"]
    assert second.split() == ["m", "ada", "enrolled", "-", "1", "h", "c"]
    assert operator.document("agent", "list") == rows


def test_a_role_is_given_on_a_collection_that_is_there(operator: Operator) -> None:
    operator.run("user", "add", "ada", "--no-link")
    program = operator.document("client", "add", "nightly", "--owner", "ada")
    made = operator.document("collection", "add", "Ada's server", "--owner", "ada")
    wanted = f"{program['client_id']}:administrator"
    assert "has the role administrator on Ada's server" in operator.run("collection", "grant", "Ada's server", wanted)
    assert "already has the role" in operator.run("collection", "grant", made["collection_id"], wanted, code=1)
    assert "no collection" in operator.run("collection", "grant", "Ada's servr", wanted, code=1)
    assert "roles are" in operator.run("collection", "grant", "Ada's server", f"{program['client_id']}:king", code=1)
    assert "no user" in operator.run("collection", "grant", "Ada's server", "eve:administrator", code=1)
    assert len(operator.document("collection", "list")) == 1


def test_a_collection_of_a_name_that_its_owner_has_is_pointed_out_and_taken_back(operator: Operator) -> None:
    operator.run("user", "add", "ada", "--no-link")
    operator.run("user", "add", "bob", "--no-link")
    first = operator.document("collection", "add", "laptop", "--owner", "ada")["collection_id"]
    assert "of this name" not in operator.run("collection", "add", "laptop", "--owner", "bob")
    said = operator.run("collection", "add", "laptop", "--owner", "ada")
    assert f"has {first} of this name" in said
    second = said.partition("collection remove ")[2].split()[0]
    assert "write the id" in operator.run("collection", "remove", "laptop", code=1)
    assert "is removed" in operator.run("collection", "remove", second)
    assert "no collection" in operator.run("collection", "remove", second, code=1)
    assert [row["collection_id"] for row in operator.document("collection", "list", "--user", "ada")] == [first]


def test_a_root_key_that_was_moved_is_asked_for(operator: Operator, tmp_path: Path) -> None:
    operator.run("root", "move", str(tmp_path / "root.pem"))
    assert "with --root FILE" in operator.run("root", "certify", code=1)
    assert "moved before" in operator.run("root", "move", str(tmp_path / "again.pem"), code=1)
    assert "is certified" in operator.run("root", "certify", "--root", str(tmp_path / "root.pem"))
