"""Waiting for a task: watch it until it ends, needs somebody, or the time is up, and say with which exit code.

The task does not depend on the watcher. Ctrl-C only detaches, and a relay that is away is waited for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.cli.output import Output, person, sentence
from agent.cli.progress import Display, RateMeter, beside, progress_of
from agent.cli.screen import display_for
from agent.exit_codes import ExitCode, final_exit_code, needs_attention, who_can_mend

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

FIRST_INTERVAL = 0.25
MAX_TROUBLES = 3


class RelayAway(Exception):
    """The relay could not be asked this time; the task may well be going on."""


@dataclass(frozen=True)
class Waited:
    """How a wait ended, and the last document seen."""

    code: ExitCode
    task: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Patience:
    """How long and how often. ``timeout`` None waits for ever; ``despite_attention`` waits also for people."""

    timeout: float | None = None
    interval: float = 1.0
    despite_attention: bool = False


def wait_for_task(
    fetch: Callable[[], Mapping[str, Any]],
    patience: Patience,
    display: Display,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Waited:
    """Ask again and again until the task's outcome is known. ``fetch`` raises `RelayAway` for passing trouble."""
    started = clock()
    meter = RateMeter()
    interval = min(FIRST_INTERVAL, patience.interval)
    task: Mapping[str, Any] = {}
    while True:
        try:
            task = fetch()
        except RelayAway as reason:
            display.away(str(reason))
        else:
            progress = progress_of(task)
            meter.note(progress.bytes_done, clock())
            display.show(progress, meter.rate())
            code = final_exit_code(task)
            if code is not None:
                return Waited(code, task)
            if needs_attention(task) and not patience.despite_attention:
                return Waited(ExitCode.NEEDS_ATTENTION, task)
        rest = None if patience.timeout is None else patience.timeout - (clock() - started)
        if rest is not None and rest <= 0:
            return Waited(ExitCode.TIMED_OUT, task)
        sleep(interval if rest is None else min(interval, rest))
        # Short tasks are answered quickly, long ones ask little.
        interval = min(interval * 2, patience.interval)


def fetch_task(relay: Relay, task_id: str) -> Mapping[str, Any]:
    """One task document; passing trouble with the relay becomes `RelayAway`, everything else is raised."""
    from globus_sdk import GlobusAPIError, NetworkError

    from agent.cli.failures import api_sentence, network_sentence
    from agent.cli.output import fail

    try:
        document = relay.transfer.get_task(task_id).data
    except NetworkError as error:
        raise RelayAway(
            network_sentence(error.underlying_exception, relay.profile.relay_url, relay.profile.ca_file)
        ) from error
    except GlobusAPIError as error:
        if error.http_status in (429, 500, 502, 503, 504):
            raise RelayAway(api_sentence(error)) from error
        raise
    if not isinstance(document, Mapping):
        fail("The relay answered in a form that cannot be read.")
    return document


def detach_sentence(task_id: str) -> str:
    """What to tell a user who stops watching."""
    return (
        f"Stopped watching; the task goes on. `towpath task wait {task_id}` watches it again, "
        f"`towpath task cancel {task_id}` stops it."
    )


def outcome_sentence(task_id: str, waited: Waited) -> str:
    """One sentence about how the wait ended, with the next step where there is one."""
    task = waited.task
    details = str(task.get("nice_status_details") or task.get("nice_status_short_description") or "")
    match waited.code:
        case ExitCode.DONE:
            return f"Task {task_id} is done{_deleted(task)}{_links_left_out(task)}."
        case ExitCode.PARTIAL:
            count = task.get("subtasks_skipped_errors")
            left_out = "1 item was" if count == 1 else f"{count} items were"
            return f"Task {task_id} is done{_deleted(task)}{_links_left_out(task)}, but {left_out} left out."
        case ExitCode.CANCELED:
            return f"Task {task_id} was cancelled."
        case ExitCode.TIMED_OUT:
            return f"Time is up and the task goes on; `towpath task wait {task_id}` watches it again."
        case ExitCode.NEEDS_ATTENTION:
            who = who_can_mend(task)
            reason = details or task.get("nice_status") or "it is paused"
            return f"Task {task_id} needs attention{f' of {person(who)}' if who else ''}: {reason}"
        case _:
            error = task.get("fatal_error")
            reason = error.get("description") if isinstance(error, Mapping) else details
            return f"Task {task_id} failed: {sentence(str(reason or 'no reason was given'))}"


def _deleted(task: Mapping[str, Any]) -> str:
    """What a mirror has deleted, which nothing else of its numbers tells."""
    count = beside(task).get("deleted") if task.get("delete_destination_extra") else None
    return "" if count is None else f", {count} deleted at the destination"


def _links_left_out(task: Mapping[str, Any]) -> str:
    """Symlinks that are not at the destination though nobody chose that: it is so where nothing is said of them."""
    if task.get("recursive_symlinks") != "ignore":
        return ""
    count = int(task.get("symlinks") or 0) - int(beside(task).get("symlinks_transferred") or 0)
    if count <= 0 or "symlinks_transferred" not in beside(task):
        return ""
    return f", {count} symlink{'' if count == 1 else 's'} left out (see `towpath transfer --symlinks`)"


def troubles(relay: Relay, task_id: str) -> list[str]:
    """The first things that went wrong with a finished task, for people, and where to read on."""
    rows = list(itertools.islice(relay.transfer.task_skipped_errors(task_id), MAX_TROUBLES))
    shown = [f"  {_path_of(row)}: {row.get('error_details') or row.get('error_code')}" for row in rows]
    if not shown:
        return [f"  `towpath task event-list {task_id}` tells more."]
    return [*shown, f"  `towpath task show --skipped-errors {task_id}` lists them all."]


def _path_of(row: Mapping[str, Any]) -> object:
    """What a skipped error is about; what a mirror could not remove is at the destination only."""
    return row.get("source_path") or row.get("destination_path")


def watch(relay: Relay, out: Output, task_id: str, patience: Patience) -> Waited:
    """Wait for a task with a live display where there is a terminal. Ctrl-C detaches: exit code 130."""
    try:
        with display_for(out) as display:
            waited = wait_for_task(lambda: fetch_task(relay, task_id), patience, display)
    except KeyboardInterrupt:
        out.remark(detach_sentence(task_id))
        return Waited(ExitCode.INTERRUPTED)
    return waited
