"""What the agent's log says of a task: when it begins, what holds it up, when it goes on, how it ends. Pure.

Files are not named: a log may be given away, and lists of files are kept elsewhere.
"""

from __future__ import annotations

import logging

from protocol.control import FINAL_STATES, Counters, TaskObserved


class TaskLog:
    """The lines of one task. A task that waits looks again every few seconds: it is told once, until something moved or
    something else holds it up. ``begun``: it did something before this agent started."""

    def __init__(self, *, begun: bool = False) -> None:
        self._begun = begun
        self._said = ""
        self._moved = Counters()

    def line(self, observed: TaskObserved) -> tuple[int, str] | None:
        """A level and what to say after the task's id; None when nothing is new."""
        state, counters = observed.state, observed.counters
        said: str = state
        if state in FINAL_STATES:
            level, text = logging.INFO, _end(observed)
            if state == "FAILED":
                level = logging.WARNING
        elif state in ("WAITING", "PAUSED"):
            said, level = f"{state} {observed.status_code}", logging.WARNING if observed.who else logging.INFO
            text = f"{'is paused' if state == 'PAUSED' else 'waits'}{_why(observed)}"
        elif state == "ACTIVE":
            level = logging.INFO
            text = "goes on." if self._said or self._begun else "begins."
            if self._said.startswith("WAITING") and not self._has_moved(counters):
                return None
        else:
            return None
        if said == self._said:
            return None
        self._said, self._moved = said, counters
        return level, text

    def _has_moved(self, now: Counters) -> bool:
        before = self._moved
        return (now.bytes_transferred, now.files_transferred, now.deleted) != (
            before.bytes_transferred,
            before.files_transferred,
            before.deleted,
        )


def _why(observed: TaskObserved) -> str:
    if observed.status_code in ("", "OK", observed.state):
        return "."
    who = f", for the {observed.who}" if observed.who not in ("", "you") else ""
    return f" ({observed.status_code}{who})."


def _end(observed: TaskObserved) -> str:
    counters = observed.counters
    did = f"{counters.deleted} deleted" if counters.deleted else f"{counters.bytes_transferred} bytes"
    files = f"{counters.files_transferred} of {counters.files} files, {did}"
    left = f", {counters.failed} failed" if counters.failed else ""
    left += f", {counters.skipped_errors} left out" if counters.skipped_errors else ""
    verb = {"SUCCEEDED": "is done", "FAILED": "has failed", "CANCELED": "was cancelled"}[observed.state]
    code = f" ({observed.status_code})" if observed.state == "FAILED" else ""
    return f"{verb}{code}: {files}{left}."
