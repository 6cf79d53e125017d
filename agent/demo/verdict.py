"""What a trial has shown, and whether that is good enough. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from agent.cli.progress import beside
from agent.demo.compare import Comparison
from agent.demo.sample import Contents
from agent.exit_codes import needs_attention
from agent.quantities import human_bytes, human_seconds

MAX_SENT_AGAIN_PER_KILL = 64 * 1024 * 1024

# Who is killed, and when: at which share of the bytes.
KILLS: tuple[tuple[str, float], ...] = (("beta", 0.15), ("alpha", 0.40), ("relay", 0.65))


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: how far the task was, and how much had been sent again by then."""

    name: str
    bytes_done: int
    sent_again_before: int


@dataclass(frozen=True)
class Watched:
    """The watcher's report."""

    looks: int
    checked: int
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """Everything a trial has found out."""

    task: Mapping[str, Any]
    contents: Contents
    seconds: float
    kills: Sequence[Kill]
    comparison: Comparison
    watched: Watched
    needed_help: Sequence[str] = ()
    # What the kernel says crossed the loopback interface meanwhile, everything else on the machine included.
    wire_bytes: int | None = None

    @property
    def sent_again(self) -> int:
        """Bytes that crossed the wire more than once, by the task's own count."""
        return int(beside(self.task).get("bytes_sent_again") or 0)

    def sent_again_by_kill(self) -> list[tuple[Kill, int]]:
        """For each kill what was sent again between it and the next one (or the end)."""
        counts = [kill.sent_again_before for kill in self.kills] + [self.sent_again]
        return [(kill, after - before) for kill, (before, after) in zip(self.kills, pairwise(counts), strict=True)]


def kill_due(done: int, total: int, kills_so_far: int) -> str | None:
    """Whose turn it is to be killed at this progress, or None."""
    if kills_so_far >= len(KILLS) or total <= 0:
        return None
    name, share = KILLS[kills_so_far]
    return name if done >= share * total else None


def help_needed(task: Mapping[str, Any]) -> str:
    """Why a person would have to step in now, or an empty string."""
    if not needs_attention(task):
        return ""
    return f"{task.get('nice_status')}: {task.get('nice_status_details') or task.get('status')}"


def shortcomings(evidence: Evidence) -> list[str]:
    """What the demonstration must not end with, a sentence each. An empty list is success."""
    found = []
    task, expected = evidence.task, evidence.contents
    if task.get("status") != "SUCCEEDED":
        error = task.get("fatal_error") or {}
        reason = error.get("description") or task.get("nice_status_details") or "no reason given"
        found.append(f"The task did not succeed; it is {task.get('status')}: {reason}")
    if len(evidence.kills) < len(KILLS):
        missing = ", ".join(name for name, _ in KILLS[len(evidence.kills) :])
        found.append(f"The transfer was over before {missing} could be killed; use a larger --large-file.")
    if not evidence.comparison.equal:
        found.append(f"{evidence.comparison.tool} found differences:")
        found += [f"  {difference}" for difference in evidence.comparison.differences]
    found += [f"A final name was visible with wrong content: {wrong}" for wrong in evidence.watched.wrong]
    for kill, count in evidence.sent_again_by_kill():
        if count > MAX_SENT_AGAIN_PER_KILL:
            found.append(
                f"After {kill.name} was killed {human_bytes(count)} were sent again; at most "
                f"{human_bytes(MAX_SENT_AGAIN_PER_KILL)} are allowed."
            )
    if evidence.watched.checked < expected.files:
        found.append(f"The watcher saw only {evidence.watched.checked} of {expected.files} files.")
    if int(task.get("subtasks_skipped_errors") or 0):
        found.append(f"{task['subtasks_skipped_errors']} items were left out.")
    found += [f"The task needed help: {reason}" for reason in evidence.needed_help]
    return found


def summary(evidence: Evidence) -> list[str]:
    """What was shown, in lines for people."""
    contents, watched = evidence.contents, evidence.watched
    rate = contents.bytes / evidence.seconds if evidence.seconds > 0 else 0.0
    again = ", ".join(f"{human_bytes(count)} after {kill.name}" for kill, count in evidence.sent_again_by_kill())
    lines = [
        f"{contents.files} files, {contents.directories} directories and {contents.symlinks} symlinks, "
        f"{human_bytes(contents.bytes)}, in {human_seconds(evidence.seconds)}: {human_bytes(rate)}/s with "
        f"{len(evidence.kills)} crashes on the way.",
        f"Sent again: {human_bytes(evidence.sent_again)}{f' ({again})' if again else ''}.",
        f"{evidence.comparison.tool}: the trees are {'equal' if evidence.comparison.equal else 'NOT equal'}.",
        f"The watcher looked {watched.looks} times and checked {watched.checked} names as they appeared: "
        f"{len(watched.wrong) or 'none'} wrong.",
    ]
    if evidence.wire_bytes is not None:
        lines.append(f"By the kernel's count {human_bytes(evidence.wire_bytes)} crossed the loopback interface in all.")
    return lines
