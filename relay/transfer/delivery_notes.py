"""What the database keeps of a task's way to its agents: each function is one transaction of `delivery`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from protocol.control import FINAL_STATES, AgentHello, TaskObserved
from protocol.errors import NeedsPerson, TowpathError
from relay.transfer import closed_owners, event_log, task_reports, task_rows, task_turns
from relay.transfer.entitlement import Entitlement, entitled, entitlement
from relay.transfer.event_log import TaskEvent
from relay.transfer.nodes import has_lines_to_come
from relay.transfer.parties import Side, Sides, load_sides
from relay.transfer.task_documents import CANCELED, OFFLINE
from relay.transfer.task_rows import Scope, Task


@dataclass(frozen=True)
class Loaded:
    """``entitlement``: what the owner of the task may do now of what it does."""

    task: Task
    sides: Sides
    scope: Scope
    entitlement: Entitlement
    owner_closed: bool


def load(connection: Connection, task_id: str, now: float) -> Loaded | None:
    """The task with all that a visit to it needs; None when there is none."""
    task = task_rows.load(connection, task_id)
    if task is None:
        return None
    scope = task_rows.load_scope(connection, task_id)
    return Loaded(
        task=task,
        sides=load_sides(connection, task),
        scope=scope,
        entitlement=entitlement(connection, task, scope, now),
        owner_closed=not task.finished and closed_owners.is_closed(connection, task.owner_id),
    )


def stopped(connection: Connection, task_id: str) -> tuple[Task, Side | None] | None:
    """A task that is over or paused, and its source; None for one that goes on."""
    task = task_rows.load(connection, task_id)
    if task is None or (not task.finished and task.desired != "pause"):
        return None
    return task, load_sides(connection, task).source


def end_unentitled(connection: Connection, task_id: str, now: float) -> None:
    """End a task whose owner may not do any more what it does."""
    task = task_rows.load(connection, task_id)
    if task is not None and not entitled(connection, task, now):
        sentence = "The owner of this task is no longer allowed what it does."
        task_turns.end_now(connection, task, code=CANCELED, sentence=sentence, now=now)


def mark_attempted(connection: Connection, task: Task, *, session: bool = False) -> bool:
    """From now on the agent may have the task, and with ``session`` the source its ticket, which will be withdrawn when
    the task is over. False when it was changed since it was looked at."""
    current = task_rows.load(connection, task.id)
    if current is None or current.revision != task.revision or current.status != task.status:
        return False
    if not current.attempted or (session and not current.session_open):
        task_rows.change(connection, task.id, attempted=True, session_open=session or current.session_open)
    return True


def delivered(
    connection: Connection, task: Task, observed: TaskObserved, hello: AgentHello | None, held: str | None, now: float
) -> None:
    """The agent, which came with this ``hello``, has the newest order; ``held`` is the side that is waited for."""
    current = task_rows.load(connection, task.id)
    assert current is not None
    values: dict[str, Any] = {"delivered": max(current.delivered, task.revision), "ticket_issued": now}
    if observed.revision > current.revision:
        # This database was restored from a backup: overtake what the agent has already seen, and say it again.
        values["revision"] = observed.revision + 1
    if not current.finished:
        values["held_by"] = held
    task_rows.change(connection, task.id, **values)
    if not current.finished:
        _take(connection, current, observed, hello, now)
    if held is not None and current.held_by != held:
        event_log.add(connection, task.id, _offline_event(held, now))


def give_again(connection: Connection, task_id: str) -> None:
    """The agent lost the task: its numbers begin anew, so what was stored under the old ones no longer counts."""
    task_rows.change(connection, task_id, delivered=0, last_seq=0)
    event_log.forget_numbers(connection, task_id)


def compared(
    connection: Connection, task_id: str, observed: TaskObserved, hello: AgentHello | None, now: float
) -> None:
    """The agent, which came with this ``hello``, was asked how the task stands."""
    task = task_rows.load(connection, task_id)
    if task is not None and not task.finished:
        _take(connection, task, observed, hello, now)


def _take(connection: Connection, task: Task, observed: TaskObserved, hello: AgentHello | None, now: float) -> None:
    """What an agent answers of a running task. An end or a beginning that is also in lines which were not read yet is
    left to them: they tell when it was, and first what came before."""
    ends = observed.state in FINAL_STATES
    if (ends or task.state == "QUEUED") and hello is not None and has_lines_to_come(connection, hello):
        return
    task_reports.store_observed(connection, task, observed, now)
    current = task_rows.load(connection, task.id)
    if ends and current is not None:
        task_reports.conclude(connection, current, observed, now)


def _offline_event(side: str, now: float) -> TaskEvent:
    sentence = f"The agent of the {side} endpoint is not connected; the task goes on when it is back."
    return TaskEvent(code=OFFLINE, description=sentence, time=now, is_error=True)


def hold(connection: Connection, task_id: str, side: str, now: float) -> None:
    """The task waits for the agent of a side."""
    task_rows.change(connection, task_id, held_by=side)
    event_log.add(connection, task_id, _offline_event(side, now))


def fail(connection: Connection, task_id: str, error: TowpathError, now: float) -> None:
    """An agent refused for good: the task ends."""
    task = task_rows.load(connection, task_id)
    if task is not None:
        task_turns.end_now(connection, task, code=error.code, sentence=error.sentence, now=now)


def nothing_to_stop(connection: Connection, task_id: str, now: float) -> None:
    """The agent of a cancelled task knows nothing of it."""
    task = task_rows.load(connection, task_id)
    if task is None:
        return
    task_rows.change(connection, task_id, delivered=task.revision)
    task_turns.finish(connection, task, code=CANCELED, sentence="The task was cancelled.", when=now)


def note_trouble(connection: Connection, task_id: str, error: TowpathError, now: float) -> None:
    """Show people what holds the task up; the same trouble is noted once."""
    task = task_rows.load(connection, task_id)
    if task is None or task.finished:
        return
    last = task.last_observed
    if last is not None and last.status_code == error.code:
        return
    observed = TaskObserved(
        task_id=task_id,
        revision=task.delivered,
        state="WAITING",
        status_code=error.code,
        status_sentence=error.sentence,
        who=error.who,
        needs_person=isinstance(error, NeedsPerson),
    )
    task_reports.store_observed(connection, task, observed, now)
    event = TaskEvent(code=error.code, description=error.sentence, time=now, is_error=True)
    event_log.add(connection, task_id, event)
