"""Which agents data came from lately, as the tasks of their destination tell it."""

from __future__ import annotations

import msgspec

from agent.connect.transport import Path
from agent.transfer.tasks.known_sources import sources_of
from protocol.control import Party
from tests.agent.orders import order_of


class Task:
    """What `sources_of` asks of a task."""

    answer = None

    def __init__(self, number: int, node: str | None, *, running: bool = False, path: Path | None = None) -> None:
        self.running, self.path = running, path
        source = None if node is None else Party(endpoint_id="e", node_id=node, collection_id="c", certificate="")
        self.order = msgspec.structs.replace(order_of("/x"), task_id=f"t{number}", source=source)


def known(*tasks: Task) -> tuple[list[str], list[str]]:
    paths, peers = sources_of(tasks, "own")  # type: ignore[arg-type] # a task by its looks
    return [path.task_id for path in paths], [peer.task_id for peer in peers]


def test_each_agent_is_named_once_by_its_latest_task() -> None:
    tasks = [Task(1, "a"), Task(2, "b"), Task(3, "a"), Task(4, None), Task(5, "own")]
    assert known(*tasks) == ([], ["t3", "t2"])


def test_a_path_in_use_needs_no_probe() -> None:
    path = Path(kind="punched", remote="192.0.2.1:7", rtt=0.0123, why="why")
    assert known(Task(1, "a", running=True, path=path), Task(2, "a")) == (["t1"], [])
    # One that is still looking for a path is nobody to ask, nor to disturb.
    assert known(Task(1, "a", running=True), Task(2, "b")) == ([], ["t2"])


def test_the_tunnel_is_no_direct_way() -> None:
    for kind, shown in (("tunnel", ""), ("punched", "punched")):
        ((path,), _) = sources_of([Task(1, "a", running=True, path=Path(kind=kind, rtt=0.0123))], "own")  # type: ignore[list-item]
        assert (path.kind, path.rtt_ms) == (shown, 12.3)
