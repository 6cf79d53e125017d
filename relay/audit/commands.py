"""Entries for what the operator does at the command line."""

from __future__ import annotations

import os
import time

import click

from relay.audit.trail import Entry

# Commands that only show something.
_SHOWING = frozenset({"list", "show", "check", "export", "verify"})


def command_entry(context: click.Context) -> Entry | None:
    """What to record of the command that is running; None for one that only shows something.

    Its options hold no secrets, because commands never take secrets from the command line.
    """
    words = context.command_path.split()[1:]
    if not words or words[-1] in _SHOWING:
        return None
    given = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in context.params.items()
        if value not in (None, False, (), "") and name != "as_json"
    }
    user = os.environ.get("SUDO_USER") or os.environ.get("USER") or str(os.getuid())
    return Entry(
        time=time.time(), action=" ".join(words), outcome="done", origin=f"command line, user {user}", facts=given
    )
