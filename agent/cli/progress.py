"""How far a task is, from its document, and how fast, over a sliding window. No I/O, time passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """What a task document says about how far the task is. ``bytes_total`` is None until the scan has told."""

    status: str
    bytes_done: int
    bytes_total: int | None
    files_done: int
    files_total: int
    is_delete: bool
    faults: int
    held_up_by: str
    current: str


def beside(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Towpath adds to a task document beside Globus's fields; empty at another service."""
    ours = task.get("towpath")
    return ours if isinstance(ours, Mapping) else {}


def progress_of(task: Mapping[str, Any]) -> Progress:
    """Read a task document; Towpath's own fields may be missing."""
    ours = beside(task)
    total = ours.get("bytes_total")
    scanned = bool(ours.get("scan_complete"))
    nice = str(task.get("nice_status") or "")
    is_delete = task.get("type") == "DELETE"
    details = str(task.get("nice_status_details") or task.get("nice_status_short_description") or "")
    return Progress(
        status=str(task.get("status") or "?"),
        bytes_done=_number(task.get("bytes_transferred")),
        bytes_total=_number(total) if total is not None and scanned else None,
        # A delete moves nothing; what it has to do and has done are its subtasks.
        files_done=_number(task.get("subtasks_succeeded"))
        if is_delete
        else _number(task.get("files_transferred")) + _number(task.get("files_skipped")),
        files_total=_number(task.get("subtasks_total" if is_delete else "files")),
        is_delete=is_delete,
        faults=_number(task.get("faults")),
        held_up_by="" if nice.upper() in ("", "OK", "QUEUED") else (details or nice),
        current=str(ours.get("current") or ""),
    )


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


class RateMeter:
    """Bytes a second over the last seconds, so that a stall shows at once and a burst does not mislead for long."""

    def __init__(self, window: float = WINDOW_SECONDS) -> None:
        self._window = window
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, count: int, now: float) -> None:
        """Take the absolute number of bytes done at a time (seconds of any steady clock)."""
        if self._samples and count < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, count))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window:
            self._samples.popleft()

    def rate(self) -> float:
        """Bytes a second, 0 until two samples are known."""
        if len(self._samples) < 2:
            return 0.0
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else 0.0


def seconds_left(progress: Progress, rate: float) -> float | None:
    """How long the rest will take at this rate, or None when nobody can know."""
    if progress.bytes_total is None or rate <= 0:
        return None
    return max(0, progress.bytes_total - progress.bytes_done) / rate


class Display(Protocol):
    """Somebody who shows a task while it runs."""

    def show(self, progress: Progress, rate: float) -> None:
        """The task's newest state."""
        ...

    def away(self, reason: str) -> None:
        """The relay cannot be asked at the moment."""
        ...


class Silent:
    """A display that shows nothing."""

    def show(self, progress: Progress, rate: float) -> None:
        """Nothing."""

    def away(self, reason: str) -> None:
        """Nothing."""
