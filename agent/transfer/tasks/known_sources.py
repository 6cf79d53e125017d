"""The agents that data came from lately, as the tasks at their destination here know them."""

from __future__ import annotations

from collections.abc import Collection

from agent.connect.peers import Peer, PeerPath
from agent.connect.transport import Path
from agent.transfer.tasks.running_task import RunningTask
from protocol.control import Party


def sources_of(tasks: Collection[RunningTask], own_node: str) -> tuple[list[PeerPath], list[Peer]]:
    """The paths that running tasks have to their sources, and the sources that no running task has one to: each agent
    once, as its latest task tells. ``own_node`` itself is left out."""
    known: dict[str, PeerPath] = {}
    others: dict[str, Peer] = {}
    for task in reversed(list(tasks)):
        source = task.order.source
        if source is None or source.node_id == own_node:
            continue
        if not task.running:
            others.setdefault(source.node_id, _peer(task, source))
        elif (path := task.path) is not None:
            known.setdefault(source.node_id, _peer_path(task, source, path))
    return list(known.values()), [peer for node_id, peer in others.items() if node_id not in known]


def _peer(task: RunningTask, source: Party) -> Peer:
    return Peer(
        node_id=source.node_id,
        task_id=task.order.task_id,
        session_id=task.order.session_id,
        collection_id=source.collection_id,
        name=source.display_name,
        answer=task.answer,
    )


def _peer_path(task: RunningTask, source: Party, path: Path) -> PeerPath:
    return PeerPath(
        collection_id=source.collection_id,
        name=source.display_name,
        task_id=task.order.task_id,
        # Empty where the way is not a direct one.
        kind="" if path.kind == "tunnel" else path.kind,
        remote=path.remote,
        rtt_ms=None if path.rtt is None else round(path.rtt * 1000, 1),
        why=path.why,
    )
