"""What the tray shows for a status of the agent: colour, one line, menu. Plain data, no window system."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent.quantities import human_bytes
from protocol.control import FINAL_STATES
from protocol.terminal import terminal_safe

Look = Literal["off", "idle", "busy", "paused", "trouble"]
MAX_ROWS = 8
# States of tasks that do nothing now and go on by themselves.
_WAITING = ("WAITING", "QUEUED")
MAX_LINE = 70
# Whoever sees this menu owns the machine that the transfers of the list come to.
_WHO = {"destination owner": "you", "you": "whoever submitted it"}
_AWAY, _FAILED = "Not connected to the relay", "A transfer failed"
_MERE_NEWS = {_AWAY, _FAILED}


@dataclass(frozen=True)
class Entry:
    """One line of the menu: a text, what a click does (empty: nothing), and lines below it."""

    text: str
    action: str = ""
    argument: str = ""
    below: tuple[Entry, ...] = ()


SEPARATOR = Entry("-")


@dataclass(frozen=True)
class View:
    """Everything the tray shows."""

    look: Look
    title: str
    menu: tuple[Entry, ...]


def view_of(status: Mapping[str, Any] | None, relay_url: str = "", seen: Collection[str] = ()) -> View:
    """The view of a status document; None when the agent does not answer. ``seen`` are tasks whose failure the user has
    taken note of: they trouble nobody any more, although the agent keeps them until the relay has closed them."""
    if status is None:
        start = Entry("Start the agent", "start")
        return View("off", "Towpath: the agent does not run", (Entry("The agent does not run"), start, SEPARATOR, QUIT))
    try:
        return _view_of(status, relay_url, seen)
    except (KeyError, TypeError, ValueError, AttributeError):
        # An agent of another version than this menu, which may have been running for weeks.
        sentence = "The agent answers in a way this menu does not know"
        return View(
            "trouble", f"Towpath: {sentence}"[:MAX_LINE], (Entry(sentence), Entry("Start it anew"), SEPARATOR, QUIT)
        )


def _view_of(status: Mapping[str, Any], relay_url: str, seen: Collection[str]) -> View:
    active = [task for task in status["tasks"] if task["state"] == "ACTIVE"]
    problems, failed = problems_of(status, seen), failed_tasks(status, seen)
    stopped = bool(status["paused"] or status.get("draining"))
    held = bool(stopped or status.get("held_back"))
    look: Look = "trouble" if problems else "paused" if held else "busy" if active else "idle"
    title = _title(status, len(active), problems)
    menu = [
        Entry(title),
        SEPARATOR,
        *_transfers(active, [] if stopped else _held(status)),
        Entry("Let transfers go on", "resume") if stopped else Entry("Pause transfers", "pause"),
        SEPARATOR,
        Entry("Shared folders", below=_folders(status) or (Entry("none"),)),
        *([Entry(f"Recent problems ({len(problems)})", below=tuple(problems))] if problems else []),
        *([Entry("I have seen what failed", "seen", " ".join(failed))] if failed else []),
        *([Entry(f"Install version {status['update_available']}", "update")] if status.get("update_available") else []),
        SEPARATOR,
        Entry("Open web page", "web", relay_url or status["link"]["relay_url"]),
        Entry("Sign in…", "sign-in", relay_url or status["link"]["relay_url"]),
        Entry("Stop the agent", "stop"),
        QUIT,
    ]
    return View(look, f"Towpath: {title}"[:MAX_LINE], tuple(menu))


QUIT = Entry("Quit this menu", "quit")


def _title(status: Mapping[str, Any], active: int, problems: list[Entry]) -> str:
    if status["paused"]:
        return "paused"
    if status.get("draining"):
        return f"{active} to finish, nothing new begins" if active else "nothing new begins"
    if status.get("held_back"):
        return _short(status["held_back"])
    if active:
        return f"{active} transfer{'s' if active != 1 else ''} running"
    if problems:
        # Being without a network, in a train, needs nobody; nor can anybody mend what has failed.
        return problems[0].text if {entry.text for entry in problems} <= _MERE_NEWS else "something needs you"
    waiting = sum(task["state"] in _WAITING and not _is_held(task) for task in status["tasks"])
    if waiting:
        return f"{waiting} transfer{'s wait' if waiting != 1 else ' waits'}"
    held = len(_held(status))
    if held:
        return f"{held} transfer{'s are' if held != 1 else ' is'} paused"
    if not status["link"]["connected"]:
        return "not connected"
    # Missing where the agent is older than this menu.
    return "others read from here" if status.get("transfer", {}).get("sessions") else "nothing to do"


def _transfers(active: list[Mapping[str, Any]], held: list[Mapping[str, Any]]) -> list[Entry]:
    rows = [
        *_rows(active, "", ("Pause this one", "pause-task"), "more"),
        *_rows(held, "Paused: ", ("Let this one go on", "resume-task"), "more that are paused"),
    ]
    return [*rows, SEPARATOR] if rows else []


def _rows(tasks: list[Mapping[str, Any]], prefix: str, button: tuple[str, str], more: str) -> Iterator[Entry]:
    """As many as a menu shows, each with what a click below it does."""
    for task in tasks[:MAX_ROWS]:
        below = (Entry(_short(f"Task {task['task_id']}")), Entry(*button, task["task_id"]))
        yield Entry(_short(f"{prefix}{_progress(task)}"), below=below)
    if len(tasks) > MAX_ROWS:
        yield Entry(f"and {len(tasks) - MAX_ROWS} {more}")


def _progress(task: Mapping[str, Any]) -> str:
    counters = task["counters"]
    done, total = counters["bytes_transferred"], counters["bytes_total"]
    share = f"{100 * done // total} % of " if total and counters["scan_complete"] else ""
    rate = f", {human_bytes(task['rate'])}/s" if task.get("rate") else ""
    return f"{share}{human_bytes(total)}, {counters['files_transferred']} of {counters['files']} files{rate}"


def _is_held(task: Mapping[str, Any]) -> bool:
    """Whether the owner of this machine has paused it; a source's owner does that, too."""
    ours = task.get("status_code") == "PAUSED_BY_OWNER" and task.get("who") == "destination owner"
    return ours and task["state"] not in FINAL_STATES


def _held(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [task for task in status["tasks"] if _is_held(task)]


def _folders(status: Mapping[str, Any]) -> tuple[Entry, ...]:
    rows = []
    for collection in status["collections"][:MAX_ROWS]:
        how = "" if collection["available"] else " (not available)"
        rows.append(Entry(_short(f"{collection['name']}{how}"), "folder", collection["id"]))
    return tuple(rows)


def failed_tasks(status: Mapping[str, Any], seen: Collection[str] = ()) -> list[str]:
    """Ids of the tasks that have failed and that the user has not taken note of."""
    return [task["task_id"] for task in status["tasks"] if task["state"] == "FAILED" and task["task_id"] not in seen]


def problems_of(status: Mapping[str, Any], seen: Collection[str] = ()) -> list[Entry]:
    """What is wrong, each with what to do about it below."""
    rows = []
    if not status["link"]["connected"] and status["link"]["last_error"]:
        rows.append(_problem(_AWAY, status["link"]["last_error"]))
    if status.get("config_problem"):
        rows.append(_problem("The configuration has a mistake", status["config_problem"]))
    for collection in status["collections"]:
        if not collection["available"]:
            rows.append(_problem(f"{collection['name']} is not available", collection["reason"]))
    for task in status["tasks"]:
        if task["state"] == "FAILED" and task["task_id"] not in seen:
            rows.append(_problem(_FAILED, task["status_sentence"] or task["error_code"]))
        elif task["state"] not in FINAL_STATES and task.get("who") and not _is_held(task):
            who = _WHO.get(task["who"], f"the {task['who']}")
            rows.append(_problem(f"A transfer waits for {who}", task["status_sentence"]))
    return rows[:MAX_ROWS]


def _problem(what: str, sentence: str) -> Entry:
    words, lines = terminal_safe(sentence).split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > MAX_LINE and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return Entry(_short(what), below=tuple(Entry(line) for line in lines[:6]))


def _short(text: str) -> str:
    plain = terminal_safe(text)
    return plain if len(plain) <= MAX_LINE else plain[: MAX_LINE - 1] + "…"
