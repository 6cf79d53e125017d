"""Entries for what the operator does at the command line."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace

import click
from sqlalchemy import Connection

from protocol.errors import TowpathError
from relay.audit import trail
from relay.audit.trail import Entry
from relay.user_names import user_name

# Commands that only show something.
_SHOWING = frozenset({"list", "show", "check", "export", "verify", "serve", "doctor"})


def command_entry(context: click.Context) -> Entry | None:
    """What to record of the command that is running; None for one that only shows something.

    Its options hold no secrets, because commands never take secrets from the command line.
    """
    words = context.command_path.split()[1:]
    if not words or words[-1] in _SHOWING:
        return None
    given = {
        name: _text(value)
        for name, value in context.params.items()
        if value not in (None, False, (), "") and name != "as_json"
    }
    user = os.environ.get("SUDO_USER") or os.environ.get("USER") or user_name(os.getuid())
    return Entry(
        time=time.time(), action=" ".join(words), outcome="done", origin=f"command line, user {user}", facts=given
    )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value.name) if isinstance(value, io.IOBase) and hasattr(value, "name") else str(value)


class CommandRecord:
    """Whether a command's entry was written already: once, in the first transaction that changes something."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.written = False

    def accompany(self, connection: Connection, _result: object) -> None:
        """Write the entry in a transaction of the command."""
        if not self.written:
            trail.append(connection, [self.entry])
            self.written = True

    def failure(self, error: Exception) -> Entry:
        """The entry of a command that failed. An error of unknown kind is told by its kind alone."""
        if isinstance(error, TowpathError):
            reason = error.sentence
        elif isinstance(error, click.ClickException):
            reason = error.format_message()
        else:
            reason = type(error).__name__
        return replace(self.entry, outcome="failed", facts={**self.entry.facts, "reason": reason})
