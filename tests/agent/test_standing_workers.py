"""Workers that stand still as a whole, as their daemon looks after them."""

from __future__ import annotations

import signal
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.transfer.processes.channel import Channel, Finished, Progress, RunTask, ToDaemon, ToWorker
from agent.transfer.processes.message_buffer import AreYouThere, Message
from agent.transfer.stalls import looks, worker_watch
from protocol import standstill
from protocol.control import Flow, SessionOrder, TaskItem, TaskObserved
from protocol.errors import TowpathError
from protocol.signs_of_life import Posture
from protocol.standstill import HANGS_FOR, LOOK_EVERY, STOPPED_FOR
from tests.agent import engine_world
from tests.agent.standing_scene import Played, until_seen

pytestmark = pytest.mark.usefixtures("workers_forked")


class _Worker(Played):
    """The daemon's end of the channel of a worker."""

    pid = 1

    def __init__(self, posture: Posture, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(posture)
        monkeypatch.setattr(worker_watch, "signs_of", lambda _pid: self.signs())

    async def send(self, message: object) -> None:
        assert isinstance(message, AreYouThere)
        self.asked += 1

    async def tell_daemon(self, error: TowpathError) -> None:
        self.tell(error)

    async def watched(self, seconds: float) -> float | None:
        began = trio.current_time()
        with trio.move_on_after(seconds):
            self.tell(await worker_watch.until_lost(self, self.tell_daemon))  # type: ignore[arg-type]
            return trio.current_time() - began
        return None


@pytest.mark.parametrize(
    ("posture", "least", "told"),
    [
        (Posture.STOPPED, STOPPED_FOR, ["PROCESS_STOPPED"]),
        (Posture.TRACED, None, ["PROCESS_STOPPED"]),
        (Posture.WAITS, 2 * HANGS_FOR, ["PROCESS_HANGS"]),
        (Posture.IN_STORAGE, None, ["PROCESS_HANGS"]),
        (Posture.RUNS, None, []),
    ],
)
async def test_a_worker_that_stands_still(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    posture: Posture,
    least: float | None,
    told: list[str],
) -> None:
    worker = _Worker(posture, monkeypatch)
    ended = await worker.watched(10_000)
    assert worker.told == told
    assert worker.asked == 1
    if least is None:
        assert ended is None
    else:
        assert ended is not None
        assert least < ended <= least + 2 * LOOK_EVERY


async def test_a_worker_that_answers_is_left_alone(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = _Worker(Posture.STOPPED, monkeypatch)
    worker.says = True
    assert await worker.watched(10_000) is None
    assert worker.told == []


class _Workers:
    """The first worker is a process that was stopped, the next ones are through at once."""

    def __init__(self, pid: int) -> None:
        self._pid, self.started = pid, 0

    @asynccontextmanager
    async def worker(self, start: Message) -> AsyncIterator[Channel]:
        ours, theirs = socket.socketpair()
        channel, far = Channel(ours, ToDaemon), Channel(theirs, ToWorker)
        self.started += 1
        if self.started == 1:
            channel.pid = self._pid
            if isinstance(start, RunTask):
                moves = TaskObserved(
                    task_id=start.order.task_id, revision=1, state="ACTIVE", rate=5.0, flow=Flow(goodput=5.0)
                )
                await far.send(Progress(observed=moves))
        elif isinstance(start, RunTask):
            done = TaskObserved(task_id=start.order.task_id, revision=1, state="SUCCEEDED", status_code="SUCCEEDED")
            await far.send(Finished(observed=done))
        try:
            yield channel
        finally:
            channel.close()
            far.close()


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The id of a process that was stopped, which is noticed at once."""
    for where in (standstill, looks):
        monkeypatch.setattr(where, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(standstill, "STOPPED_FOR", 0.05)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        until_seen(process.pid, Posture.STOPPED)
        yield process.pid
        process.kill()


async def test_a_task_whose_worker_was_stopped_says_so_and_goes_on(tmp_path: Path, stopped: int) -> None:
    async with trio.open_nursery() as nursery:
        world = engine_world.World(tmp_path, nursery)
        await world.start(world.beta)
        assert world.beta.service is not None
        workers = _Workers(stopped)
        world.beta.service._node.workers = workers  # type: ignore[assignment]
        order = world.order(str(uuid.uuid4()), str(uuid.uuid4()), [TaskItem(source_path="/a", destination_path="/a")])
        await world.beta.service.put_task(order)
        assert (await world.wait(order.task_id, seconds=20)).state == "SUCCEEDED"
        assert workers.started == 2
        with trio.fail_after(10):
            while "SUCCEEDED" not in {line.observed.state for line in world.events if line.observed is not None}:
                await trio.sleep(0.01)
        told = [line for line in world.events if line.kind == "event"]
        assert [line.code for line in told] == ["PROCESS_STOPPED"]
        waiting = [line.observed for line in world.events if line.observed is not None and line.kind == "state"]
        assert ("WAITING", "PROCESS_STOPPED") in {(each.state, each.status_code) for each in waiting}
        # Nothing is left of what was measured before.
        assert not [each for each in waiting if each.state == "WAITING" and (each.rate or each.flow is not None)]
        nursery.cancel_scope.cancel()


async def test_a_source_whose_worker_was_stopped_serves_by_another(tmp_path: Path, stopped: int) -> None:
    async with trio.open_nursery() as nursery:
        world = engine_world.World(tmp_path, nursery)
        await world.start(world.alpha)
        assert world.alpha.service is not None
        sessions, workers = world.alpha.service.sessions, _Workers(stopped)
        world.alpha.service._node.workers = workers  # type: ignore[assignment]
        order = world.order(str(uuid.uuid4()), str(uuid.uuid4()), [TaskItem(source_path="/a", destination_path="/a")])
        served = SessionOrder(
            session_id=order.session_id, task_id=order.task_id, ticket=order.ticket, peer=world.beta.party
        )
        for count in (1, 2):
            assert sessions._worker_of(served, world.alpha.collection) is not None
            with trio.fail_after(10):
                while workers.started < count:
                    await trio.sleep(0.01)
            if count == 1:
                with trio.fail_after(10):
                    while sessions.count:
                        await trio.sleep(0.01)
        # Nothing is known against the second one.
        await trio.sleep(0.2)
        assert sessions.count == 1
        nursery.cancel_scope.cancel()
