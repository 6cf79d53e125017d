"""Both agents of a running transfer have no descriptors left for a while: real processes, limits set from outside."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import trio

from tests.agent.engine_inside import contents
from tests.system.stopped_world import MIB, fill, stopped_world

SHORTAGE = 12.0


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nobody change the limits of a running process")
async def test_a_transfer_goes_on_after_a_shortage_of_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers are killed meanwhile, so that both agents need what they do not have: connections and processes."""
    async with stopped_world(tmp_path, monkeypatch) as world:
        (world.source / "tree").mkdir()
        expected = fill(world.source / "tree", 24 * MIB)
        world.slow(0.3)
        task_id = await world.submit("tree", "place")
        with trio.fail_after(60):
            while not await world.known_to_beta(task_id):
                await trio.sleep(0.05)
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
        world.slow(0.0)
        assert (await world.until_ended(task_id))["status"] == "SUCCEEDED"
        codes = await world.codes(task_id)
        print(f"{killed} workers killed while there were no descriptors; {codes}")
        assert contents(world.destination / "place") == expected
        assert {name: world.child(name).pid for name in pids} == pids
        assert (codes.count("STARTED"), codes.count("SUCCEEDED")) == (1, 1)
