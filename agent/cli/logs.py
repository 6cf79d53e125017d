"""``towpath logs``: what the agent wrote, from its log file or from the journal of the service manager."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click

from agent.cli.background import LOG_FILE
from agent.cli.output import CommandFailed
from agent.cli.service import config_option
from protocol.terminal import terminal_safe

FOLLOW_EVERY = 0.5


@click.command()
@click.option(
    "-n", "--lines", type=click.IntRange(0, 1_000_000), default=200, show_default=True, help="The last lines."
)
@click.option("-f", "--follow", is_flag=True, help="Go on showing what is written, until Ctrl-C.")
@click.option("--journal", is_flag=True, help="Ask the journal of the user's service manager, not the log file.")
@config_option
def logs(lines: int, follow: bool, journal: bool, config_file: Path) -> None:
    """Show the agent's log."""
    from agent.config.layers import state_dir_of

    file = state_dir_of(config_file) / LOG_FILE
    # An agent that never ran here has written nothing into the journal either.
    if journal or (not file.exists() and file.parent.exists() and shutil.which("journalctl")):
        _journal(lines, follow)
        return
    if not file.exists():
        raise CommandFailed(f"There is no log at {file} yet; the agent has not been started yet (`towpath start`).")
    for line in last_lines(file, lines):
        click.echo(terminal_safe(line))
    if follow:
        for line in new_lines(file):
            click.echo(terminal_safe(line))


def _journal(lines: int, follow: bool) -> None:
    command = ["journalctl", "--user-unit", "towpath-agent", "--lines", str(lines), "--no-pager"]
    try:
        result = subprocess.run([*command, *(["--follow"] if follow else [])], check=False)
    except FileNotFoundError as error:
        raise CommandFailed("This system has no journal.") from error
    if result.returncode:
        raise CommandFailed("The journal could not be read.")


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines, reaching back into rotated files. Raises OSError."""
    kept: deque[str] = deque(maxlen=count)
    rotated = sorted(file.parent.glob(f"{file.name}.[0-9]*"), key=lambda path: -int(path.suffix[1:]))
    for path in [*rotated, file]:
        try:
            with path.open(encoding="utf-8", errors="replace") as stream:
                kept.extend(line.rstrip("\n") for line in stream)
        except FileNotFoundError:
            # Rotated away at this moment.
            continue
    return list(kept)


def new_lines(file: Path) -> Iterator[str]:
    """Lines as they are written, also after the file was rotated. Ends never."""
    at, part = file.stat().st_size, ""
    while True:
        with file.open(encoding="utf-8", errors="replace") as stream:
            stream.seek(at)
            while not _was_rotated(stream.fileno(), file):
                text = stream.readline()
                part += text
                if part.endswith("\n"):
                    yield part.rstrip("\n")
                    part = ""
                if not text:
                    time.sleep(FOLLOW_EVERY)
            # What came just before the rotation.
            for text in stream:
                part += text
                if part.endswith("\n"):
                    yield part.rstrip("\n")
                    part = ""
        at = 0


def _was_rotated(descriptor: int, file: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino != file.stat().st_ino
    except FileNotFoundError:
        return False
