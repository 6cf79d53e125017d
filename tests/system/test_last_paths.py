"""Real processes with only one way left between the agents: the relay's tunnel, or QUIC. Killed and resumed in it.

Both agents are on this machine: without permission for the loopback address neither finds an address of the other that
it may dial, so the tunnel is what remains; a task that wants QUIC only tries no TCP.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from agent.cli.relay_client import Relay
from agent.demo.children import warden
from agent.demo.world import World, open_world, program

NAME = "big.bin"
PATIENCE = 100.0


@asynccontextmanager
async def world(directory: Path, *, size: int, tunnel: bool, rate: int = 0) -> AsyncIterator[World]:
    roots = {name: directory / f"{name}-root" for name in ("alpha", "beta")}
    for root in roots.values():
        root.mkdir()
    with (roots["alpha"] / NAME).open("wb") as file:
        chance = random.Random(1)
        for _ in range(size // (1 << 20)):
            file.write(chance.randbytes(1 << 20))
    async with warden() as guard, open_world(directory, roots, guard, lambda _text: None) as made:
        if tunnel:
            await close_direct_ways(made, directory, rate)
        yield made


async def close_direct_ways(made: World, directory: Path, rate: int) -> None:
    async with trio.open_nursery() as nursery:
        for site in made.sites.values():
            nursery.start_soon(site.child.stop)
    for name, site in made.sites.items():
        document = yaml.safe_load(site.config_file.read_text())
        document["data"]["allow_loopback"] = False
        if name == "beta":
            # One of the two legs inside WebSocket, as behind a firewall that inspects.
            document["relay"] = (document.get("relay") or {}) | {"transport": "websocket"}
        site.config_file.write_text(yaml.safe_dump(document))
    if rate:
        await made.relay.stop()
        file = directory / "relay" / "relay.yaml"
        document = yaml.safe_load(file.read_text()) | {"tunnel": {"session_rate": rate}}
        file.write_text(yaml.safe_dump(document))
        await made.relay.start()
    for site in made.sites.values():
        await site.child.start()
    for name in made.sites:
        await connected(made, name)


async def connected(made: World, name: str) -> None:
    with trio.fail_after(PATIENCE):
        while True:
            try:
                await made.until_connected(name)
            except Exception:
                # The relay itself may still be starting.
                await trio.sleep(0.2)
            else:
                return


async def submit(made: World, **options: Any) -> str:
    def send(relay: Relay) -> str:
        document = {
            "DATA_TYPE": "transfer",
            "submission_id": relay.transfer.get_submission_id()["value"],
            "source_endpoint": made.sites["alpha"].collection_id,
            "destination_endpoint": made.sites["beta"].collection_id,
            "DATA": [{"DATA_TYPE": "transfer_item", "source_path": f"/{NAME}", "destination_path": f"/{NAME}"}],
            **options,
        }
        return str(relay.transfer.submit_transfer(document)["task_id"])

    return await made.call(send)


async def task_of(made: World, task_id: str) -> dict[str, Any]:
    while True:
        try:
            return await made.call(lambda relay: dict(relay.transfer.get_task(task_id).data))
        except Exception:
            # The relay is being started again.
            await trio.sleep(0.2)


async def until(made: World, task_id: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    task: dict[str, Any] = {}
    with trio.move_on_after(PATIENCE):
        while True:
            task = await task_of(made, task_id)
            if holds(task):
                return task
            await trio.sleep(0.1)
    tails = "\n".join(child.log_tail() for child in made.children)
    raise AssertionError(f"in vain: {json.dumps(task)[:2000]}\n{tails}")


async def path_of(made: World, task_id: str) -> str:
    """How the data goes, as the destination's agent says."""
    result = await trio.run_process(
        [program("towpath"), "status", "--config", str(made.sites["beta"].config_file), "--format", "json"],
        capture_stdout=True,
        env={**os.environ},
    )
    tasks = json.loads(result.stdout)["tasks"]
    return next(str(task["path"]) for task in tasks if task["task_id"] == task_id)


async def arrived(made: World, task_id: str) -> None:
    """It succeeded, with equal content and nothing left over."""
    task = await until(made, task_id, lambda task: task["status"] in ("SUCCEEDED", "FAILED"))
    assert task["status"] == "SUCCEEDED", task
    source, destination = made.sites["alpha"].root, made.sites["beta"].root
    assert (source / NAME).read_bytes() == (destination / NAME).read_bytes()
    assert sorted(path.name for path in destination.iterdir()) == [NAME]


def moving(task: dict[str, Any]) -> bool:
    assert task["status"] == "ACTIVE", task
    return bool(task["bytes_transferred"] > 1 << 20)


async def kill_and_start(made: World, name: str) -> None:
    child = made.relay if name == "relay" else made.sites[name].child
    await child.kill()
    await child.start()


async def test_over_quic_and_through_the_tunnel_with_a_kill_in_each(tmp_path: Path) -> None:
    """In one world, because making it takes most of the time. The tunnel's one leg is inside WebSocket."""
    slowly = {"towpath_bandwidth_limit": 2_000_000}
    async with world(tmp_path, size=10 << 20, tunnel=False) as made:
        for path, options in (
            ("quic", {"towpath_transport": "quic", "towpath_relay": "never"}),
            ("tunnel over WebSocket", {"towpath_transport": "tcp"}),
        ):
            task_id = await submit(made, **options, **slowly)
            await until(made, task_id, moving)
            assert (await path_of(made, task_id)).startswith(path)
            await kill_and_start(made, "beta")
            await arrived(made, task_id)
            if path == "quic":
                (made.sites["beta"].root / NAME).unlink()
                await close_direct_ways(made, tmp_path, 0)


@pytest.mark.soak
async def test_through_the_tunnel_with_kills_of_both_agents_and_the_relay(tmp_path: Path) -> None:
    async with world(tmp_path, size=24 << 20, tunnel=True, rate=6_000_000) as made:
        task_id = await submit(made)
        await until(made, task_id, moving)
        assert (await path_of(made, task_id)).startswith("tunnel over WebSocket")
        for name in ("beta", "relay", "alpha"):
            before = (await task_of(made, task_id))["bytes_transferred"]
            await kill_and_start(made, name)
            # It goes on from where it was, and ahead.
            await until(
                made,
                task_id,
                lambda task, before=before: task["status"] == "SUCCEEDED" or task["bytes_transferred"] > before,
            )
        await arrived(made, task_id)


async def over_quic(directory: Path, size: int) -> None:
    async with world(directory, size=size, tunnel=False) as made:
        task_id = await submit(made, towpath_transport="quic", towpath_relay="never")
        await until(made, task_id, moving)
        assert "QUIC" in await path_of(made, task_id) or "quic" in await path_of(made, task_id)
        for name in ("beta", "alpha"):
            await kill_and_start(made, name)
            await connected(made, name)
        await arrived(made, task_id)


@pytest.mark.soak
async def test_over_quic_with_kills_of_both_agents(tmp_path: Path) -> None:
    # Large enough not to be over before it is looked at and killed twice.
    await over_quic(tmp_path, 512 << 20)


@pytest.mark.soak
async def test_a_gibibyte_over_quic_with_kills_of_both_agents(tmp_path: Path) -> None:
    await over_quic(tmp_path, 1 << 30)
