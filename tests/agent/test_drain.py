"""Draining waits for what ends by itself, and not for people."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from agent import local_socket
from agent.cli.background import drained
from agent.transfer.tasks.held_up import is_drained
from protocol.control import TaskItem, TaskObserved, TaskState
from protocol.errors import Who
from tests.agent.engine_world import world

pytestmark = pytest.mark.usefixtures("workers_forked")


@dataclass
class Task:
    observed: TaskObserved
    running: bool = True
    runnable: bool = False


def task(state: TaskState, who: Who = "", *, code: str = "", running: bool = True, runnable: bool = False) -> Task:
    needs = code in ("NO_SPACE", "PAUSED_BY_OWNER")
    observed = TaskObserved(task_id="t", revision=1, state=state, status_code=code, who=who, needs_person=needs)
    return Task(observed, running, runnable)


WAITS = task("WAITING", "destination owner", code="NO_SPACE")
BEHIND = task("QUEUED", code="DESTINATION_BUSY", running=False, runnable=True)
HELD = task("QUEUED", "destination owner", code="PAUSED_BY_OWNER", running=False)


@pytest.mark.parametrize(
    ("tasks", "over"),
    [
        ([], True),
        ([HELD], True),
        ([task("ACTIVE")], False),
        ([WAITS], True),
        ([WAITS, task("ACTIVE")], False),
        ([task("WAITING", code="CONNECT_FAILED")], False),
        # It says whose that is, and goes on by itself in a moment.
        ([task("WAITING", "destination owner", code="FOLDER_MOVED")], False),
        ([WAITS, BEHIND, HELD], True),
        # Its place is free by now: it is about to begin.
        ([BEHIND], False),
        ([WAITS, task("QUEUED", running=False, runnable=True)], False),
        ([task("WAITING", "you", code="NO_SPACE", running=False, runnable=True)], True),
    ],
)
def test_what_waits_for_people_or_behind_them_is_not_waited_for(tasks: list[Task], *, over: bool) -> None:
    assert is_drained(tasks) == over


async def test_a_machine_is_drained_while_its_last_task_waits_for_its_owner(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        service = made.beta.service
        assert service is not None
        (made.alpha.root / "file").write_bytes(b"content")
        made.beta.root.rename(tmp_path / "elsewhere")
        task_id = await made.submit([TaskItem(source_path="/file", destination_path="/file")])
        assert not service.drained
        with trio.fail_after(20):
            while service.get_task(task_id).state != "WAITING":
                await trio.sleep(0.02)
        seen = service.get_task(task_id)
        assert (seen.who, seen.needs_person) == ("destination owner", True)
        assert (service.drained, service.idle) == (True, False)


class Agent:
    """Answers as one whose tasks go through these states, one with each look."""

    def __init__(self, *statuses: dict[str, Any]) -> None:
        self.statuses = list(statuses)
        self.now = 0.0
        self.looks = 0

    def ask(self, _state_dir: Path, _method: str, path: str) -> dict[str, Any]:
        if path == "/drain":
            return {"message": "draining"}
        self.looks += 1
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def status(*tasks: dict[str, Any], sessions: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "idle": not tasks and not sessions,
        "transfer": {"running": len(tasks), "sessions": sessions},
        "tasks": [{"status_sentence": "", "status_code": "OK", "who": "", **row} for row in tasks],
        **more,
    }


ACTIVE = {"task_id": "first", "state": "ACTIVE"}
FULL = {
    "task_id": "second",
    "state": "WAITING",
    "status_code": "NO_SPACE",
    "status_sentence": "The disk is \x1b[31mfull.",
    "who": "destination owner",
    "needs_person": True,
}


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> Any:
    def drain(agent: Agent, timeout: float | None = None) -> tuple[list[dict[str, Any]] | None, list[str]]:
        said: list[str] = []
        monkeypatch.setattr(local_socket, "ask", agent.ask)
        monkeypatch.setattr(time, "sleep", agent.sleep)
        monkeypatch.setattr(time, "monotonic", lambda: agent.now)
        return drained(Path("/nowhere"), said.append, timeout), said

    return drain


def test_a_task_that_waits_for_a_person_is_named_and_not_waited_for(draining: Any) -> None:
    agent = Agent(status(ACTIVE, FULL, drained=False), status(FULL, drained=True))
    unfinished, said = draining(agent)
    assert [row["task_id"] for row in unfinished] == ["second"]
    assert agent.looks == 2
    assert said[0] == "Nothing new begins. 2 task(s) run here and 0 read from here."
    assert said[1].startswith("Not waited for: task second waits for the destination's owner. The disk is ")
    assert "\x1b" not in said[1]


def test_waiting_is_bounded_where_that_is_asked_for(draining: Any) -> None:
    agent = Agent(status(ACTIVE, FULL, sessions=1, drained=False))
    unfinished, said = draining(agent, 2.5)
    assert [row["task_id"] for row in unfinished] == ["first", "second"]
    assert agent.now == 2.5
    assert said[1].startswith("The time is up")
    assert "second" in said[2]


def test_an_agent_of_before_says_only_whether_it_is_idle(draining: Any) -> None:
    agent = Agent(status(ACTIVE), status(ACTIVE), status())
    assert draining(agent)[0] == []
    assert agent.looks == 3


def test_nothing_is_drained_where_no_agent_runs(draining: Any) -> None:
    class Gone(Agent):
        def ask(self, *_: object) -> dict[str, Any]:
            raise local_socket.NotRunning("No agent runs.")

    assert draining(Gone()) == (None, [])
