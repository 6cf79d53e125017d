"""The power fails at the relay, or at an agent's daemon: its database still has whatever it had told anybody.

A relay and two agents run as real processes and do some tasks, and the relay and the destination's daemon are traced.
What clients were told (a task was accepted, a task has ended), what the daemon's owner was shown, and which of the
daemon's lines the relay has, are the facts. Many states in which the disk may be are looked at. Then the syncs are left
out of the trace, as ``synchronous=OFF`` would: that must be noticed.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import trio

from agent import local_socket
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.tasks.task_store import TaskStore
from tests.agent.database_states import TREE, Fact, Look, broken_pages, strace_trouble, wrong_states
from tests.agent.disk_trace import CALLS, Trace, _Reader, before, crash_states, read_trace
from tests.agent.engine_inside import quick_path
from tests.system.stopped_world import StoppedWorld, fill, stopped_world

__all__ = ["quick_path"]

SEED = 4401
TASKS = 3
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(strace_trouble()), reason=strace_trouble() or "strace works"),
]


@dataclass
class Traced:
    """A process whose database is watched."""

    folder: Path
    prefix: bytes
    output: Path
    facts: list[Fact] = field(default_factory=list)
    reader: _Reader | None = None

    def told(self, kind: str, value: object) -> None:
        self.facts.append(Fact(time.time(), kind, str(value)))

    def files(self) -> dict[str, bytes]:
        found = self.folder.glob(self.prefix.decode() + "*")
        return {path.name: path.read_bytes() for path in found if not path.name.endswith("-shm")}

    def trace(self) -> Trace:
        assert self.reader is not None
        return read_trace(self.output, self.reader, {TREE: self.folder})


@asynccontextmanager
async def traced(process: int, watched: Traced) -> AsyncIterator[None]:
    """Follow a running process until it ends, or the block does."""
    options = ["-f", "-qq", "-y", "-xx", "-ttt", "-s", "10000000", "-e", "signal=none", "-e", f"trace={CALLS}"]
    while True:
        files = watched.files()
        watched.reader = before([watched.folder], watched.prefix)
        strace = await trio.lowlevel.open_process(["strace", *options, "-o", str(watched.output), "-p", str(process)])
        try:
            with trio.fail_after(20):
                while "TracerPid:\t0\n" in Path(f"/proc/{process}/status").read_text():
                    await trio.sleep(0.02)
            if watched.files() == files:
                yield
                return
            # Something was written meanwhile: what was there before the trace is not known.
        finally:
            if strace.returncode is None:
                strace.terminate()
            with trio.CancelScope(shield=True):
                await strace.wait()


def of_relay(place: Path, told: Sequence[Fact]) -> list[str]:
    """What the relay has forgotten of what it told."""
    path = place / "relay.sqlite"
    found = broken_pages(path)
    if found:
        return found
    with closing(sqlite3.connect(path)) as connection:
        status = dict(connection.execute("SELECT id, status FROM tasks"))
    wrong = [f"task {fact.value} is forgotten" for fact in told if fact.value not in status]
    ended = [fact.value for fact in told if fact.kind == "ended"]
    return wrong + [
        f"task {task} has ended and is {status.get(task)}" for task in ended if status.get(task) != "SUCCEEDED"
    ]


def of_daemon(place: Path, told: Sequence[Fact]) -> list[str]:
    """What the daemon has forgotten of what it told."""
    path = place / "tasks.sqlite"
    found = broken_pages(path)
    if found:
        return found
    try:
        store = TaskStore(path)
    except StateTrouble as error:
        return [f"it cannot be opened: {error.sentence}"]
    try:
        tasks = {row.order.task_id for row in store.load()}
        last = store.last_event()
    finally:
        store.close()
    # The relay closes tasks that have ended; from then on nobody asks the daemon for them.
    closed = {fact.value for fact in told if fact.kind == "closed"}
    wrong = [
        f"task {task} is forgotten" for task in {fact.value for fact in told if fact.kind == "shown"} - closed - tasks
    ]
    highest = max((int(fact.value) for fact in told if fact.kind == "line"), default=0)
    if last < highest:
        wrong.append(f"the relay has line {highest}, and its number would be given again (last: {last})")
    return wrong


async def ask_daemon(made: StoppedWorld, database: Path, daemon: Traced) -> None:
    """Ask the daemon for its tasks, and look which of its lines the relay has, again and again."""
    site = made.world.sites["beta"]
    shown: dict[str, Fact] = {}
    highest = 0
    query = "SELECT last_event FROM nodes JOIN collections ON node_id = nodes.id WHERE collections.id = ?"
    while True:
        asked = time.time()
        status = await trio.to_thread.run_sync(local_socket.ask, site.state_dir, "GET", "/tasks")
        tasks = {str(row["task_id"]) for row in status["tasks"]}
        for task in shown.keys() - tasks:
            # Some time after it was seen last.
            daemon.facts.append(Fact(shown.pop(task).time, "closed", task))
        for task in tasks:
            daemon.told("shown", task)
            shown[task] = Fact(asked, "shown", task)
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            (last,) = connection.execute(query, (site.collection_id,)).fetchone()
        if last > highest:
            highest = last
            daemon.told("line", last)
        await trio.sleep(0.02)


async def work(made: StoppedWorld, relay: Traced) -> None:
    """Some tasks, and what is told meanwhile."""
    for number in range(TASKS):
        task = await made.submit("tree", f"copy-{number}")
        relay.told("task", task)
        await made.until_ended(task)
        relay.told("ended", task)


def check(name: str, watched: Traced, look: Look, base: Path) -> None:
    trace = watched.trace()
    every = max(1, len(trace.operations) // 250)
    assert trace.syncs
    for mutant in (False, True):
        looked_at = trace.without(trace.syncs) if mutant else trace
        states = crash_states(looked_at, Random(SEED), at_random=2, every=every)
        count, wrong = wrong_states(looked_at, watched.facts, states, base, look, stop_at_first=mutant)
        if mutant:
            assert wrong, f"{name}: all syncs were forgotten, and {count} states did not show it"
            print(f"{name}: forgotten syncs noticed at state {count}: {wrong[0]}")
        else:
            assert not wrong, f"{name}: " + "\n".join(wrong)
            print(
                f"{name}: calls {len(trace.operations)}, syncs {len(trace.syncs)}, facts {len(watched.facts)}, "
                f"different states {count}"
            )


async def test_what_was_told_outlives_a_power_failure(
    tmp_path: Path, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stopped_world(tmp_path, monkeypatch) as made:
        fill(made.source / "tree", 300_000)
        for name in ("alpha", "beta"):
            await made.world.until_connected(name)
        # What is written at the beginning is written by then, or the tracing begins again.
        await trio.sleep(1)
        relay = Traced(tmp_path / "relay", b"relay.sqlite", tmp_path / "relay.trace")
        state = made.world.sites["beta"].state_dir / "tasks"
        daemon = Traced(state, b"tasks.sqlite", tmp_path / "daemon.trace")
        async with (
            traced(made.child("relay").pid, relay),
            traced(made.child("beta").pid, daemon),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(ask_daemon, made, relay.folder / "relay.sqlite", daemon)
            await work(made, relay)
            nursery.cancel_scope.cancel()
    kinds = Counter(fact.kind for fact in daemon.facts)
    assert kinds["shown"] and kinds["line"], kinds
    print(f"told by the daemon: {dict(kinds)}")
    await trio.to_thread.run_sync(check, "relay", relay, of_relay, quick_path)
    await trio.to_thread.run_sync(check, "daemon", daemon, of_daemon, quick_path)
