"""The trial: one transfer during which every process is killed once, watched from outside, and compared afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import trio

from agent import local_socket
from agent.cli.progress import RateMeter, beside, progress_of
from agent.cli.relay_client import Relay, document_of
from agent.cli.screen import describe
from agent.demo.children import Child, ChildFailed
from agent.demo.compare import compare_trees
from agent.demo.sample import Contents
from agent.demo.verdict import Evidence, Kill, Watched, help_needed, kill_due
from agent.demo.world import AGENTS, World
from agent.exit_codes import final_exit_code
from protocol.errors import TowpathError

POLL_SECONDS = 0.1
# How long a killed process stays away.
ABSENCE_SECONDS = 1.0
WATCHER_SECONDS = 60.0

Show = Callable[[int, str], None]


@dataclass
class Course:
    """How the transfer has gone so far."""

    task: Mapping[str, Any] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    needed_help: list[str] = field(default_factory=list)


async def run_trial(
    world: World,
    tree: str,
    contents: Contents,
    *,
    say: Callable[[str], None],
    show: Show,
    changed: Callable[[], None],
    limit_seconds: float,
) -> Evidence:
    """Transfer the directory ``tree`` from alpha to beta with all the kills. ``show`` gets bytes done and a line;
    ``changed`` is called whenever process ids have changed. Raises `ChildFailed` when a process cannot go on."""
    source, destination = world.sites["alpha"].root / tree, world.sites["beta"].root / tree
    watched: list[Watched] = []
    course = Course()
    carried = loopback_bytes()
    async with watching(source, destination, watched):
        started = time.monotonic()
        task_id = await world.call(lambda relay: submit(relay, world, tree))
        say(f"Task {task_id} moves {tree} from alpha to beta.")
        with trio.move_on_after(limit_seconds) as limit:
            await _follow(world, task_id, course, contents, say, show, changed)
        seconds = task_seconds(course.task) or time.monotonic() - started
        if limit.cancelled_caught:
            course.needed_help.append(f"it had not ended after {limit_seconds:.0f} s ({_state(course.task)})")
    wire = None if carried is None else (loopback_bytes() or 0) - carried
    say("Comparing both trees.")
    comparison = await compare_trees(source, destination)
    return Evidence(course.task, contents, seconds, course.kills, comparison, watched[0], course.needed_help, wire)


def submit(relay: Relay, world: World, tree: str) -> str:
    """Submit the transfer and return its task id."""
    from globus_sdk import TransferData

    data = TransferData(
        *(world.sites[name].collection_id for name in AGENTS),
        label="Towpath demonstration",
        verify_checksum=True,
        preserve_timestamp=True,
        additional_fields={"recursive_symlinks": "keep"},
    )
    data.add_item(f"/{tree}/", f"/{tree}/", recursive=True)
    return str(relay.transfer.submit_transfer(data)["task_id"])


async def _follow(
    world: World,
    task_id: str,
    course: Course,
    contents: Contents,
    say: Callable[[str], None],
    show: Show,
    changed: Callable[[], None],
) -> None:
    meter = RateMeter()
    done_at_restart = -1
    while True:
        for child in world.children:
            child.raise_if_ended()
        course.task = await _ask(world, task_id)
        progress = progress_of(course.task)
        # The destination knows more than it has told the relay.
        known = await _known_to_destination(world, task_id)
        progress = replace(progress, bytes_done=max(progress.bytes_done, known))
        meter.note(progress.bytes_done, time.monotonic())
        show(progress.bytes_done, f"{describe(progress, meter.rate())}  {progress.held_up_by}")
        reason = help_needed(course.task)
        if reason and reason not in course.needed_help:
            course.needed_help.append(reason)
        if final_exit_code(course.task) is not None:
            return
        name = kill_due(progress.bytes_done, contents.bytes, len(course.kills))
        # After a restart the task must move by itself before the next blow.
        if name is not None and progress.bytes_done > done_at_restart:
            again = int(beside(course.task).get("bytes_sent_again") or 0)
            course.kills.append(Kill(name, progress.bytes_done, again))
            say(f"SIGKILL to {name} at {100 * progress.bytes_done / contents.bytes:.0f} %.")
            await _kill_and_restart(world, name)
            say(f"{name} runs again.")
            changed()
            done_at_restart = progress.bytes_done
        await trio.sleep(POLL_SECONDS)


async def _known_to_destination(world: World, task_id: str) -> int:
    """Bytes done by beta's own account; 0 while it does not answer."""
    state_dir = world.sites["beta"].state_dir
    try:
        status = await trio.to_thread.run_sync(local_socket.ask, state_dir, "GET", "/status", abandon_on_cancel=True)
    except TowpathError:
        return 0
    return max(
        (int(row["counters"]["bytes_transferred"]) for row in status["tasks"] if row["task_id"] == task_id), default=0
    )


async def _kill_and_restart(world: World, name: str) -> None:
    child: Child = world.relay if name == "relay" else world.sites[name].child
    await child.kill()
    await trio.sleep(ABSENCE_SECONDS)
    await child.start()


async def _ask(world: World, task_id: str) -> Mapping[str, Any]:
    """The task document; a relay that is just coming back is asked again until it answers."""
    from globus_sdk import NetworkError

    while True:
        try:
            return await world.call(lambda relay: document_of(relay.transfer.get_task(task_id)))
        except NetworkError:
            world.relay.raise_if_ended()
            await trio.sleep(POLL_SECONDS)


def task_seconds(task: Mapping[str, Any]) -> float | None:
    """How long the task took by its own times; None when it has not ended. The relay may hear of the end later."""
    return float(task["towpath"]["elapsed"]) if task.get("completion_time") else None


def _state(task: Mapping[str, Any]) -> str:
    return f"{task.get('status')}, {task.get('nice_status')}: {task.get('nice_status_details') or 'no details'}"


def loopback_bytes() -> int | None:
    """How many bytes this machine's loopback interface has carried, by the kernel's count; None if it does not say.
    Everything between the agents passes it, and so does whatever else runs on the machine."""
    for name, counters in psutil.net_io_counters(pernic=True).items():
        if name in ("lo", "lo0"):
            return int(counters.bytes_sent)
    return None


@asynccontextmanager
async def watching(source: Path, destination: Path, reports: list[Watched]) -> AsyncIterator[None]:
    """Run the watcher beside the body; afterwards its report is appended to ``reports``. Raises `ChildFailed` when it
    makes none."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "agent.demo.watcher", str(source), str(destination)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield
        await process.stdin.aclose()
        text = b""
        with trio.move_on_after(WATCHER_SECONDS):
            async for chunk in process.stdout:
                text += chunk
            await process.wait()
        if process.returncode != 0:
            raise ChildFailed(f"The watcher ended with {process.returncode}; what it saw is unknown.")
        document = json.loads(text)
        reports.append(Watched(document["looks"], document["checked"], tuple(document["wrong"])))
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
