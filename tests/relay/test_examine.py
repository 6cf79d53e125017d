"""`towpath-relay doctor` finds each broken state, says what to do, and changes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from protocol import python_build
from protocol.findings import Finding
from protocol.private_file import write_private_file
from relay import examine, lock, tls
from relay.cli.main import main
from relay.lock import exclusive
from relay.settings import Settings
from tests.relay.test_operator_commands import Operator

DAY = 86400.0


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def the_one(findings: Iterable[Finding], level: str) -> str:
    """The sentence of the only finding that is not fine; it comes with advice."""
    (found,) = [finding for finding in findings if finding.level != "ok"]
    assert (found.level, bool(found.advice)) == (level, True), found
    return found.sentence


def test_a_relay_in_order(relay_directory: Path, relay_settings: Settings) -> None:
    before = {path: path.read_bytes() for path in relay_directory.rglob("*") if path.is_file()}
    checks = (examine.check_files, examine.check_database)
    assert all(level == "ok" for check in checks for level in levels(check(relay_settings)))
    assert levels(examine.check_configuration(relay_settings, relay_directory / "relay.yaml")) == ["ok"]
    assert levels(examine.check_keys(relay_settings, time.time())) == ["ok"]
    assert levels(examine.check_certificate(relay_settings, time.time())) == ["ok"]
    assert {path: path.read_bytes() for path in relay_directory.rglob("*") if path.is_file()} == before


def test_the_command(relay_directory: Path) -> None:
    operator = Operator(relay_directory)
    assert "No relay runs here" in operator.run_anyhow("doctor")
    report = json.loads(operator.run_anyhow("doctor", "--json"))
    assert {"Configuration", "Database", "Process", "Address"} <= {check["name"] for check in report["checks"]}
    (relay_directory / "relay.yaml").write_text("nonsense: 1\n")
    assert "line 1: there is no key nonsense" in operator.run_anyhow("doctor")


def test_what_is_found_acts_on_no_terminal(relay_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Finding("warning", "Named \x1b[2J by a peer.", "Look at \x1b]0;x.")
    monkeypatch.setattr(examine, "examine", lambda *_: iter([("Title \x1b[1m", [found])]))
    said = Operator(relay_directory).run("doctor")
    assert said.splitlines() == ["Title ␛1B[1m", "  WARNING Named ␛1B[2J by a peer.", "          → Look at ␛1B]0;x."]


def test_the_process_ends_with_what_the_command_found(relay_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda _mask: 0)
    for words, code in ((["doctor"], 1), (["config", "check"], 0), (["--version"], 0), (["doctor", "--nonsense"], 2)):
        monkeypatch.setattr("sys.argv", ["towpath-relay", "--config", str(relay_directory / "relay.yaml"), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code, words


def test_files_that_are_named_and_not_there(relay_settings: Settings, tmp_path: Path) -> None:
    wrong = msgspec.structs.replace(relay_settings, updates="releases")
    assert "releases is not there" in the_one(examine.check_configuration(wrong, tmp_path / "relay.yaml"), "failure")


def test_secrets_that_others_can_read(relay_directory: Path, relay_settings: Settings) -> None:
    (relay_directory / "keys" / "root.pem").chmod(0o644)
    assert set(levels(examine.check_files(relay_settings))) == {"ok"}, "nobody else may enter the folder"
    relay_directory.chmod(0o755)
    (relay_directory / relay_settings.database.file).chmod(0o600)
    sentence = the_one(examine.check_files(relay_settings), "failure")
    assert "root.pem" in sentence
    assert "-rw-r--r--" in sentence


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user(relay_directory: Path, relay_settings: Settings) -> None:
    os.chown(relay_directory / "keys" / "ticket-key.json", 12345, -1)
    assert "belongs to user 12345" in the_one(examine.check_files(relay_settings), "failure")


@pytest.mark.parametrize(("free", "level"), [(100 << 20, "failure"), (1 << 30, "warning")])
def test_a_full_disk(relay_settings: Settings, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert f"{free >> 20} MiB are free" in the_one(examine.check_files(relay_settings), level)


def test_databases_that_cannot_be_used(relay_settings: Settings) -> None:
    file = relay_settings.directory_path / relay_settings.database.file
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    assert "newer version (9999)" in the_one(examine.check_database(relay_settings), "failure")
    with file.open("r+b") as damaged:
        damaged.seek(4096)
        damaged.write(b"\xa5" * (file.stat().st_size - 4096))
    assert "read" in the_one(examine.check_database(relay_settings), "failure")
    file.write_bytes(b"")
    assert "There is no database" in the_one(examine.check_database(relay_settings), "failure")


def test_a_database_that_somebody_holds_is_not_called_damaged(
    relay_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "PATIENCE", 0.05)
    holder = sqlite3.connect(relay_settings.directory_path / relay_settings.database.file, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("UPDATE alembic_version SET version_num = version_num")
    assert "locked" in the_one(examine.check_database(relay_settings), "warning")
    holder.close()


def test_keys_that_end(relay_directory: Path, relay_settings: Settings) -> None:
    now = time.time()
    assert levels(examine.check_keys(relay_settings, now + 29 * DAY)) == ["ok"], "it renews itself"
    (relay_directory / "keys" / "root.pem").unlink()
    assert "is renewed by hand" in next(examine.check_keys(relay_settings, now)).sentence
    assert "the root key is not here" in the_one(examine.check_keys(relay_settings, now + 25 * DAY), "warning")
    assert "no transfer begins" in the_one(examine.check_keys(relay_settings, now + 31 * DAY), "failure")
    (relay_directory / "keys" / "ticket-key.json").write_text("{}")
    assert "ticket-key.json is damaged" in the_one(examine.check_keys(relay_settings, now), "failure")


def test_certificates_that_do_not_fit(relay_directory: Path, relay_settings: Settings) -> None:
    now = time.time()
    assert "nobody can connect" in the_one(examine.check_certificate(relay_settings, now + 400 * DAY), "failure")
    assert "ends on" in the_one(examine.check_certificate(relay_settings, now + 390 * DAY), "warning")
    listen = msgspec.structs.replace(relay_settings.listen, url="https://moved.example.org")
    moved = msgspec.structs.replace(relay_settings, listen=listen)
    assert "not good for moved.example.org" in the_one(examine.check_certificate(moved, now), "failure")
    old = [finding.sentence for finding in examine.check_certificate(relay_settings, now + 3300 * DAY)]
    assert "authority ends on" in old[-1]
    gone = list(examine.check_certificate(relay_settings, now + 3660 * DAY))
    assert ("authority ended on" in gone[-1].sentence, gone[-1].level) == (True, "failure")
    assert "towpath-relay authority renew" in gone[-1].advice
    pem = (relay_directory / "tls" / "server.pem").read_bytes()
    own = msgspec.structs.replace(relay_settings.tls, certificate="mine.pem", key="mine.key")
    mine = msgspec.structs.replace(relay_settings, tls=own)
    (relay_directory / "mine.pem").write_bytes(pem)
    write_private_file(relay_directory / "mine.key", tls._pem(ec.generate_private_key(ec.SECP256R1())))
    assert "its key cannot be used" in the_one(examine.check_certificate(mine, now), "failure")


def test_who_runs_here(relay_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_build, "is_unoptimised", lambda: False)
    assert "No relay runs" in the_one(examine.check_process(relay_settings), "failure")
    with exclusive(relay_settings.directory_path):
        few = msgspec.structs.replace(relay_settings.limits, connections=900_000)
        assert "open files" in the_one(
            examine.check_process(msgspec.structs.replace(relay_settings, limits=few)), "warning"
        )
    assert lock.holder_of(relay_settings.directory_path) is None


def test_two_who_look_at_once_take_each_other_for_no_relay(relay_settings: Settings) -> None:
    with (relay_settings.directory_path / lock.LOCK).open("a") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert lock.holder_of(relay_settings.directory_path) is None


def test_a_relay_starts_also_while_somebody_looks_whether_one_runs(
    relay_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (relay_settings.directory_path / lock.LOCK).open("a") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with exclusive(relay_settings.directory_path):
            assert lock.holder_of(relay_settings.directory_path) == str(os.getpid())


def test_an_authority_that_is_away_ends_no_examination(relay_directory: Path, relay_settings: Settings) -> None:
    (relay_settings.directory_path / "tls" / "ca.pem").unlink()
    found = dict(examine.examine(relay_directory / "relay.yaml", time.time()))
    (said,) = found["Address"]
    assert (said.level, "ca.pem" in said.sentence) == ("failure", True)


def test_an_address_at_which_somebody_else_answers(relay_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(outcome: Any) -> None:
        def who(*_: Any) -> str:
            if isinstance(outcome, Exception):
                raise outcome
            return str(outcome)

        monkeypatch.setattr(examine, "_who_answers", who)

    answers((relay_settings.directory_path / "keys" / "relay-id").read_text().strip())
    assert levels(examine.check_address(relay_settings)) == ["ok", "note"]
    assert "Only this machine reaches" in the_one(examine.check_address(relay_settings), "note")
    (relay_settings.directory_path / "keys" / "relay-id").rename(relay_settings.directory_path / "away")
    assert "nobody can tell" in the_one(examine.check_address(relay_settings), "warning")
    (relay_settings.directory_path / "away").rename(relay_settings.directory_path / "keys" / "relay-id")
    answers("another")
    assert "Another relay (another)" in the_one(examine.check_address(relay_settings), "failure")
    answers(ConnectionRefusedError(111, "Connection refused"))
    assert "Connection refused" in the_one(examine.check_address(relay_settings), "failure")
    monkeypatch.setattr(examine.socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError(-2, "no name")))
    assert "has no address: no name" in the_one(examine.check_address(relay_settings), "failure")


@pytest.mark.parametrize(("said", "expected"), [("yes", ["ok"]), ("no", ["warning"]), ("", ["note"])])
def test_the_clock(said: str, expected: list[str]) -> None:
    assert levels(examine.check_clock(("echo", said))) == expected
    assert levels(examine.check_clock(("no-such-command-here",))) == ["note"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("relay.localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("relay.example.org", False),
        ("192.0.2.7", False),
    ],
)
def test_a_name_that_every_machine_has_leads_nobody_here(host: str, expected: bool) -> None:
    assert examine.names_this_machine(host) is expected
