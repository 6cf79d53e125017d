"""How results are written: for people or as JSON. Commands say what they found, this module how it looks.

Text that may come from a peer is made safe in here (`protocol.terminal`), so that no command can forget it.
On a terminal tables are drawn by rich; into a pipe they are plain columns, never cut or wrapped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn

import click

from agent.exit_codes import ExitCode
from protocol.terminal import ends_shown, terminal_safe, terminal_safe_lines

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["text", "json"]


class CommandFailed(click.ClickException):
    """A command cannot go on: one sentence for the user with the next step, and the exit code to end with."""

    def __init__(self, sentence: str, exit_code: ExitCode = ExitCode.OTHER) -> None:
        super().__init__(terminal_safe_lines(sentence))
        self.code = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the sentence to standard error."""
        click.echo(f"towpath: {self.message}", err=True)


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading and how to get its cell from a row."""

    heading: str
    cell: Callable[[Mapping[str, Any]], object]
    right: bool = False
    # Never folded, however narrow the terminal: people copy it into the next command.
    whole: bool = False


def person(who: str) -> str:
    """Somebody who can mend something, as people say it: "destination owner" is "the destination's owner"."""
    whose, _, role = who.partition(" ")
    return f"the {whose}'s {role}" if role else who


def field(heading: str, key: str, *, right: bool = False, whole: bool = False) -> Column:
    """A column that shows one key of the row; a missing or null value is shown as a dash."""
    return Column(heading, lambda row: "-" if row.get(key) is None else row[key], right, whole)


def moment(heading: str, key: str) -> Column:
    """A column with a time of the service (UTC) to the second, short enough for a terminal."""
    return Column(heading, lambda row: str(row.get(key) or "-")[:19].replace("T", " "))


@dataclass(frozen=True)
class Output:
    """Where a command puts its result: standard output in the asked format, remarks to standard error."""

    format: Format = "text"

    @property
    def is_json(self) -> bool:
        """Whether the caller asked for a JSON document."""
        return self.format == "json"

    def document(self, document: object) -> None:
        """Write one JSON document. Only ASCII leaves, so names in it cannot act on a terminal either."""
        click.echo(json.dumps(document, indent=2, ensure_ascii=True))

    def line(self, text: object) -> None:
        """Write one line of text, made safe."""
        click.echo(terminal_safe(text))

    def remark(self, text: object) -> None:
        """Write one line to standard error: what is going on, never the result itself."""
        click.echo(terminal_safe(text), err=True)

    def result(self, document: Mapping[str, Any], text: object) -> None:
        """Write a result: the document as JSON, or the sentence for people."""
        if self.is_json:
            self.document(document)
        else:
            self.line(text)

    def record(self, document: Mapping[str, Any], rows: Sequence[tuple[str, object]]) -> None:
        """Write one object: as JSON in full, or as aligned ``name: value`` lines."""
        if self.is_json:
            self.document(document)
            return
        width = max((len(name) for name, _ in rows), default=0) + 1
        for name, value in rows:
            self.line(f"{name + ':':<{width}} {'-' if value is None else value}")

    def table(self, document: object, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
        """Write many objects of one kind: the whole document as JSON, or one row each."""
        if self.is_json:
            self.document(document)
            return
        cells = [[terminal_safe(ends_shown(column.cell(row))) for column in columns] for row in rows]
        if sys.stdout.isatty():
            _rich_table(cells, columns)
        else:
            for line in _plain_table(cells, columns):
                click.echo(line)


def _plain_table(cells: Sequence[Sequence[str]], columns: Sequence[Column]) -> list[str]:
    """Aligned columns two blanks apart, the last one unpadded."""
    lines = [[column.heading for column in columns], *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def _rich_table(cells: Sequence[Sequence[str]], columns: Sequence[Column]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", overflow="fold")
    for row in cells:
        # Text, not str: a name like "[red]" is a name, not markup.
        table.add_row(*(Text(cell) for cell in row))
    terminal = console()
    # What it takes with nothing folded.
    width = terminal.measure(table, options=terminal.options.update(max_width=sys.maxsize)).maximum
    if width > terminal.width and any(column.whole for column in columns):
        # The terminal wraps whole lines, so that an id stays one word.
        for line in _plain_table(cells, columns):
            click.echo(line)
    else:
        terminal.print(table)


def console(*, stderr: bool = False) -> Console:
    """A rich console that takes what it is given literally."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=False)


def fail(sentence: str, exit_code: ExitCode = ExitCode.OTHER) -> NoReturn:
    """End the command with one sentence and an exit code."""
    raise CommandFailed(sentence, exit_code)


def confirm(question: str) -> None:
    """Ask before something is lost; without a yes the command ends, and nothing is changed."""
    try:
        agreed = click.confirm(question, err=True)
    except click.exceptions.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
        fail("Nobody answered, and nothing was changed; --yes goes on without asking.")
    if not agreed:
        fail("Nothing was changed.")


def sentence(text: str) -> str:
    """A text that ends as sentences do."""
    return text if text.endswith((".", "!", "?")) else text + "."
