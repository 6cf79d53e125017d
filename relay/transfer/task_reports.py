"""What agents report of tasks, applied so that it holds for ever and a repetition changes nothing.

A node may speak only of tasks that it drives: everything else it says is dropped and counted. All text is cut to size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import Connection, select, update

from protocol.candidates import PathOffer
from protocol.control import FINAL_STATES, AgentEvent, Counters, Flow, TaskObserved
from relay import times
from relay.store import transfer_tables as tables
from relay.transfer import event_log, task_rows, task_turns
from relay.transfer.event_log import TaskEvent
from relay.transfer.nodes import record_reports
from relay.transfer.task_rows import Task

_LARGEST = 2**62
MAX_LANES = 64
_UNSHARED = "The owner's configuration does not share a collection of this task any more."


@dataclass
class Applied:
    """What a batch of lines has changed. ``wants_session`` maps tasks to the generation their agent has;
    ``offers`` are for sessions of running tasks that this node drives. ``unshared`` are tasks that ended because a
    collection is shared no longer, ``missing`` the collections that the node has named and that are not its."""

    last_event: int = 0
    finished: set[str] = field(default_factory=set)
    unshared: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wants_session: dict[str, int] = field(default_factory=dict)
    offers: list[PathOffer] = field(default_factory=list)
    dropped: int = 0


def apply_lines(connection: Connection, node_id: str, lines: Iterable[AgentEvent], now: float) -> Applied:
    """Apply lines of one node's event stream in order, and move the node's position past the durable ones."""
    applied = Applied()
    batch = list(lines)
    tasks = _driven_by(connection, node_id, {line.task_id for line in batch if line.task_id})
    for line in batch:
        applied.last_event = max(applied.last_event, line.n)
        if line.kind == "collections":
            if line.collections is not None:
                recorded = record_reports(connection, {node_id: line.collections})
                applied.missing = recorded.missing.get(node_id, [])
                for collection_id in recorded.unshared:
                    applied.unshared += task_turns.end_where_access_is_gone(connection, collection_id, _UNSHARED, now)
            continue
        task = tasks.get(line.task_id)
        if task is None:
            applied.dropped += 1
        elif line.kind == "session_wanted":
            if not task.finished:
                applied.wants_session[task.id] = line.generation
        elif line.kind == "path_offer":
            wanted = line.offer is not None and (line.offer.probe or not task.finished)
            if wanted and line.offer is not None and line.offer.session_id == task.session_id:
                applied.offers.append(msgspec.structs.replace(line.offer, task_id=task.id))
        elif line.kind == "event":
            if task.finished and line.code in event_log.ENDINGS:
                # How the task ended has been told; its agent also stops what the relay has ended.
                continue
            event_log.add(connection, task.id, _event(connection, line, task, now))
        elif line.observed is not None and line.kind in ("state", "progress"):
            tasks[task.id] = _observe(connection, task, line, now)
            if tasks[task.id].finished and not task.finished:
                applied.finished.add(task.id)
    if applied.last_event:
        node = tables.nodes.c
        connection.execute(
            update(tables.nodes)
            .where(node.id == node_id, node.last_event < applied.last_event)
            .values(last_event=applied.last_event)
        )
    return applied


def apply_progress(connection: Connection, node_id: str, reports: Mapping[str, TaskObserved], now: float) -> None:
    """Store the newest progress of running tasks of one node."""
    for task_id, task in _driven_by(connection, node_id, reports).items():
        if not task.finished:
            store_observed(connection, task, reports[task_id], now)


def _driven_by(connection: Connection, node_id: str, ids: Iterable[str]) -> dict[str, Task]:
    """Those of the tasks whose orders went to this node."""
    tasks = task_rows.load_many(connection, ids)
    workers = {task.worker_id for task in tasks.values()}
    column = tables.collections.c
    mine = set(
        connection.execute(select(column.id).where(column.node_id == node_id, column.id.in_(sorted(workers)))).scalars()
    )
    return {task.id: task for task in tasks.values() if task.worker_id in mine}


def _event(connection: Connection, line: AgentEvent, task: Task, now: float) -> TaskEvent:
    return TaskEvent(
        code=line.code,
        description=line.description,
        details=line.details,
        is_error=line.is_error,
        time=_moment(connection, line.time, task, now),
        seq=line.seq or None,
    )


def _moment(connection: Connection, text: str | None, task: Task, now: float) -> float:
    """A time from an agent, held between what it told of before and now: its clock may be wrong, or it may lie. What
    it tells in order is shown in order, also when a clock was set back meanwhile."""
    told = now
    with contextlib.suppress(ValueError, TypeError):
        told = min(times.parse(text or ""), now)
    return max(told, event_log.last_told(connection, task.id) or task.requested)


def _observe(connection: Connection, task: Task, line: AgentEvent, now: float) -> Task:
    assert line.observed is not None
    observed = line.observed
    if line.kind == "state":
        # An older line that is repeated must not turn the task back.
        if line.seq <= task.last_seq:
            return task
        task_rows.change(connection, task.id, last_seq=line.seq)
    elif task.finished:
        return task
    store_observed(connection, task, observed, _moment(connection, line.time, task, now))
    current = task_rows.load(connection, task.id)
    assert current is not None
    if current.finished:
        return current
    if observed.state in FINAL_STATES and line.kind == "state":
        conclude(connection, current, observed, now)
    current = task_rows.load(connection, task.id)
    assert current is not None
    return current


def conclude(connection: Connection, task: Task, observed: TaskObserved, now: float) -> None:
    """End a task as its agent says it ended."""
    code = observed.state if observed.state != "FAILED" else observed.error_code[: event_log.MAX_CODE] or "UNKNOWN"
    when = _moment(connection, observed.completion_time, task, now)
    task_turns.finish(connection, task, code=code, sentence=_sentence(observed), when=when)


def _sentence(observed: TaskObserved) -> str:
    usual = {
        "SUCCEEDED": "The task has succeeded.",
        "CANCELED": "The task was cancelled.",
        "FAILED": "The task has failed.",
    }
    return observed.status_sentence or usual[observed.state]


def store_observed(connection: Connection, task: Task, observed: TaskObserved, when: float) -> None:
    """Keep the newest observation, made at ``when``. Counters never go back, whatever order reports arrive in. That the
    task has started is an event of it, whether a line tells so first or the answer to an order."""
    cut = msgspec.structs.replace(
        observed,
        counters=merged(task.counters, observed.counters),
        status_code=observed.status_code[: event_log.MAX_CODE],
        status_sentence=observed.status_sentence[: event_log.MAX_DESCRIPTION],
        who=observed.who[:64],
        current=observed.current[:4096],
        path=observed.path[:256],
        error_code=observed.error_code[: event_log.MAX_CODE],
        flow=None if observed.flow is None else _bounded(observed.flow),
    )
    # Also true of a task whose order left before this database was restored from a backup.
    values: dict[str, object] = {"observed": msgspec.json.encode(cut).decode(), "attempted": True}
    if not task.finished and observed.state not in FINAL_STATES:
        values["state"] = observed.state
        begins = observed.state == "ACTIVE" and task.state != "ACTIVE"
        if begins and not event_log.has_started(connection, task.id):
            started = TaskEvent(code="STARTED", description="The task has started.", time=when)
            event_log.add(connection, task.id, started)
    task_rows.change(connection, task.id, **values)


def _bounded(flow: Flow) -> Flow:
    """What an agent says of its lanes, cut to what is worth keeping."""
    return msgspec.structs.replace(
        flow, limited_by=flow.limited_by[:64], limit_of=flow.limit_of[:64], lanes=flow.lanes[:MAX_LANES]
    )


def merged(old: Counters, new: Counters) -> Counters:
    """The larger of each count; what is being retried and whether the scan is complete come from the newer report."""
    values = {
        name: min(max(getattr(old, name), getattr(new, name)), _LARGEST)
        for name in Counters.__struct_fields__
        if name not in ("retrying", "scan_complete")
    }
    return Counters(**values, retrying=max(0, min(new.retrying, _LARGEST)), scan_complete=new.scan_complete)
