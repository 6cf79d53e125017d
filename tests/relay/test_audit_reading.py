"""The audit log answers an operator's questions: who did what, since when, about whom, and what was refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from relay.audit import reading, trail
from relay.audit.trail import Entry
from relay.cli import cli
from relay.store.database import Store
from tests.relay.test_operator_commands import Operator

DAY = 86400.0
# Long after what the fixtures do, whose commands are in the log with the real time.
NOW = time.time() + 100 * DAY


def entries(ada: str, bob: str, program: str) -> list[Entry]:
    return [
        Entry(time=NOW - 40 * DAY, action="sign_in", outcome="done", who=ada, origin="192.0.2.1"),
        Entry(
            time=NOW - 3 * DAY, action="create_rule", outcome="done", who=ada, facts={"path": "/d", "principal": bob}
        ),
        Entry(time=NOW - 2 * DAY, action="sign_in", outcome="refused", who=bob, origin="192.0.2.9\x1b[2J"),
        Entry(
            time=NOW - DAY, action="user close", outcome="done", origin="command line, user eve", facts={"name": "bob"}
        ),
        Entry(time=NOW - 60, action="token", outcome="refused", client=program),
    ]


@pytest.fixture
def people(relay_directory: Path, relay_store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[Operator, str, str]:
    """Ada and Bob, and a log of what happened before ``NOW`` with nothing else in it."""
    operator = Operator(relay_directory)
    ada, bob = (operator.document("user", "add", name, "--no-link")["id"] for name in ("ada", "bob"))
    program = operator.document("client", "add", "nightly", "--owner", "ada")["client_id"]
    with relay_store.writing_engine.begin() as connection:
        trail.append(connection, entries(ada, bob, program))
    monkeypatch.setattr(time, "time", lambda: NOW)
    return operator, ada, bob


def actions(operator: Operator, *words: str) -> list[str]:
    output = operator.run("audit", "show", "--json", *words)
    return [json.loads(line)["action"] for line in output.splitlines()]


def test_questions(people: tuple[Operator, str, str]) -> None:
    operator, _, bob = people
    assert actions(operator) == ["create_rule", "sign_in", "user close", "token"]
    assert actions(operator, "--since", "36h") == ["user close", "token"]
    date = time.strftime("%Y-%m-%d", time.gmtime(NOW - 50 * DAY))
    assert actions(operator, "--since", date, "--by", "ada")[:2] == ["sign_in", "create_rule"]
    assert actions(operator, "--by", "bob") == ["sign_in"]
    assert actions(operator, "--by", "ada") == ["create_rule"]
    # A program is the client of what it did.
    program = operator.document("client", "list")[0]["client_id"]
    assert actions(operator, "--by", program) == ["token"]
    assert actions(operator, "--failed") == ["sign_in", "token"]
    assert actions(operator, "--about", bob) == ["create_rule"]
    assert actions(operator, "--about", "CLOSE") == ["user close"]
    assert "no user or client" in operator.run("audit", "show", "--by", "nobody", code=1)


def test_lines_name_people_and_cannot_hurt_a_terminal(people: tuple[Operator, str, str]) -> None:
    operator, _, bob = people
    rule, refused, closed, token = operator.run("audit", "show").splitlines()
    assert rule.split("  ")[1:4] == ["ada@127.0.0.1", "create_rule", "done"]
    assert f"path=/d principal={bob}" in rule
    assert "\x1b" not in refused
    assert closed.split("  ")[1] == "operator"
    assert "user eve" in closed
    assert token.split("  ")[1] == "the program nightly"


def test_a_program_that_is_gone_is_told_by_its_id_and_nobody_is_somebody(
    people: tuple[Operator, str, str], relay_store: Store
) -> None:
    operator, _, _ = people
    with relay_store.writing_engine.begin() as connection:
        gone = Entry(time=NOW - 9, action="token", outcome="refused", client="gone", origin="192.0.2.1")
        trail.append(connection, [gone, Entry(time=NOW - 8, action="sign_in", outcome="refused", origin="192.0.2.1")])
    told = [line.split("  ")[1] for line in operator.run("audit", "show", "--since", "30s").splitlines()]
    assert told == ["the program gone", "somebody"]


def test_a_moment_that_is_none_is_wrong_usage(relay_directory: Path) -> None:
    words = ["--config", str(relay_directory / "relay.yaml"), "audit", "show", "--since", "yesterday"]
    done = CliRunner().invoke(cli, words)
    assert (done.exit_code, "36h, 30d, or a date" in done.output) == (2, True)


def test_reading_is_not_recorded_and_goes_over_pages(
    people: tuple[Operator, str, str], relay_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, ada, _ = people
    monkeypatch.setattr(trail, "_PAGE", 2)

    def numbers(**wanted: Any) -> list[int]:
        with relay_store.writing_engine.begin() as connection:
            return [entry["n"] for entry in reading.find(connection, reading.Question(**wanted))]

    everything = numbers()
    assert everything == list(range(1, len(everything) + 1))
    assert len(numbers(by=ada)) == 2
    operator.run("audit", "show")
    assert numbers() == everything
