"""Tasks of people whose account was closed: they pause, with the reason, and go on when the account is open again.

The relay's own wish for a pause (``desired``) means this and nothing else.
"""

from __future__ import annotations

from sqlalchemy import Connection, select

from relay.store import transfer_tables as tables
from relay.store.auth_tables import identities
from relay.transfer import event_log, task_rows
from relay.transfer.event_log import TaskEvent
from relay.transfer.task_rows import Task

CODE = "ACCOUNT_CLOSED"
WHO = "relay operator"


def sentence_of(task: Task) -> str:
    """Why the task is paused, for people."""
    return f"The account of {task.owner} is closed; the task goes on when the relay's operator opens it again."


def is_closed(connection: Connection, owner_id: str) -> bool:
    """Whether the account of a task's owner is closed."""
    status = connection.execute(select(identities.c.status).where(identities.c.id == owner_id)).scalar_one_or_none()
    return status == "closed"


def changed(connection: Connection) -> bool:
    """Whether `follow` has anything to do."""
    return bool(_to_pause(connection, limit=1) or _to_resume(connection, limit=1))


def follow(connection: Connection, now: float) -> list[str]:
    """Pause the running tasks of closed accounts and let those of open ones go on; returns the ids of both."""
    paused, resumed = _to_pause(connection), _to_resume(connection)
    for task_id in paused:
        pause(connection, task_id, now)
    for task_id in resumed:
        _resume(connection, task_id, now)
    return paused + resumed


def pause(connection: Connection, task_id: str, now: float) -> None:
    """Hold one task up, if it runs."""
    task = task_rows.load(connection, task_id)
    if task is None or task.finished or task.desired != "run":
        return
    task_rows.change(connection, task_id, desired="pause", revision=task.revision + 1)
    event_log.add(connection, task_id, TaskEvent(code=CODE, description=sentence_of(task), time=now, is_error=True))


def _resume(connection: Connection, task_id: str, now: float) -> None:
    task = task_rows.load(connection, task_id)
    assert task is not None
    task_rows.change(connection, task_id, desired="run", revision=task.revision + 1)
    sentence = f"The account of {task.owner} is open again; the task goes on."
    event_log.add(connection, task_id, TaskEvent(code="ACCOUNT_OPEN", description=sentence, time=now))


def _to_pause(connection: Connection, limit: int | None = None) -> list[str]:
    # Most relays have no closed accounts: then no task is looked at.
    if connection.execute(select(identities.c.id).where(identities.c.status == "closed").limit(1)).first() is None:
        return []
    return _tasks(connection, "run", closed=True, limit=limit)


def _to_resume(connection: Connection, limit: int | None = None) -> list[str]:
    return _tasks(connection, "pause", closed=False, limit=limit)


def _tasks(connection: Connection, desired: str, *, closed: bool, limit: int | None) -> list[str]:
    task, owner = tables.tasks.c, identities.c
    statement = (
        select(task.id)
        .join(identities, owner.id == task.owner_id)
        .where(task.status == "ACTIVE", task.desired == desired)
        .where(owner.status == "closed" if closed else owner.status != "closed")
        .limit(limit)
    )
    return list(connection.execute(statement).scalars())
