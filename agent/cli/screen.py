"""The live display of a running task: a bar with rate and time left on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent.cli.output import Output, console
from agent.cli.progress import Display, Progress, Silent, seconds_left
from agent.quantities import human_bytes, human_seconds
from protocol.terminal import terminal_safe

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Columns of a terminal that has room for the bar; and of the longest state, `succeeded`.
WIDE, LONGEST = 110, 9


def describe(progress: Progress, rate: float) -> str:
    """One line about a running task, for screens of any kind."""
    if progress.is_delete:
        return f"{progress.files_done} of {progress.files_total} deleted"
    done = human_bytes(progress.bytes_done)
    total = f" of {human_bytes(progress.bytes_total)}" if progress.bytes_total is not None else ""
    files = f", {progress.files_done} of {progress.files_total} files" if progress.files_total else ""
    left = seconds_left(progress, rate) if progress.status == "ACTIVE" and not progress.held_up_by else None
    speed = f", {human_bytes(rate)}/s" if rate > 0 else ""
    rest = f", {human_seconds(left)} left" if left is not None else ""
    return f"{done}{total}{files}{speed}{rest}"


class BarDisplay:
    """A progress bar drawn by rich on standard error."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._bar: TaskID = bars.add_task("", total=None, state="starting", note="")

    def show(self, progress: Progress, rate: float) -> None:
        """Redraw with the newest state."""
        self._bars.update(
            self._bar,
            total=progress.bytes_total,
            completed=progress.bytes_done,
            state=terminal_safe(progress.status.lower()),
            note=terminal_safe(f"{describe(progress, rate)}  {progress.held_up_by or progress.current}".rstrip()),
        )

    def away(self, reason: str) -> None:
        """Say that the relay is away; the bar stays where it was."""
        self._bars.update(self._bar, state="unknown", note=terminal_safe(reason))


class LineDisplay:
    """For logs: a line when the state or the trouble changes, never one per poll."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._last: tuple[str, str] | None = None

    def show(self, progress: Progress, rate: float) -> None:
        """Write a line when something other than a number has changed."""
        state = (progress.status, progress.held_up_by)
        if state != self._last:
            self._last = state
            held = f" ({progress.held_up_by})" if progress.held_up_by else ""
            self._out.remark(f"{progress.status.lower()}{held}: {describe(progress, rate)}")

    def away(self, reason: str) -> None:
        """Write one line for each new reason."""
        if self._last != ("away", reason):
            self._last = ("away", reason)
            self._out.remark(f"waiting for the relay: {reason}")


@contextmanager
def display_for(out: Output) -> Iterator[Display]:
    """The display that fits where standard error goes: a bar, lines, or nothing for JSON."""
    if out.is_json:
        yield Silent()
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        terminal = console(stderr=True)
        state = TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True, min_width=LONGEST))
        note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        # The numbers say more than the bar where there is no room for both.
        columns = (state, BarColumn(bar_width=24), note) if terminal.width >= WIDE else (state, note)
        with RichProgress(*columns, console=terminal, transient=True) as bars:
            yield BarDisplay(bars)
    else:
        yield LineDisplay(out)
