"""Pausing a whole machine, and tasks one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from agent.daemon import Daemon
from agent.policy import AccessDenied
from agent.transfer.held_up import told
from protocol.control import TaskItem, TaskObserved
from tests.agent.engine_world import World, world


@asynccontextmanager
async def two_tasks(directory: Path) -> AsyncIterator[tuple[World, str, str, trio.CancelScope]]:
    """One that is paused alone, and another; neither has begun. The scope ends the destination."""
    async with trio.open_nursery() as nursery:
        made = World(directory, nursery)
        await made.start(made.alpha)
        scope = await made.start(made.beta)
        for name in ("alone", "other"):
            (made.alpha.root / name).write_bytes(name.encode())
        await made.beta.service.suspend(suspended=True)
        alone, other = [
            await made.submit([TaskItem(source_path=f"/{name}", destination_path=f"/{name}")])
            for name in ("alone", "other")
        ]
        await made.beta.service.pause_task(alone)
        yield made, alone, other, scope
        nursery.cancel_scope.cancel()


async def set_paused(made: World, paused: bool) -> None:
    """What the daemon does."""
    daemon: Any = SimpleNamespace(
        _config=SimpleNamespace(state_dir=made.beta.state),
        _policy=made.beta.policy,
        _tasks=made.beta.service,
        _link=SimpleNamespace(kick=lambda: None),
    )
    await Daemon.set_paused(daemon, paused)


async def test_letting_a_machine_go_on_lets_no_task_go_on_that_was_paused_alone(tmp_path: Path) -> None:
    async with two_tasks(tmp_path) as (made, alone, other, _):
        service = made.beta.service
        await set_paused(made, True)
        await service.suspend(suspended=False)
        assert not service.statistics().running
        await set_paused(made, False)
        assert (await made.wait(other)).state == "SUCCEEDED"
        assert service._tasks[alone].held
        assert not service._tasks[alone].running
        await service.resume_task(alone)
        assert (await made.wait(alone)).state == "SUCCEEDED"


@pytest.mark.parametrize("before", [False, True], ids=["now", "marked by a version of before"])
async def test_what_was_paused_alone_stays_so_over_a_restart(tmp_path: Path, *, before: bool) -> None:
    """Versions of before marked every task when the machine was paused: those go on with it."""
    async with two_tasks(tmp_path) as (made, alone, other, scope):
        await set_paused(made, True)
        scope.cancel()
        await trio.sleep(0.2)
        if before:
            with closing(sqlite3.connect(made.beta.state / "tasks" / "tasks.sqlite")) as database, database:
                database.execute("UPDATE tasks SET held = 1")
        await made.start(made.beta)
        await set_paused(made, False)
        assert (await made.wait(other)).state == "SUCCEEDED"
        if before:
            assert (await made.wait(alone)).state == "SUCCEEDED"
        else:
            assert not made.beta.service._tasks[alone].running


async def test_tasks_that_come_while_the_machine_is_paused_wait_for_it(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        (made.alpha.root / "new").write_bytes(b"new")
        await set_paused(made, True)
        task = await made.submit([TaskItem(source_path="/new", destination_path="/new")])
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not made.beta.service._tasks[task].running
        await set_paused(made, False)
        assert (await made.wait(task)).state == "SUCCEEDED"


async def test_a_task_says_who_has_paused_it(tmp_path: Path) -> None:
    async with two_tasks(tmp_path) as (made, alone, other, _):
        service = made.beta.service

        def said(task: str) -> tuple[str, str, str]:
            observed = service.get_task(task)
            return observed.state, observed.status_code, observed.who

        assert said(alone) == ("QUEUED", "PAUSED_BY_OWNER", "destination owner")
        assert "this task" in service.get_task(alone).status_sentence
        assert said(other) == ("QUEUED", "HELD_BACK", "")
        await set_paused(made, True)
        assert said(other) == ("QUEUED", "PAUSED_BY_OWNER", "destination owner")
        assert "this machine" in service.get_task(other).status_sentence
        await service.suspend(suspended=False)
        await set_paused(made, False)
        assert (await made.wait(other)).state == "SUCCEEDED"
        assert said(alone)[1] == "PAUSED_BY_OWNER"


@pytest.mark.parametrize("state", ["QUEUED", "ACTIVE", "WAITING", "PAUSED"])
def test_whatever_held_a_task_up_is_not_said_any_more_when_nothing_does(state: Any) -> None:
    observed = TaskObserved(task_id="t", revision=1, state=state)
    refused = AccessDenied("The owner offers it for reading only.", code="READ_ONLY")
    held_up = told(observed, refused)
    assert (held_up.state, held_up.status_code) == ("QUEUED" if state == "QUEUED" else "PAUSED", "READ_ONLY")
    assert held_up.who == "destination owner"
    goes_on = told(held_up, None)
    assert (goes_on.state, goes_on.status_code, goes_on.status_sentence, goes_on.who) == ("QUEUED", "QUEUED", "", "")
    assert told(goes_on, None) is goes_on
    running = TaskObserved(task_id="t", revision=1, state="WAITING", status_code="NO_SPACE", who="destination owner")
    assert told(running, None) is running
