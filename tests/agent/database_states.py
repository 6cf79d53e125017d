"""What a SQLite database may be after the power failed, and whether it still has what somebody was told before.

A *fact* is something that was promised at some moment: whoever was told of it may rely on it for ever. Each crash state
of a trace (`disk_trace`) is opened by the program that owns it, and must hold every fact that was told before the last
call of that state began.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.agent.disk_trace import CrashState, Trace, put

TREE = "database"


@dataclass(frozen=True)
class Fact:
    """What was told (a time of the day), and what it was about."""

    time: float
    kind: str
    value: str


# Looks into a database of a state: the kinds of facts that are not as they were told.
Look = Callable[[Path, Sequence[Fact]], list[str]]


def strace_trouble() -> str:
    """Why there can be no trace here, or nothing."""
    if shutil.which("strace") is None:
        return "needs strace (Debian: apt-get install strace)"
    tried = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


def told_by(trace: Trace, facts: Iterable[Fact], count: int) -> list[Fact]:
    """What was told before the last of so many operations began."""
    moment = trace.times[count - 1] if count else 0.0
    return [fact for fact in facts if fact.time < moment or count == len(trace.operations)]


def wrong_states(
    trace: Trace, facts: Sequence[Fact], states: Iterable[CrashState], base: Path, look: Look, *, stop_at_first: bool
) -> tuple[int, list[str]]:
    """How many different states there were, and what was wrong in them."""
    known: set[tuple[bytes, int]] = set()
    wrong: list[str] = []
    for state in states:
        told = told_by(trace, facts, state.count)
        if (key := (state.digest(), len(told))) in known:
            continue
        known.add(key)
        place = base / "state"
        put({path: row for path, row in state.trees[TREE].items() if not path.endswith(b"-shm")}, place)
        try:
            found = look(place, told)
        finally:
            shutil.rmtree(place)
        wrong += [f"{state.how}: {one}" for one in found]
        if wrong and stop_at_first:
            break
    return len(known), wrong


def broken_pages(path: Path) -> list[str]:
    """What SQLite's own check finds."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            answer = connection.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return [f"the database cannot be read: {error}"]
    return [] if answer == "ok" else [f"integrity check: {answer}"]
