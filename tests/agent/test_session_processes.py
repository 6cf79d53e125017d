"""How many lane processes help a task, where its owner says auto and where a number is said."""

from __future__ import annotations

import msgspec
import pytest

from agent.transfer.lane_processes.session_processes import MANY_ITEMS, lane_processes
from agent.transfer.processes.spawn import AUTO, FORKS, session_processes
from protocol.control import TaskItem, TaskOptions, TaskOrder
from tests.agent.orders import order_of

FILE = TaskItem(source_path="/a", destination_path="/b", recursive=False)
FOLDER = TaskItem(source_path="/a", destination_path="/b", recursive=True)
LOOKED_AT = TaskItem(source_path="/a", destination_path="/b")


def order(*items: TaskItem, options: TaskOptions | None = None) -> TaskOrder:
    return msgspec.structs.replace(order_of(options=options), items=list(items))


@pytest.mark.parametrize(
    ("items", "wanted"),
    [((FOLDER,), 1), ((LOOKED_AT,), 1), ((FILE, FOLDER), 1), ((FILE,), 0), ((FILE,) * MANY_ITEMS, 1)],
)
def test_one_helps_where_there_may_be_many_files(items: tuple[TaskItem, ...], wanted: int) -> None:
    assert lane_processes(AUTO, order(*items), processors=2) == wanted
    assert lane_processes(AUTO, order(*items), processors=64) == wanted
    assert lane_processes(AUTO, order(*items), processors=1) == 0


def test_a_number_is_taken_as_it_is() -> None:
    assert [lane_processes(count, order(FILE), processors=1) for count in (1, 2, 5)] == [0, 1, 4]


@pytest.mark.parametrize("options", [TaskOptions(preserve_xattrs=True), TaskOptions(preserve_acls=True)])
def test_none_helps_where_handles_are_not_enough(options: TaskOptions) -> None:
    assert lane_processes(AUTO, order(FOLDER, options=options), processors=2) == 0
    assert lane_processes(3, order(FOLDER, options=options), processors=2) == 0


def test_nothing_is_received_by_a_deletion() -> None:
    deletion = msgspec.structs.replace(order(FOLDER), type="DELETE")
    assert lane_processes(3, deletion, processors=2) == 0


@pytest.mark.skipif(not FORKS, reason="no process can fork another one safely here")
def test_the_configuration_says_a_number_or_auto() -> None:
    assert (session_processes(None), session_processes(3)) == (AUTO, 3)
