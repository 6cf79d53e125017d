"""An agent's numbers in Prometheus's text format. Pure.

Format: Prometheus exposition formats, version 0.0.4. Labels are ids and words of our own, never names or paths. However
many tasks there are, those of at most `MOST_TASKS` are told one by one; all are counted by state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from protocol.control import FINAL_STATES, TaskObserved, TaskState

# As many as can have a worker at a time (limits.workers).
MOST_TASKS = 64

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class AgentNumbers:
    """What is told of the agent beside its tasks."""

    version: str
    linked: bool
    paused: bool
    running: int
    sessions: int
    refused: int
    # Content bytes that workers have moved since the agent's start, and what it may move now (bytes a second).
    received: int
    sent: int
    receive_limit: int | None
    send_limit: int | None


# Of `Counters`, what only grows. The others are told as they are.
_COUNTERS = (
    ("files_transferred", "Files that have arrived."),
    ("files_skipped", "Files that were there already."),
    ("bytes_transferred", "Content bytes that have arrived and are durable."),
    ("bytes_checksummed", "Content bytes that were compared by digest."),
    ("bytes_sent_again", "Content bytes that were received more than once."),
    ("failed", "Items that failed."),
    ("faults", "Faults so far."),
)


def exposition(numbers: AgentNumbers, tasks: Iterable[TaskObserved]) -> str:
    """The whole text. Tasks that have ended are left out."""
    living = [task for task in tasks if task.state not in FINAL_STATES]
    # Those that run: series that come and go with what waits would be of no use.
    running = [task for task in living if task.flow is not None or task.state == "ACTIVE"][:MOST_TASKS]
    return "".join((*_agent(numbers), *_counts(living), *_tasks(running), *_flows(running)))


def _counts(living: list[TaskObserved]) -> Iterator[str]:
    states = [state for state in get_args(TaskState) if state not in FINAL_STATES]
    counted = Counter(task.state for task in living)
    by_state: list[Sample] = [({"state": state}, counted[state]) for state in states]
    yield _metric("agent_tasks", "gauge", "Tasks to this machine that are not over, by state.", by_state)


def _agent(numbers: AgentNumbers) -> Iterator[str]:
    yield _metric("agent_info", "gauge", "The agent's version.", [({"version": numbers.version}, 1)])
    yield _metric("agent_linked", "gauge", "Whether the relay is connected.", [({}, numbers.linked)])
    yield _metric("agent_paused", "gauge", "Whether the owner has paused the machine.", [({}, numbers.paused)])
    yield _metric("agent_running_tasks", "gauge", "Tasks with a worker.", [({}, numbers.running)])
    yield _metric("agent_sessions", "gauge", "Sessions served from here.", [({}, numbers.sessions)])
    yield _metric("agent_refused_total", "counter", "Connections that were refused.", [({}, numbers.refused)])
    moved = [({"direction": "receive"}, float(numbers.received)), ({"direction": "send"}, float(numbers.sent))]
    yield _metric("agent_content_bytes_total", "counter", "Content moved since the start.", moved)
    limits: list[Sample] = [
        ({"direction": direction}, float(limit))
        for direction, limit in (("receive", numbers.receive_limit), ("send", numbers.send_limit))
        if limit is not None
    ]
    yield _metric("agent_bandwidth_limit_bytes_per_second", "gauge", "The owner's limit in force.", limits)


def _tasks(tasks: list[TaskObserved]) -> Iterator[str]:
    states: list[Sample] = [({"task": task.task_id, "state": task.state}, 1) for task in tasks]
    yield _metric("task_state", "gauge", "Tasks to this machine that run, and their states.", states)
    for name, help_ in _COUNTERS:
        rows: list[Sample] = [({"task": task.task_id}, float(getattr(task.counters, name))) for task in tasks]
        yield _metric(f"task_{name}_total", "counter", help_, rows)


def _flows(tasks: list[TaskObserved]) -> Iterator[str]:
    flows = [(task.task_id, task.flow) for task in tasks if task.flow is not None]
    goodput: list[Sample] = [({"task": task}, flow.goodput) for task, flow in flows]
    yield _metric("task_goodput_bytes_per_second", "gauge", "Content arriving now.", goodput)
    files: list[Sample] = [({"task": task}, flow.files_per_second) for task, flow in flows]
    yield _metric("task_files_per_second", "gauge", "Files arriving now.", files)
    held: list[Sample] = [({"task": task, "side": flow.limited_by}, 1) for task, flow in flows if flow.limited_by]
    yield _metric("task_limited_by", "gauge", "What holds the task up now.", held)
    lanes = [({"task": task, "lane": str(lane.lane)}, lane) for task, flow in flows for lane in flow.lanes]
    speeds: list[Sample] = [(labels, lane.goodput) for labels, lane in lanes]
    yield _metric("lane_goodput_bytes_per_second", "gauge", "Content arriving on a lane now.", speeds)
    saved: list[Sample] = [(labels, lane.saved) for labels, lane in lanes]
    help_ = "Of the content arriving on a lane, what compression kept off the network."
    yield _metric("lane_saved_bytes_per_second", "gauge", help_, saved)
    trips: list[Sample] = [(labels, lane.rtt) for labels, lane in lanes if lane.rtt is not None]
    yield _metric("lane_round_trip_seconds", "gauge", "Smoothed round-trip time.", trips)
    again: list[Sample] = [(labels, float(lane.retransmissions)) for labels, lane in lanes]
    yield _metric("lane_retransmissions", "gauge", "Packets that were sent again on a lane.", again)


def _metric(name: str, kind: str, help_: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP towpath_{name} {help_}\n# TYPE towpath_{name} {kind}\n"]
    for labels, value in samples:
        text = ",".join(f'{label}="{_escaped(content)}"' for label, content in labels.items())
        lines.append(
            f"towpath_{name}{{{text}}} {float(value):.17g}\n" if text else f"towpath_{name} {float(value):.17g}\n"
        )
    return "".join(lines) if len(lines) > 1 else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
