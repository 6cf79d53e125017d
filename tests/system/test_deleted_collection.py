"""A collection that is deleted at the relay while its agent runs, or while it is away: real processes."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
import trio

from agent import local_socket
from agent.availability import MISSING
from agent.demo.world import program
from tests.agent.engine_inside import contents
from tests.system.stopped_world import StoppedWorld, fill, stopped_world


async def missing(world: StoppedWorld, agent: str) -> bool:
    """Whether the agent says to its owner that the relay does not have its collection, as the command shows it."""
    site = world.world.sites[agent]
    answer = await trio.to_thread.run_sync(local_socket.ask, site.state_dir, "GET", "/collections")
    (row,) = answer["collections"]
    assert row["missing"] is not row["available"]
    return bool(row["missing"])


def shown(*words: str) -> str:
    return subprocess.run([program("towpath"), *words], capture_output=True, text=True, timeout=60).stdout


async def until(world: StoppedWorld, agent: str) -> None:
    with trio.fail_after(60):
        while True:
            # One that was just started does not answer yet.
            with contextlib.suppress(local_socket.NotRunning):
                if await missing(world, agent):
                    return
            await trio.sleep(0.1)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_owners_read_that_the_relay_has_it_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stopped_world(tmp_path, monkeypatch) as world:
        alpha, beta = (world.world.sites[name] for name in ("alpha", "beta"))
        files = fill(world.source / "small", 0)
        before = alpha.config_file.read_bytes()
        assert not await missing(world, "alpha")
        await world.world.call(lambda relay: relay.transfer.delete_endpoint(alpha.collection_id))
        await until(world, "alpha")
        for words in (("status",), ("collection", "list"), ("doctor",)):
            said = await trio.to_thread.run_sync(shown, *words, "--config", str(alpha.config_file))
            assert "does not have" in said, said
        assert MISSING in await trio.to_thread.run_sync(shown, "status", "--config", str(alpha.config_file))
        # One that was away hears of it as it comes, and again after each start.
        for is_first in (True, False):
            await beta.child.kill()
            if is_first:
                await world.world.call(lambda relay: relay.transfer.delete_endpoint(beta.collection_id))
            await beta.child.start()
            await until(world, "beta")
        assert contents(world.source / "small") == files
        assert alpha.config_file.read_bytes() == before
