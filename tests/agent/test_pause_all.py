"""Pausing a whole machine, and tasks one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from agent.daemon import Daemon
from agent.data_side import PAUSED_FILE, recall_pause
from agent.policy import AccessDenied, Pause
from agent.transfer.tasks.observed_states import held_up_by
from protocol.control import Counters, Flow, SessionOrder, TaskItem, TaskObserved
from protocol.errors import NeedsPerson, RetryLater
from tests.agent.engine_world import World, world

pytestmark = pytest.mark.usefixtures("workers_forked")


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


async def set_pause(made: World, pause: Pause) -> None:
    """What the daemon does."""
    daemon: Any = SimpleNamespace(
        _config=SimpleNamespace(state_dir=made.beta.state),
        _policy=made.beta.policy,
        _tasks=made.beta.service,
        _link=SimpleNamespace(kick=lambda: None),
    )
    await Daemon.set_pause(daemon, pause)


async def test_letting_a_machine_go_on_lets_no_task_go_on_that_was_paused_alone(tmp_path: Path) -> None:
    async with two_tasks(tmp_path) as (made, alone, other, _):
        service = made.beta.service
        await set_pause(made, "all")
        await service.suspend(suspended=False)
        assert not service.statistics().running
        await set_pause(made, "none")
        assert (await made.wait(other)).state == "SUCCEEDED"
        assert service._tasks[alone].held
        assert not service._tasks[alone].running
        await service.resume_task(alone)
        assert (await made.wait(alone)).state == "SUCCEEDED"


@pytest.mark.parametrize("before", [False, True], ids=["now", "marked by a version of before"])
async def test_what_was_paused_alone_stays_so_over_a_restart(tmp_path: Path, *, before: bool) -> None:
    """Versions of before marked every task when the machine was paused: those go on with it."""
    async with two_tasks(tmp_path) as (made, alone, other, scope):
        await set_pause(made, "all")
        scope.cancel()
        await made.beta.ended.wait()
        if before:
            with closing(sqlite3.connect(made.beta.state / "tasks" / "tasks.sqlite")) as database, database:
                database.execute("UPDATE tasks SET held = 1")
        await made.start(made.beta)
        await set_pause(made, "none")
        assert (await made.wait(other)).state == "SUCCEEDED"
        if before:
            assert (await made.wait(alone)).state == "SUCCEEDED"
        else:
            assert not made.beta.service._tasks[alone].running


async def test_what_cannot_be_written_down_changes_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        (made.beta.state / PAUSED_FILE).mkdir()
        for before, wanted in (("none", "all"), ("none", "new"), ("all", "none")):
            made.beta.policy.pause = before
            with pytest.raises(RetryLater, match="could not be remembered"):
                await set_pause(made, wanted)
            assert made.beta.policy.pause == before


async def test_tasks_that_come_while_the_machine_is_paused_wait_for_it(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        (made.alpha.root / "new").write_bytes(b"new")
        await set_pause(made, "all")
        task = await made.submit([TaskItem(source_path="/new", destination_path="/new")])
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not made.beta.service._tasks[task].running
        await set_pause(made, "none")
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
        await set_pause(made, "all")
        assert said(other) == ("QUEUED", "PAUSED_BY_OWNER", "destination owner")
        assert "this machine" in service.get_task(other).status_sentence
        await service.suspend(suspended=False)
        await set_pause(made, "none")
        assert (await made.wait(other)).state == "SUCCEEDED"
        assert said(alone)[1] == "PAUSED_BY_OWNER"


@pytest.mark.parametrize("state", ["QUEUED", "ACTIVE", "WAITING", "PAUSED"])
def test_whatever_held_a_task_up_is_not_said_any_more_when_nothing_does(state: Any) -> None:
    observed = TaskObserved(task_id="t", revision=1, state=state, rate=1e6, flow=Flow(goodput=1e6))
    refused = AccessDenied("The owner offers it for reading only.", code="READ_ONLY")
    held_up = held_up_by(observed, refused)
    assert (held_up.state, held_up.status_code) == ("QUEUED" if state == "QUEUED" else "PAUSED", "READ_ONLY")
    assert held_up.who == "destination owner"
    assert (held_up.rate, held_up.flow) == (0.0, None)
    goes_on = held_up_by(held_up, None)
    assert (goes_on.state, goes_on.status_code, goes_on.status_sentence, goes_on.who) == ("QUEUED", "QUEUED", "", "")
    assert held_up_by(goes_on, None) is goes_on
    running = TaskObserved(task_id="t", revision=1, state="WAITING", status_code="NO_SPACE", who="destination owner")
    assert held_up_by(running, None) is running


async def test_a_draining_machine_finishes_what_has_begun_and_begins_nothing_new(tmp_path: Path) -> None:
    async with two_tasks(tmp_path) as (made, new, begun, _):
        service = made.beta.service
        assert service is not None
        observed = service.get_task(begun)
        service._tasks[begun].observed = msgspec.structs.replace(observed, counters=Counters(files=1))
        await set_pause(made, "new")
        await service.resume_task(new)
        waits = service.get_task(new)
        assert (waits.state, waits.status_code, waits.who) == ("QUEUED", "PAUSED_BY_OWNER", "destination owner")
        assert "nothing new begins until it is resumed" in waits.status_sentence
        await service.suspend(suspended=False)
        assert not service.idle
        assert (await made.wait(begun)).state == "SUCCEEDED"
        with trio.fail_after(10):
            while not service.idle:
                await trio.sleep(0.02)
        assert service.get_task(new).state == "QUEUED"
        await set_pause(made, "none")
        assert (await made.wait(new)).state == "SUCCEEDED"


async def test_a_draining_source_goes_on_with_sessions_it_knows_alone(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        assert made.alpha.service is not None
        (made.alpha.root / "known").write_bytes(b"known")
        known = await made.submit([TaskItem(source_path="/known", destination_path="/known")])
        await made.wait(known)
        made.alpha.policy.pause = "new"
        await made.alpha.service.put_session(made.sessions[known])
        order = made.order("new", "a new session", [TaskItem(source_path="/known", destination_path="/new")])
        session = SessionOrder(session_id=order.session_id, task_id="new", ticket=order.ticket, peer=made.beta.party)
        with pytest.raises(NeedsPerson, match="nothing new begin") as caught:
            await made.alpha.service.put_session(session)
        assert (caught.value.code, caught.value.who) == ("PAUSED_BY_OWNER", "source owner")
        made.alpha.policy.pause = "none"
        await made.alpha.service.put_session(session)


async def test_what_was_begun_goes_on_over_a_restart_of_a_draining_machine(tmp_path: Path) -> None:
    """Also where the machine has stopped it for a moment, so that it is queued again."""
    async with two_tasks(tmp_path) as (made, _alone, other, scope):
        service = made.beta.service
        assert service is not None
        await set_pause(made, "new")
        assert service._tasks[other].held_up() is not None
        row = service.get_task(other)
        service._tasks[other].observed = msgspec.structs.replace(row, counters=Counters(files=1))
        assert getattr(service._tasks[other].held_up(), "code", "") == "HELD_BACK"
        scope.cancel()
    assert recall_pause(made.beta.state) == "new"
    (made.beta.state / PAUSED_FILE).write_bytes(b"")
    assert recall_pause(made.beta.state) == "all"
    (made.beta.state / PAUSED_FILE).unlink()
    assert recall_pause(made.beta.state) == "none"
    # What cannot be read may have been a pause of everything.
    (made.beta.state / PAUSED_FILE).mkdir()
    assert recall_pause(made.beta.state) == "all"
