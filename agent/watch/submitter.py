"""Submits what watch rules hand over, with the owner's own credentials: the `towpath` command in a process of its own.

The agent itself has no rights at the relay, and the libraries that speak its API stay out of the agent's memory.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from agent.exit_codes import ExitCode
from agent.watch.ledger import Batch
from protocol.errors import RetryLater, TowpathError
from protocol.names import escape

PATIENCE = 120.0
FINAL = ("SUCCEEDED", "FAILED")


class SubmissionRefused(TowpathError):
    """The relay will not take it as it is: the rule, its rights or its destination have to change."""

    default_code = "WATCH_REFUSED"


@dataclass(frozen=True)
class Outcome:
    """A task as the relay sees it."""

    status: str
    sentence: str
    skipped: int


class Submitter(Protocol):
    """Where batches go."""

    async def submit(self, batch: Batch, source: str, folder: str, destination: str, options: Sequence[str]) -> str:
        """Submit a batch as one task; its id. The same batch again is the same task. Raises `RetryLater` or
        `SubmissionRefused`."""

    async def look(self, task: str) -> Outcome:
        """How the task is. Raises `RetryLater` or `SubmissionRefused`."""


class CommandSubmitter:
    """Runs `towpath transfer` and `towpath task show`."""

    async def submit(self, batch: Batch, source: str, folder: str, destination: str, options: Sequence[str]) -> str:
        """See `Submitter`."""
        lines = [
            shlex.join(["--no-recursive", _joined(folder, "/".join(map(escape, item.path))), item.destination])
            for item in batch.items
        ]
        command = ["transfer", source, destination, "--batch", "-", "--submission-id", batch.submission]
        command += ["--label", f"Watch {batch.rule}"[:128], "--preserve-timestamp", *options]
        document = await self._run(command, "\n".join(lines) + "\n")
        return str(document["task_id"])

    async def look(self, task: str) -> Outcome:
        """See `Submitter`."""
        document = await self._run(["task", "show", task], "")
        error = document.get("fatal_error") or {}
        sentence = str(error.get("description") or document.get("nice_status_details") or "")
        return Outcome(str(document["status"]), sentence, int(document.get("subtasks_skipped_errors") or 0))

    async def _run(self, arguments: Sequence[str], text: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "agent", *arguments, "--format", "json"]
        with trio.move_on_after(PATIENCE):
            try:
                result = await trio.run_process(
                    command, stdin=text.encode(), capture_stdout=True, capture_stderr=True, check=False
                )
            except OSError as error:
                # No process or descriptor is to be had.
                raise RetryLater(f"The command could not be started: {error.strerror or error}.") from error
            return _document(result)
        raise RetryLater("The relay did not answer in time.")


def _joined(folder: str, path: str) -> str:
    return f"{folder.rstrip('/')}/{path}"


def _document(result: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    said = result.stderr.decode("utf-8", "replace").strip().removeprefix("towpath: ")[-1000:]
    if result.returncode == ExitCode.USAGE:
        raise SubmissionRefused(said or "The command was not understood.")
    try:
        document = json.loads(result.stdout)
        if result.returncode == ExitCode.DONE and isinstance(document, dict):
            return document
    except ValueError:
        pass
    # Not signed in, no right, relay away: all of these may be mended without touching the rule.
    raise RetryLater(said or f"The command ended with code {result.returncode}.")
