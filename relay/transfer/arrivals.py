"""What an agent's coming means for the database: its hello is stored, and the tasks that concern it are found.

Written for many agents at a time: after a restart of the relay all of them come within seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, or_, select

from protocol.control import AgentHello
from relay.store import transfer_tables as tables
from relay.transfer import nodes, task_rows


@dataclass
class Arrival:
    """What to do for an agent that is there.

    ``rebooted``: it is another process than the one before. ``last_event`` is the number of the last of its events that
    is stored. ``stopping`` are ids of tasks that it must be told to stop before anything else; ``others`` are tasks to
    be looked at, with whether it is their source. ``missing`` are collections that it has named and that are not its.
    """

    rebooted: bool = False
    last_event: int = 0
    stopping: list[str] = field(default_factory=list)
    others: list[tuple[str, bool]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def record(
    connection: Connection, hellos: Sequence[AgentHello], now: float, forgettable: float
) -> list[Arrival | None]:
    """Store what these agents say as they come; None for one whose node is gone. See `tasks_of` for the rest."""
    greeted, recorded = nodes.record_hellos(connection, hellos, now)
    found = look_up(connection, list(greeted), forgettable)
    for node_id, rebooted in greeted.items():
        found[node_id].rebooted = rebooted
        found[node_id].missing = recorded.missing.get(node_id, [])
    return [found.get(hello.node_id) for hello in hellos]


def look_up(connection: Connection, node_ids: Sequence[str], forgettable: float) -> dict[str, Arrival]:
    """The same for agents that are there already, by node; nodes that are gone are left out."""
    node = tables.nodes.c
    rows = connection.execute(select(node.id, node.last_event).where(node.id.in_(node_ids)))
    found = {row.id: Arrival(last_event=row.last_event) for row in rows}
    _add_tasks(connection, found, forgettable)
    return found


def _add_tasks(connection: Connection, arrivals: Mapping[str, Arrival], forgettable: float) -> None:
    """Tasks that ended before ``forgettable`` are among the others: the agent may drop what it keeps of them."""
    collection = tables.collections.c
    owners: dict[str, str] = {}
    for row in connection.execute(select(collection.id, collection.node_id).where(collection.node_id.in_(arrivals))):
        owners[row.id] = row.node_id
    if not owners:
        return
    column = tables.tasks.c
    mine = sorted(owners)
    statement = (
        select(*task_rows.COLUMNS)
        .where(column.closed.is_(False), or_(column.source_id.in_(mine), column.destination_id.in_(mine)))
        .order_by(column.requested)
    )
    for row in connection.execute(statement):
        task = task_rows.Task(**row._mapping)
        for node_id, collections in _concerned(task, owners).items():
            _add_task(arrivals[node_id], task, collections, forgettable)


def _concerned(task: task_rows.Task, owners: Mapping[str, str]) -> dict[str, set[str]]:
    concerned: dict[str, set[str]] = defaultdict(set)
    for collection_id in (task.source_id, task.destination_id):
        if collection_id is not None and collection_id in owners:
            concerned[owners[collection_id]].add(collection_id)
    return concerned


def _add_task(arrival: Arrival, task: task_rows.Task, mine: Iterable[str], forgettable: float) -> None:
    if task.worker_id in mine and task.desired == "cancel" and task.attempted and task.delivered < task.revision:
        arrival.stopping.append(task.id)
    elif not task.finished or task.session_open or (task.completed or 0.0) <= forgettable:
        is_source = task.destination_id is not None and task.source_id in mine
        arrival.others.append((task.id, is_source and not task.finished))
