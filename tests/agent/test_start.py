"""How an agent starts: what moves data first, with a worker that is forked from the daemon."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from pathlib import Path

import msgspec
import pytest
import trio

from agent.transfer.processes.spawn import FORKS
from agent.transfer.tasks import service as services
from protocol.control import SessionOrder, TaskItem
from tests.agent import engine_world

# In a process of its own: this one has threads.
FORK = """
import contextlib, sys, time
from pathlib import Path
from agent.lock import acquire
from agent.transfer.worker import fork_worker

state = Path(sys.argv[1])
lock = acquire(state)
forked = fork_worker(1, lock.forget)
assert forked.process.poll() is None
place = Path("/proc") / str(forked.process.pid)
until = time.monotonic() + 10
while "agent.transfer.worker" not in (words := (place / "cmdline").read_text().rstrip("\\0").split("\\0")):
    assert time.monotonic() < until, words
    time.sleep(0.01)
assert words[:3] == ["python", "-m", "agent.transfer.worker"], words
def held():
    for link in (place / "fd").iterdir():
        # It still opens and closes files of its own.
        with contextlib.suppress(FileNotFoundError):
            yield str(link.readlink())
# It has let go of the lock, and this process, which has not, holds it.
assert not [path for path in held() if "agent.lock" in path]
lock.release()
# That nothing more will come ends it, like any spare worker.
forked.sock.close()
assert forked.process.wait() == 0
assert forked.process.poll() == 0
forked.process.kill()
"""


@pytest.mark.skipif(not FORKS, reason="workers are not forked on this system")
def test_a_worker_forked_from_the_daemon_is_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


async def _seconds_of_first_moves(service: services.TransferService) -> float:
    began = time.monotonic()
    with trio.fail_after(20):
        await service.first_moves()
    return time.monotonic() - began


async def test_a_start_waits_a_moment_for_data_to_move_where_there_is_something_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "FIRST_MOMENTS", 10.0)
    async with engine_world.world(tmp_path) as world:
        alpha = world.alpha.service
        assert alpha is not None
        # Nothing is ordered here.
        assert await _seconds_of_first_moves(alpha) < 5
        session, task = str(uuid.uuid4()), str(uuid.uuid4())
        ticket = world.ticket(task, session, world.alpha.grant("r", ["/"]), world.beta.grant("rw", ["/"]))
        await alpha.put_session(
            SessionOrder(session_id=session, task_id=task, ticket=ticket, peer=world.beta.party),
        )
        # Whoever reads from here may come, but does not.
        monkeypatch.setattr(services, "FIRST_SESSION", 0.2)
        assert await _seconds_of_first_moves(alpha) >= 0.2
        # It does.
        monkeypatch.setattr(services, "FIRST_SESSION", 10.0)
        alpha._node.lane_begun.set()
        assert await _seconds_of_first_moves(alpha) < 5


async def test_a_lane_that_begins_ends_the_wait_at_both_sides(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        (world.alpha.root / "file").write_bytes(b"content")
        task = await world.submit([TaskItem(source_path="/file", destination_path="/file")])
        assert (await world.wait(task)).state == "SUCCEEDED"
        for node in (world.alpha, world.beta):
            assert node.service is not None
            assert node.service._node.lane_begun.is_set()


async def test_a_task_that_needs_the_relay_to_go_on_does_not_hold_up_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "FIRST_MOMENTS", 0.2)
    async with engine_world.world(tmp_path) as world:
        beta = world.beta.service
        assert beta is not None
        # Nobody serves it, so that it goes on waiting.
        task = await world.submit([TaskItem(source_path="/file", destination_path="/file")])
        world.sessions.clear()
        running = beta._tasks[task]
        assert running.went_directly
        assert await _seconds_of_first_moves(beta) >= 0.2
        monkeypatch.setattr(services, "FIRST_MOMENTS", 10.0)
        running.observed = msgspec.structs.replace(running.observed, path="punched tcp 192.0.2.1 port 4000")
        assert await _seconds_of_first_moves(beta) < 5
