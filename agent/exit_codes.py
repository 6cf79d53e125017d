"""What the exit code of a command says, and how a task document maps to one."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any


class ExitCode(enum.IntEnum):
    """Exit codes of every ``towpath`` command; the user documentation repeats this table."""

    DONE = 0
    OTHER = 1
    USAGE = 2
    PARTIAL = 3
    FAILED = 4
    CANCELED = 5
    TIMED_OUT = 6
    NEEDS_ATTENTION = 7
    INTERRUPTED = 130


_CANCEL_CODES = frozenset({"CANCELED", "CANCELLED"})


def _code_of(value: object) -> str:
    return str(value.get("code") or "").upper() if isinstance(value, Mapping) else ""


def final_exit_code(task: Mapping[str, Any]) -> ExitCode | None:
    """The exit code of a finished task document, or None while the task has not ended.

    A cancelled task is FAILED in Globus's terms; its fatal error (or its nice status) tells it apart.
    """
    status = task.get("status")
    if status == "SUCCEEDED":
        return ExitCode.PARTIAL if int(task.get("subtasks_skipped_errors") or 0) > 0 else ExitCode.DONE
    if status == "FAILED":
        canceled = (
            _code_of(task.get("fatal_error")) in _CANCEL_CODES
            or str(task.get("nice_status") or "").upper() in _CANCEL_CODES
            or bool(task.get("canceled_by_admin"))
        )
        return ExitCode.CANCELED if canceled else ExitCode.FAILED
    return None


# A machine that is off comes back by itself as a rule; waiting for it is what waiting is for. An agent that ends leaves
# its tasks paused, without anything that holds them up; whoever pauses one says so in its status.
_PASSING_CODES = frozenset({"", "OK", "QUEUED", "GC_NOT_CONNECTED", "CONNECT_FAILED", "HELD_BACK"})


def needs_attention(task: Mapping[str, Any]) -> bool:
    """Whether an unfinished task waits for a person: paused, without credentials, or held up by something that no
    retry will mend (a full disk, an expired permission)."""
    if final_exit_code(task) is not None:
        return False
    if task.get("status") == "INACTIVE":
        return True
    held_up = str(task.get("nice_status") or "").upper() not in _PASSING_CODES
    return held_up and bool(task.get("is_paused") or who_can_mend(task))


def who_can_mend(task: Mapping[str, Any]) -> str:
    """Who can mend what holds the task up (``you``, ``source owner`` …), or an empty string."""
    ours = task.get("towpath")
    return str(ours.get("who") or "") if isinstance(ours, Mapping) else ""
