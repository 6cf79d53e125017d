"""The tables of docs/states.md say what the code does."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, get_args

import pytest

from agent.exit_codes import final_exit_code, needs_attention
from agent.storage.faults import fault
from agent.transfer.basis.patience import ATTEMPTS, DEFAULT_ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE
from protocol import errors
from protocol.control import FINAL_STATES, TaskState

DOCUMENT = (Path(__file__).parents[2] / "docs" / "states.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    section = DOCUMENT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 2, f"no table below {heading}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_state_is_in_the_table() -> None:
    states = [row[0] for row in table("States")]
    assert states == list(get_args(TaskState))
    for state, status, _, code in table("States"):
        assert (status in ("SUCCEEDED", "FAILED")) is (state in FINAL_STATES)
        document: dict[str, Any] = {"status": status, "is_paused": state == "PAUSED", "nice_status": "NO_SPACE"}
        document["towpath"] = {"who": "destination owner"}
        if state == "CANCELED":
            document["fatal_error"] = {"code": "CANCELED"}
        end = final_exit_code(document)
        if state in FINAL_STATES:
            assert end is not None
            assert code.split(",")[0] == str(int(end))
        else:
            assert end is None
            assert ("7" in code) is (state in ("WAITING", "PAUSED"))
    assert final_exit_code({"status": "SUCCEEDED", "subtasks_skipped_errors": 1}) == 3
    assert needs_attention({"status": "ACTIVE", "is_paused": True, "nice_status": "ACCOUNT_CLOSED"})
    assert needs_attention({"status": "ACTIVE", "nice_status": "NO_SPACE", "towpath": {"who": "destination owner"}})
    assert not needs_attention({"status": "ACTIVE", "nice_status": "GC_NOT_CONNECTED", "towpath": {"who": "you"}})


@pytest.mark.parametrize("nice", ["OK", "GC_NOT_CONNECTED", "HELD_BACK"])
def test_a_wait_goes_on_when_an_agent_ends_in_good_order(nice: str) -> None:
    """One that is told to stop (a machine that is turned off, an update) leaves its tasks PAUSED."""
    document = {"status": "ACTIVE", "is_paused": True, "nice_status": nice, "towpath": {"who": "destination owner"}}
    assert needs_attention({**document, "nice_status": "PAUSED_BY_OWNER"})
    assert not needs_attention({**document, "towpath": {"who": ""}} if nice == "OK" else document)


def test_every_class_of_errors_is_in_the_table() -> None:
    classes = {row[0] for row in table("What happens to an error")}
    assert classes == set(get_args(errors.Disposition))


def test_the_budgets_are_those_of_the_code() -> None:
    rows = {row[0]: int(row[1]) for row in table("How often something is tried")}
    assert rows.pop("any other") == DEFAULT_ATTEMPTS
    assert rows == dict(ATTEMPTS)
    assert (FIRST_PAUSE, LONGEST_PAUSE) == (0.2, 15.0)


@pytest.mark.parametrize("row", table("Faults of storage"), ids=lambda row: row[0])
def test_faults_of_storage_have_these_codes(row: list[str]) -> None:
    name, code, disposition = row
    error = fault(OSError(getattr(errno, name), "x"), "destination", b"file")
    assert (error.code, error.disposition) == (code, disposition)
    assert error.sentence.endswith(".")
    if disposition == "person":
        assert error.who == "destination owner"


@pytest.mark.parametrize("heading", ["What holds a task up", "Ends worth knowing"])
def test_every_code_named_is_one_that_the_code_uses(heading: str) -> None:
    root = Path(__file__).parents[2]
    text = "".join(path.read_text() for room in ("agent", "relay", "protocol") for path in (root / room).rglob("*.py"))
    for row in table(heading):
        for code in row[0].split("(")[0].split(","):
            assert f'"{code.strip()}"' in text, code
