"""What the agent's log says of its tasks, and that all its processes write lines of one form."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from agent.transfer.tasks.task_log import TaskLog
from protocol.control import Counters, TaskObserved

TASK = "00000000-0000-4000-8000-0000000000b1"


def observed(state: str, code: str = "OK", *, who: str = "", **counters: int) -> TaskObserved:
    return TaskObserved(task_id=TASK, revision=1, state=state, status_code=code, who=who, counters=Counters(**counters))


def test_a_task_that_waits_is_told_once_and_again_when_it_moved() -> None:
    log = TaskLog()
    assert log.line(observed("QUEUED", "QUEUED")) is None
    assert log.line(observed("ACTIVE", files=2)) == (logging.INFO, "begins.")
    assert log.line(observed("ACTIVE", files=2)) is None
    full = observed("WAITING", "NO_SPACE", who="destination owner", files=2, bytes_transferred=5)
    assert log.line(full) == (logging.WARNING, "waits (NO_SPACE, for the destination owner).")
    for _ in range(3):
        # It looks again every few seconds.
        assert log.line(observed("ACTIVE", files=2, bytes_transferred=5)) is None
        assert log.line(full) is None
    missing = log.line(observed("WAITING", "DISK_MISSING", who="destination owner"))
    assert missing is not None
    assert "DISK_MISSING" in missing[1]
    assert log.line(observed("ACTIVE", files=2, bytes_transferred=9)) == (logging.INFO, "goes on.")
    end = observed("SUCCEEDED", "SUCCEEDED", files=2, files_transferred=2, bytes_transferred=10, skipped_errors=1)
    assert log.line(end) == (logging.INFO, "is done: 2 of 2 files, 10 bytes, 1 left out.")


@pytest.mark.parametrize(
    ("end", "level", "words"),
    [
        (observed("FAILED", "ITEMS_FAILED", files=3, failed=1), logging.WARNING, "has failed (ITEMS_FAILED)"),
        (observed("CANCELED", "CANCELED"), logging.INFO, "was cancelled"),
        (observed("SUCCEEDED", "SUCCEEDED", files=1, deleted=7), logging.INFO, "7 deleted"),
        (observed("PAUSED", "PAUSED"), logging.INFO, "is paused."),
        (observed("WAITING", "CONNECT_FAILED"), logging.INFO, "waits (CONNECT_FAILED)."),
    ],
)
def test_ends_and_holds(end: TaskObserved, level: int, words: str) -> None:
    line = TaskLog().line(end)
    assert line is not None
    assert line[0] == level
    assert words in line[1]


def test_a_task_that_had_begun_before_the_agent_goes_on() -> None:
    assert TaskLog(begun=True).line(observed("ACTIVE", files=4)) == (logging.INFO, "goes on.")


@pytest.mark.parametrize("form", ["json", "text", "journal"])
def test_a_worker_writes_lines_as_its_agent_does(form: str) -> None:
    code = (
        "import logging, sys; from agent.log_lines import form_now, log_to_standard_error;"
        f"log_to_standard_error({form!r}, logging.INFO); assert form_now() == {form!r};"
        "import agent.transfer.worker as w; w._logger.info('One\\ntwo'); w._logger.debug('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if form == "json":
        assert json.loads(done.stderr)["event"] == "One\ntwo"
    else:
        lines = done.stderr.splitlines()
        assert lines[0].endswith("INFO towpath.worker: One")
        assert lines[0].startswith("<6>") == (form == "journal")
        assert lines[1:] == ["    two"]
