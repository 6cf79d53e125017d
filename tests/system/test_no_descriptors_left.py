"""Both agents of a running transfer have no descriptors left for a while: real processes, limits set from outside."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import trio

from tests.system.stopped_world import MIB, stopped_world

SHORTAGE = 12.0


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nobody change the limits of a running process")
async def test_a_transfer_goes_on_after_a_shortage_of_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers are killed meanwhile, so that both agents need what they do not have: connections and processes."""
    async with stopped_world(tmp_path, monkeypatch) as world:
        task_id, expected = await world.begin_slowly(24 * MIB)
        pids = {name: world.child(name).pid for name in ("alpha", "beta")}
        limits = {name: resource.prlimit(pid, resource.RLIMIT_NOFILE) for name, pid in pids.items()}
        for name, pid in pids.items():
            # What is open stays open; the next one would have a number that is too high.
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[name][1]))
        killed = [(await world.kill(f"{name}'s workers"))[0] for name in pids]
        await trio.sleep(SHORTAGE)
        assert {name: world.child(name).pid for name in pids} == pids
        for name, pid in pids.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits[name])
        codes = await world.end_well(task_id, expected)
        print(f"{killed} workers killed while there were no descriptors; {codes}")
        assert {name: world.child(name).pid for name in pids} == pids
