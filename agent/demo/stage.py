"""What the audience of the demonstration sees: lines, and a progress bar where there is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from agent.cli.output import console
from protocol.terminal import terminal_safe, terminal_safe_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_INTERVAL = 2.0


class Stage:
    """Writes to standard output. Without a terminal, progress is a line now and then."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._last = 0.0

    def say(self, text: str) -> None:
        """Write one line or several."""
        safe = terminal_safe_lines(text)
        if self._bars is not None:
            self._bars.console.print(safe, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(safe)

    def show(self, done: int, line: str) -> None:
        """Show how far the transfer is."""
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=done, note=terminal_safe(line))
        elif time.monotonic() - self._last >= LINE_INTERVAL:
            self._last = time.monotonic()
            click.echo(f"  {terminal_safe(line.rstrip())}")

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """Show a bar for so many bytes inside the block, where there is a terminal."""
        if not sys.stdout.isatty():
            yield
            return
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        with Bars(BarColumn(bar_width=24), note, console=console(), transient=True) as bars:
            self._bars, self._bar = bars, bars.add_task("", total=total, note="")
            try:
                yield
            finally:
                self._bars = self._bar = None
