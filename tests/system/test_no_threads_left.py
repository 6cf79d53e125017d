"""No more threads and processes are to be had for both agents of a running transfer, and for their relay, for a while:
real processes, in a control group that is full."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio

from tests.agent.engine_inside import contents
from tests.system.stopped_world import MIB, stopped_world

SHORTAGE = 12.0
# Version 1 has a tree for each controller, version 2 one for all.
PLACES = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that counts processes and threads."""
    for place in PLACES:
        made = place / f"towpath-test-{uuid.uuid4()}"
        try:
            made.mkdir()
        except OSError:
            continue
        if (made / "pids.max").exists():
            break
        made.rmdir()
    else:
        pytest.skip("needs root and a control group that limits processes")
    yield made
    (made / "pids.max").write_text("max")
    for pid in (made / "cgroup.procs").read_text().split():
        (made.parent / "cgroup.procs").write_text(pid)
    made.rmdir()


def threads_of(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids if os.path.isdir(f"/proc/{pid}/task"))


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [True, False])
async def test_a_transfer_goes_on_after_a_shortage_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: Path, killed: bool
) -> None:
    """Idle threads of trio end after ten seconds, so that by and by there is none left. With ``killed`` the workers are
    killed meanwhile, so that both agents also need processes."""
    # With a lane process the destination may need no new thread meanwhile.
    async with stopped_world(tmp_path, monkeypatch, lane_processes=0) as world:
        task_id, expected = await world.begin_slowly(24 * MIB)
        pids = {name: world.child(name).pid for name in ("alpha", "beta", "relay")}
        everybody = [pid for own in pids.values() for pid in (own, *_below(own))]
        for pid in everybody:
            (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text("1")
        before = threads_of(everybody)
        if killed:
            for name in ("alpha", "beta"):
                await world.kill(f"{name}'s workers")
        # Its workers wait already, and need threads.
        second = await world.submit("tree", "second")
        await trio.sleep(SHORTAGE)
        refused = (group / "pids.events").read_text().split()[-1]
        assert {name: world.child(name).pid for name in pids} == pids
        assert all(psutil.pid_exists(pid) for pid in pids.values())
        (group / "pids.max").write_text("max")
        codes = await world.end_well(task_id, expected)
        assert (await world.until_ended(second))["status"] == "SUCCEEDED"
        assert contents(world.destination / "second") == expected
        print(f"{before} threads when there were no more; {refused} refused; {codes}")
        assert {name: world.child(name).pid for name in pids} == pids
        assert int(refused) > 0


def _below(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
