"""Limits of bandwidth with real worker processes: a transfer under a limit, which is then lifted while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio

from agent.config.keys import BandwidthConfig
from protocol.control import TaskItem, TaskOptions
from tests.agent import engine_world

pytestmark = pytest.mark.usefixtures("workers_forked")

# At the limit this takes three minutes; without one a moment.
SIZE = 60 * 1024 * 1024
LIMIT = 350_000
LimitOf = Callable[[Any, str, int | None], Awaitable[None]]


def _bandwidth(node: Any, **rates: int | None) -> None:
    """What the daemon does when the configuration has changed."""
    local = node.service._node
    limits = dataclasses.replace(local.config.limits, bandwidth=BandwidthConfig(**rates))
    local.config = dataclasses.replace(local.config, limits=limits)
    local.allotment.changed()


async def _of_destination(world: Any, _task: str, rate: int | None) -> None:
    _bandwidth(world.beta, receive=rate)


async def _of_source(world: Any, _task: str, rate: int | None) -> None:
    _bandwidth(world.alpha, send=rate)


async def _of_each_task(world: Any, _task: str, rate: int | None) -> None:
    _bandwidth(world.beta, task=rate)


async def _of_task(world: Any, task: str, rate: int | None) -> None:
    if not task:
        return
    order = world.beta.service._task(task).order
    options = msgspec.structs.replace(order.options, bandwidth_limit=rate)
    newer = msgspec.structs.replace(order, revision=order.revision + 1, options=options, items=None)
    await world.beta.service.put_task(newer)


def _workers() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        # One that is ending has no command line any more.
        with contextlib.suppress(psutil.Error):
            if "agent.transfer.worker" in child.cmdline():
                found.add(child.pid)
    return found


@pytest.mark.parametrize(
    "limit",
    [
        _of_destination,
        *(pytest.param(other, marks=pytest.mark.soak) for other in (_of_source, _of_each_task, _of_task)),
    ],
)
async def test_a_limit_holds_and_is_lifted_while_the_task_runs(tmp_path: Path, limit: LimitOf) -> None:
    async with engine_world.world(tmp_path) as world:
        (world.alpha.root / "large").write_bytes(os.urandom(SIZE))
        await limit(world, "", LIMIT)
        options = TaskOptions(bandwidth_limit=LIMIT if limit is _of_task else None)
        task = await world.submit([TaskItem(source_path="/large", destination_path="/large")], options)
        received = world.beta.state / "tasks" / task / "received"
        with trio.fail_after(30):
            while not received.exists() or not int.from_bytes(received.read_bytes(), "little"):
                await trio.sleep(0.05)
        before = _workers()
        await trio.sleep(1.5)
        # However slow or fast the machine: not more than the limit lets pass, with much to spare.
        assert int.from_bytes(received.read_bytes(), "little") < SIZE // 4
        assert world.beta.service.get_task(task).state == "ACTIVE"
        # And it says so.
        with trio.fail_after(20):
            while (flow := world.beta.service.get_task(task).flow) is None or flow.limited_by != "a limit":
                await trio.sleep(0.05)
        assert (flow.rate_limit is None) == (limit is _of_source)
        assert [lane.lane for lane in flow.lanes][:1] == [1]
        await limit(world, task, None)
        observed = await world.wait(task)
        assert observed.state == "SUCCEEDED", observed
        assert observed.counters.faults == 0
        # No worker was started anew for it.
        assert _workers() <= before
        assert (world.beta.root / "large").read_bytes() == (world.alpha.root / "large").read_bytes()


async def test_a_paced_task_is_cancelled_at_once(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        (world.alpha.root / "large").write_bytes(os.urandom(SIZE))
        options = TaskOptions(bandwidth_limit=1000)
        task = await world.submit([TaskItem(source_path="/large", destination_path="/large")], options)
        with trio.fail_after(30):
            while world.beta.service.get_task(task).state != "ACTIVE":
                await trio.sleep(0.05)
        order = world.beta.service._task(task).order
        await world.beta.service.put_task(msgspec.structs.replace(order, revision=2, desired="cancel", items=None))
        observed = await world.wait(task, seconds=20)
        assert observed.state == "CANCELED"
