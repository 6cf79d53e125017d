"""The owner's word while tasks run: a narrowed collection stops what runs on it, a widened one lets it go on."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from agent.config.keys import CollectionConfig
from agent.transfer.processes.channel import Channel, Checkpointed, Desire, Finished, RunTask, ToDaemon, ToWorker
from agent.transfer.processes.message_buffer import Message
from agent.transfer.processes.worker_process import Workers
from agent.transfer.tasks.running_task import RunningTask
from agent.transfer.tasks.service import TransferService
from protocol.control import TaskItem, TaskObserved, TaskOrder
from protocol.names import format_path
from tests.agent.engine_world import Node, World, world

pytestmark = pytest.mark.usefixtures("workers_forked")

SIZE = 192 * 1024 * 1024


def configured(node: Node, **changes: object) -> CollectionConfig:
    fields = {"id": node.collection, "name": node.name, "root": str(node.root)} | changes
    return CollectionConfig(**fields)  # type: ignore[arg-type]


async def owner_changes(node: Node, *collections: CollectionConfig) -> None:
    node.policy.replace(collections)
    await service_of(node).owner_changed({node.collection})


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


async def submit_large(made: World) -> str:
    (made.alpha.root / "large").write_bytes(os.urandom(1024) * (SIZE // 1024))
    task = await made.submit([TaskItem(source_path="/large", destination_path="/large")])
    await until(lambda: bool(temporaries(made.beta)))
    return task


def service_of(node: Node) -> TransferService:
    assert node.service is not None
    return node.service


def temporaries(node: Node) -> list[Path]:
    return list(node.root.glob(".towpath.*"))


async def test_a_destination_made_read_only_is_not_written_to_any_more(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        task = await submit_large(made)
        await owner_changes(made.beta, configured(made.beta, read_only=True))
        observed = await made.wait(task, states=frozenset({"PAUSED", "SUCCEEDED"}))
        assert made.beta.service is not None
        await until(
            lambda: made.beta.service is not None and made.beta.service.get_task(task).status_code == "READ_ONLY"
        )
        observed = made.beta.service.get_task(task)
        assert (observed.state, observed.who) == ("PAUSED", "destination owner")
        assert not (made.beta.root / "large").exists()
        # Nobody is left who could write.
        await until(lambda: not service_of(made.beta)._tasks[task].running)
        # The owner changes his mind; the task goes on by itself.
        await owner_changes(made.beta, configured(made.beta))
        assert (await made.wait(task)).state == "SUCCEEDED"
        assert (made.beta.root / "large").read_bytes() == (made.alpha.root / "large").read_bytes()


async def test_a_source_that_is_no_longer_offered_sends_nothing_more(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        task = await submit_large(made)
        sessions = service_of(made.alpha).sessions
        await owner_changes(made.alpha)
        assert not sessions._served
        # The destination comes again, and is turned away.
        await until(lambda: sessions.refused > 0)
        assert not sessions._served
        assert service_of(made.beta).get_task(task).state not in ("SUCCEEDED", "FAILED")
        await owner_changes(made.alpha, configured(made.alpha))
        assert (await made.wait(task)).state == "SUCCEEDED"


async def test_a_task_of_a_removed_collection_waits_and_can_be_cancelled(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        task = await submit_large(made)
        await owner_changes(made.beta)
        service = service_of(made.beta)
        await until(lambda: service.get_task(task).status_code == "UNKNOWN_COLLECTION")
        order = service._tasks[task].order
        await service.put_task(msgspec.structs.replace(order, revision=2, desired="cancel"))
        observed = await made.wait(task)
        assert (observed.state, observed.who) == ("CANCELED", "")


async def test_a_moved_root_is_written_to_where_it_is_now(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        task = await submit_large(made)
        moved = tmp_path / "moved"
        moved.mkdir()
        await owner_changes(made.beta, configured(made.beta, root=str(moved)))
        assert (await made.wait(task)).state == "SUCCEEDED"
        assert (moved / "large").stat().st_size == SIZE
        assert not (made.beta.root / "large").exists()


async def test_a_root_that_moves_while_the_worker_starts_is_written_to_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first worker is told is what was configured before."""
    moved, begun = tmp_path / "moved", list[RunTask]()
    moved.mkdir()
    worker = Workers.worker

    @asynccontextmanager
    async def changed_meanwhile(self: Workers, start: Message) -> AsyncIterator[Channel]:
        if isinstance(start, RunTask):
            begun.append(start)
            if len(begun) == 1:
                await owner_changes(made.beta, configured(made.beta, root=str(moved)))
        async with worker(self, start) as channel:
            yield channel

    monkeypatch.setattr(Workers, "worker", changed_meanwhile)
    async with world(tmp_path) as made:
        (made.alpha.root / "small").write_bytes(b"content")
        task = await made.submit([TaskItem(source_path="/small", destination_path="/small")])
        assert (await made.wait(task)).state == "SUCCEEDED"
        assert (moved / "small").read_bytes() == b"content"
        assert not (made.beta.root / "small").exists()
    assert [[row.root for row in start.common.collections] for start in begun] == [[str(made.beta.root)], [str(moved)]]


class _Obedient:
    """Workers that stop when they are told to, and are through when they get a new ticket."""

    def __init__(self) -> None:
        self.begun, self.told = list[str](), list[str]()

    @asynccontextmanager
    async def worker(self, start: Message) -> AsyncIterator[Channel]:
        assert isinstance(start, RunTask)
        ours, theirs = socket.socketpair()
        channel, far = Channel(ours, ToDaemon), Channel(theirs, ToWorker)
        self.begun.append(start.order.ticket)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, far, start.order)
                yield channel
                nursery.cancel_scope.cancel()
        finally:
            channel.close()
            far.close()

    async def _obey(self, far: Channel, order: TaskOrder) -> None:
        while True:
            message, _ = await far.receive()
            if not isinstance(message, Desire):
                continue
            observed = TaskObserved(task_id=order.task_id, revision=order.revision, state="PAUSED", status_code="")
            if message.desired == "pause":
                await far.send(Checkpointed(observed=observed))
                return
            self.told.append(message.ticket)
            await far.send(Finished(observed=msgspec.structs.replace(observed, state="SUCCEEDED")))


async def test_a_task_whose_links_may_lead_less_far_goes_on_with_another_worker(tmp_path: Path) -> None:
    """The root of a running one was opened for the ticket of before."""
    async with world(tmp_path) as made:
        service, workers = service_of(made.beta), _Obedient()
        service._node.workers = workers  # type: ignore[assignment]
        task = await made.submit([TaskItem(source_path="/large", destination_path="/large")])
        order = service._tasks[task].order
        source = made.alpha.grant("r", ["/"])
        tickets = [
            made.ticket(task, order.session_id, source, made.beta.grant("rw", ["/large"], reach))
            for reach in (["/"], ["/large"])
        ]
        await until(lambda: workers.begun == [order.ticket])
        for revision, ticket in enumerate(tickets, 2):
            await service.put_task(msgspec.structs.replace(order, revision=revision, ticket=ticket, items=None))
            await until(lambda: workers.begun[-1] == ticket)  # noqa: B023
        # One that reaches as far is taken up by the worker that there is.
        again = made.ticket(task, order.session_id, source, made.beta.grant("rw", ["/large"], ["/large"]))
        await service.put_task(msgspec.structs.replace(order, revision=9, ticket=again, items=None))
        assert (await made.wait(task)).state == "SUCCEEDED"
    assert workers.begun == [order.ticket, *tickets]
    assert workers.told == [again]


async def test_a_root_that_moves_right_after_a_task_was_chosen_has_its_place_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another task may write to the same place at once."""
    moved, begun, places = tmp_path / "moved", list[RunningTask](), list[str]()
    moved.mkdir()
    run, worker = RunningTask.run, Workers.worker

    async def moved_before(self: RunningTask) -> None:
        if not begun:
            begun.append(self)
            await owner_changes(made.beta, configured(made.beta, root=str(moved)))
        await run(self)

    @asynccontextmanager
    async def begins(self: Workers, start: Message) -> AsyncIterator[Channel]:
        if isinstance(start, RunTask):
            places.extend(format_path(path) for path in service_of(made.beta)._tasks[task].claim.paths)
        async with worker(self, start) as channel:
            yield channel

    monkeypatch.setattr(RunningTask, "run", moved_before)
    monkeypatch.setattr(Workers, "worker", begins)
    async with world(tmp_path) as made:
        (made.alpha.root / "small").write_bytes(b"content")
        task = await made.submit([TaskItem(source_path="/small", destination_path="/small")])
        assert (await made.wait(task)).state == "SUCCEEDED"
    assert places == [str(moved / "small")]


async def test_a_collection_narrowed_while_the_agent_was_down_is_respected(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = World(tmp_path, nursery)
        await made.start(made.alpha)
        scope = await made.start(made.beta)
        task = await submit_large(made)
        scope.cancel()
        stopped = service_of(made.beta)
        await until(lambda: not stopped._tasks[task].running)
        made.beta.read_only = True
        await made.start(made.beta)
        await until(
            lambda: made.beta.service is not None and made.beta.service.get_task(task).status_code == "READ_ONLY"
        )
        assert not service_of(made.beta)._tasks[task].running
        assert not (made.beta.root / "large").exists()
        nursery.cancel_scope.cancel()


async def test_a_change_of_another_collection_disturbs_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        task = await submit_large(made)
        await service_of(made.beta).owner_changed({str(uuid.uuid4())})
        assert (await made.wait(task)).state == "SUCCEEDED"
        assert not [event for event in made.events if event.is_error]
