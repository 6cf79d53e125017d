"""The power fails while the daemon writes down tasks and events: what it has answered for is there afterwards.

A process with the real store is traced, and every state that its disk may be in is opened again. Then the syncs are
left out, as ``synchronous=OFF`` would, and that must be noticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.tasks.task_store import TaskStore
from tests.agent.database_states import TREE, Fact, broken_pages, strace_trouble, wrong_states
from tests.agent.disk_trace import CALLS, Trace, before, crash_states, read_trace
from tests.agent.engine_inside import quick_path
from tests.slices import part

__all__ = ["quick_path"]

SEED = 44
PROGRAM = """
import json, sys, time
from pathlib import Path
from agent.transfer.tasks.task_store import TaskStore
from protocol.control import AgentEvent, Party, TaskObserved, TaskOrder

facts = []
def told(kind, value):
    facts.append((time.time(), kind, str(value)))

store = TaskStore(Path(sys.argv[1]) / "tasks.sqlite")
party = Party(endpoint_id="e", node_id="n", collection_id="c", certificate="x" * 3000)
for number in range(4):
    task = f"task-{number}"
    order = TaskOrder(task_id=task, revision=1, desired="run", type="TRANSFER", ticket="", session_id="s",
                      destination=party, source=party)
    store.put_order(order, TaskObserved(task_id=task, revision=1, state="QUEUED"), None)
    told("task", task)
    for seq in (1, 2):
        event = AgentEvent(n=0, kind="event", time="", task_id=task, code="STARTED")
        store.add_event(event, worker_seq=seq, observed=TaskObserved(task_id=task, revision=1, state="ACTIVE"))
        told("event", store.last_event())
store.put_held("task-1", held=True)
told("held", "task-1")
store.remove("task-0")
told("removed", "task-0")
store.close()
print(json.dumps(facts))
"""

needs_strace = pytest.mark.skipif(bool(strace_trouble()), reason=strace_trouble() or "strace works")


def record(place: Path) -> tuple[Trace, list[Fact]]:
    """One process that keeps tasks, traced to its end."""
    state, trace = place / "state", place / "trace"
    state.mkdir()
    reader = before([state], b"tasks.sqlite")
    options = ["-f", "-qq", "-y", "-xx", "-ttt", "-s", "1000000", "-e", "signal=none", "-e", f"trace={CALLS}"]
    done = subprocess.run(
        ["strace", *options, "-o", str(trace), sys.executable, "-c", PROGRAM, str(state)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    facts = [Fact(*row) for row in json.loads(done.stdout)]
    return read_trace(trace, reader, {TREE: state}), facts


def look(place: Path, told: Sequence[Fact]) -> list[str]:
    """What the store does not know any more."""
    path = place / "tasks.sqlite"
    found = broken_pages(path)
    if found:
        return found
    try:
        store = TaskStore(path)
    except StateTrouble as error:
        return [f"it cannot be opened: {error.sentence}"]
    try:
        tasks = {row.order.task_id: row for row in store.load()}
        lines = [event.n for event in store.events_after(0)]
        last = store.last_event()
    finally:
        store.close()
    removed = {fact.value for fact in told if fact.kind == "removed"}
    # The removal itself may have come to the disk before anybody was told of it.
    wanted = {fact.value for fact in told if fact.kind == "task"} - removed - {"task-0"}
    wrong = [f"{task} is forgotten" for task in sorted(wanted - tasks.keys())]
    wrong += [f"{task} is back" for task in sorted(removed & tasks.keys())]
    held = {task for task, row in tasks.items() if row.held}
    wrong += [f"{fact.value} is not held" for fact in told if fact.kind == "held" and fact.value not in held]
    highest = max((int(fact.value) for fact in told if fact.kind == "event"), default=0)
    if last < highest:
        wrong.append(f"event {highest} was told, and its number would be given again (last: {last})")
    if lines != list(range(last - len(lines) + 1, last + 1)):
        wrong.append(f"events {lines} of {last} have gaps")
    return wrong


@needs_strace
def test_what_the_daemon_has_answered_for_outlives_a_power_failure(tmp_path: Path, quick_path: Path) -> None:
    trace, facts = record(tmp_path)
    states = crash_states(trace, Random(SEED), at_random=1, every=5)
    count, wrong = wrong_states(trace, facts, states, quick_path, look, stop_at_first=False)
    assert not wrong, "\n".join(wrong)
    syncs = trace.syncs
    print(f"calls: {len(trace.operations)}, syncs: {len(syncs)}, facts: {len(facts)}, different states: {count}")
    assert syncs
    # As if the store were opened with synchronous=OFF.
    mutant = trace.without(syncs)
    states = crash_states(mutant, Random(SEED), at_random=1, every=5)
    noticed, wrong = wrong_states(mutant, facts, states, quick_path, look, stop_at_first=True)
    assert wrong, f"all syncs were forgotten, and {noticed} states did not show it"
    print(f"forgotten syncs noticed at state {noticed}: {wrong[0]}")


@needs_strace
@pytest.mark.soak
def test_every_state_of_the_daemons_tasks(tmp_path: Path, quick_path: Path) -> None:
    trace, facts = record(tmp_path)
    states = part(crash_states(trace, Random(SEED), at_random=8))
    count, wrong = wrong_states(trace, facts, states, quick_path, look, stop_at_first=False)
    assert not wrong, "\n".join(wrong)
    print(f"calls: {len(trace.operations)}, syncs: {len(trace.syncs)}, different states: {count}")
