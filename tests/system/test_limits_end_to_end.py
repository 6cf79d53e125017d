"""Limits of bandwidth as users and owners meet them: commands, a real relay, real agents, every kind of path."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.demo.world import World, program
from tests.system.test_last_paths import NAME, arrived, until, world

MIB = 1024 * 1024
SIZE = 48 * MIB
# At this rate it would take minutes.
LIMIT = "300 kB/s"


async def towpath(made: World, *arguments: str) -> str:
    """Run the command as the world's user; what it writes."""
    profile = made.profile
    environment = {
        **os.environ,
        "TOWPATH_RELAY_URL": profile.relay_url,
        "TOWPATH_CA_FILE": profile.ca_file or "",
        "TOWPATH_CLIENT_ID": profile.client_id,
        "TOWPATH_CLIENT_SECRET": profile.client_secret,
    }
    done = await trio.run_process(
        [program("towpath"), *arguments], capture_stdout=True, stderr=subprocess.STDOUT, env=environment
    )
    return done.stdout.decode()


def _held_up_by_a_limit(task: dict[str, Any]) -> bool:
    assert task["status"] == "ACTIVE", task
    flow = task["towpath"]["flow"]
    return flow is not None and flow["limited_by"] == "a limit"


@pytest.mark.parametrize(
    "way", ["direct", pytest.param("tunnel", marks=pytest.mark.soak), pytest.param("quic", marks=pytest.mark.soak)]
)
async def test_a_limit_given_with_the_transfer_is_shown_and_lifted_by_command(tmp_path: Path, way: str) -> None:
    async with world(tmp_path, size=SIZE, tunnel=way == "tunnel") as made:
        places = [f"{made.sites[name].collection_id}:/{NAME}" for name in ("alpha", "beta")]
        transport = ["--transport", "quic"] if way == "quic" else []
        said = await towpath(made, "transfer", "--bandwidth-limit", LIMIT, *transport, *places)
        task_id = said.split()[-1]
        await until(made, task_id, _held_up_by_a_limit)
        shown = await towpath(made, "task", "show", task_id)
        rows = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in shown.splitlines())}
        assert rows["Bandwidth limit"] == LIMIT
        assert rows["Limited by"] == f"a limit ({LIMIT}, of the task)"
        assert "Lane 1" in rows
        if way != "direct":
            assert rows["Path"].startswith(way)
        await towpath(made, "task", "update", task_id, "--bandwidth-limit", "none")
        await arrived(made, task_id)


@pytest.mark.soak
async def test_an_owners_limit_counts_at_once_and_shows_in_the_metrics(tmp_path: Path) -> None:
    async with world(tmp_path, size=SIZE, tunnel=False) as made:
        source, destination = made.sites["alpha"], made.sites["beta"]
        metrics = tmp_path / "towpath.prom"
        for site, key, value in (
            (source, "limits.bandwidth.send", LIMIT),
            (destination, "metrics.textfile", str(metrics)),
        ):
            await towpath(made, "config", "set", "--config", str(site.config_file), key, value)
        places = [f"{site.collection_id}:/{NAME}" for site in (source, destination)]
        task_id = (await towpath(made, "transfer", *places)).split()[-1]
        await until(made, task_id, _held_up_by_a_limit)
        with trio.fail_after(40):
            while (
                not metrics.exists() or f'task_limited_by{{task="{task_id}",side="a limit"}}' not in metrics.read_text()
            ):
                await trio.sleep(0.2)
        await towpath(made, "config", "unset", "--config", str(source.config_file), "limits.bandwidth.send")
        await arrived(made, task_id)
