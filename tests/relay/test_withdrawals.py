"""Taking permissions away where there are many rules and many tasks: it costs others no more than their turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from sqlalchemy import Connection, event
from trio.testing import MockClock

from protocol.control import CollectionReport
from relay.transfer import task_turns
from tests.relay.steward_scene import MOMENT, Scene
from tests.relay.test_transfer_access import bobs_task
from tests.relay.transfer_world import delete_document


async def test_a_withdrawal_reads_the_rules_once_however_many_tasks_there_are(clock: MockClock, scene: Scene) -> None:
    """There may be a thousand rules and ten thousand tasks, and nobody else writes meanwhile."""
    scene.source.collections = [
        CollectionReport(id=one.id, name=one.name, shareable=True) for one in scene.source.collections
    ]
    bob, _, task_id = await bobs_task(scene)
    for _ in range(5):
        await scene.alice.post("/delete", delete_document(scene.a), status=202)
    looks: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if "FROM access_rules" in statement:
            looks.append(statement)

    engine = scene.relay.store.writing_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        await scene.relay.store.write(
            lambda connection: task_turns.end_where_access_is_gone(connection, scene.a, "Gone.", 1e9)
        )
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert len(looks) <= 2, looks
    assert (await bob.get(f"/task/{task_id}"))["status"] == "ACTIVE"


async def test_a_withdrawal_from_many_tasks_leaves_the_database_to_others(clock: MockClock, scene: Scene) -> None:
    there = most = 0
    read = scene.relay.store.read

    async def counting(work: Callable[[Connection], Any]) -> Any:
        nonlocal there, most
        there += 1
        most = max(most, there)
        try:
            return await read(work)
        finally:
            there -= 1

    scene.relay.store.read = counting  # type: ignore[method-assign]
    for n in range(200):
        scene.relay.steward.cut(f"task {n}")
    await trio.sleep(MOMENT)
    assert 1 < most < 30
