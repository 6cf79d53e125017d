"""The relay is gone while data flows, for a while or with its newest memories: real processes, real backups."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import trio

from agent.demo.world import program
from tests.agent.engine_inside import contents
from tests.system.stopped_world import MIB, StoppedWorld, fill, stopped_world


def command(world: StoppedWorld, *words: str) -> None:
    """One of the relay's own commands."""
    done = subprocess.run([program("towpath-relay"), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


async def until_moving(world: StoppedWorld, task_id: str) -> None:
    with trio.fail_after(60):
        while not await world.known_to_beta(task_id):
            await trio.sleep(0.05)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_relay_restored_from_an_older_backup_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task began before the backup and ends after it, one began and ended after it, one runs through all of it."""
    async with stopped_world(tmp_path, monkeypatch) as world:
        small, large = fill(world.source / "small", 2 * MIB), fill(world.source / "large", 40 * MIB)
        relay = world.world.relay
        config = tmp_path / "relay" / "relay.yaml"
        world.slow(0.15)
        before = await world.submit("large", "before")
        await until_moving(world, before)
        await trio.to_thread.run_sync(command, world, "--config", str(config), "backup", str(tmp_path / "backup"))
        through = await world.submit("large", "through")
        short = await world.submit("small", "short")
        await until_moving(world, through)
        assert (await world.until_ended(short))["status"] == "SUCCEEDED"
        await relay.kill()
        restore = ("restore", str(tmp_path / "backup"), "--directory", str(config.parent), "--force")
        await trio.to_thread.run_sync(command, world, *restore)
        await relay.start()
        world.slow(0.0)
        for task_id, place, expected in (
            (before, "before", large),
            (through, "through", large),
            (short, "short", small),
        ):
            shown = await world.until_ended(task_id)
            codes = await world.codes(task_id)
            print(f"{place}: {codes}")
            assert shown["status"] == "SUCCEEDED", shown
            assert contents(world.destination / place) == expected
            assert (codes.count("STARTED"), codes.count("SUCCEEDED")) == (1, 1), codes
            assert codes.index("STARTED") < codes.index("SUCCEEDED")
            assert ("RELAY_RESTORED" in codes) == (task_id != before), codes
            assert "WORKER_DIED" not in codes


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_transfer_neither_stops_nor_slows_without_its_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay is away for `OUTAGE_SECONDS` (600 in earnest, a minute by default); the source is paced, so that the
    rate is the same on every machine."""
    outage = float(os.environ.get("OUTAGE_SECONDS", "60"))
    pace = 0.25
    async with stopped_world(tmp_path, monkeypatch) as world:
        # What beta tells meanwhile, beside the transfer: a worker that dies now and then.
        size = int((outage * 1.3 + 40) / pace) * MIB
        with (world.source / "paced").open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        (world.source / "tree").mkdir()
        (world.source / "paced").rename(world.source / "tree" / "paced")
        world.slow(pace)
        task_id = await world.submit("tree", "place")
        await until_moving(world, task_id)
        with_relay = await rate(world, task_id, 15.0)
        await world.world.relay.kill()
        without, deaths = [], 0
        began = time.monotonic()
        while time.monotonic() - began < outage:
            without.append(await rate(world, task_id, 10.0))
            if len(without) % 2 == 0:
                killed, _ = await world.kill("beta's workers")
                deaths += bool(killed)
                await trio.sleep(3.0)
        await world.world.relay.start()
        world.slow(0.0)
        assert (await world.until_ended(task_id))["status"] == "SUCCEEDED"
        codes = await world.codes(task_id)
        steady = sorted(without)[len(without) // 2]
        print(f"relay away for {outage:.0f} s: {with_relay / MIB:.2f} MiB/s with it, {steady / MIB:.2f} MiB/s without")
        print(f"every 10 s: {[round(row / MIB, 2) for row in without]}, the slowest of them after a kill")
        print(f"workers killed meanwhile: {deaths}, events: {codes}")
        # What the relay itself notes when it is back, and agents are not yet, is not the agent's.
        told = [code for code in codes if code != "GC_NOT_CONNECTED"]
        assert told == ["STARTED", *["WORKER_DIED"] * deaths, "SUCCEEDED"]
        # Paced by sleeping, it cannot be faster with a relay than without. Every other figure follows a worker's death.
        assert steady > with_relay * 0.8
        assert min(without) > 0


async def rate(world: StoppedWorld, task_id: str, seconds: float) -> float:
    """Bytes a second by beta's own account."""
    before, began = await world.known_to_beta(task_id), time.monotonic()
    await trio.sleep(seconds)
    return (await world.known_to_beta(task_id) - before) / (time.monotonic() - began)
