"""The agent as a process apart: starting it detached, waiting until it serves, seeing it end."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent import local_socket
from agent.cli.output import CommandFailed, person
from agent.config.keys import AgentConfig
from agent.lock import Holder, holder_of
from agent.sdnotify import VARIABLE
from agent.system.processes import detached, tell_to_end
from agent.update.supervisor import DETACHED
from protocol.errors import TowpathError
from protocol.terminal import terminal_safe

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0
LOOK_EVERY = 0.2
LOG_FILE = "agent.log"
TAIL = 2000
DRAIN_LOOK = 1.0


def start_detached(config_file: Path, config: AgentConfig) -> int:
    """Start the agent in a session of its own; returns its process id once it is ready. Raises `CommandFailed`."""
    log = config.state_dir / LOG_FILE
    logged = log.stat().st_size if log.exists() else 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="towpath-"))
        is_ready, environment = stack.enter_context(_readiness(config.state_dir, folder))
        with open(f"{folder}/output", "w+b") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--config", str(config_file), "--log-file", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, DETACHED: "1", **environment},
                **detached(),
            )
            _wait_ready(process, is_ready, log, lambda: _said(Path(output.name), 0) + _said(log, logged))
    return process.pid


@contextlib.contextmanager
def _readiness(state_dir: Path, folder: str) -> Iterator[tuple[Callable[[], bool], dict[str, str]]]:
    """How to learn that the agent is ready (waits for a moment), and what it has to be told for that."""
    if hasattr(socket, "AF_UNIX"):
        # The agent says that it is ready as it says it to a service manager.
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.closing(channel):
            channel.bind(f"{folder}/ready")
            channel.settimeout(LOOK_EVERY)
            yield functools.partial(_heard_ready, channel), {VARIABLE: f"{folder}/ready"}
    else:
        yield functools.partial(_answers, state_dir), {}


def _heard_ready(channel: socket.socket) -> bool:
    with contextlib.suppress(TimeoutError):
        return b"READY=1" in channel.recv(4096)
    return False


def _answers(state_dir: Path) -> bool:
    try:
        local_socket.ask(state_dir, "GET", "/status")
    except TowpathError:
        time.sleep(LOOK_EVERY)
        return False
    return True


def _said(file: Path, since: int) -> str:
    """What was written to a file since it had this size; the end of it."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        stream.seek(max(since, stream.seek(0, os.SEEK_END) - TAIL))
        return stream.read(TAIL).decode("utf-8", "replace").strip().removeprefix("towpath: ")
    return ""


def _wait_ready(
    process: subprocess.Popen[bytes], is_ready: Callable[[], bool], log: Path, said: Callable[[], str]
) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if is_ready():
            return
        if process.poll() is not None:
            raise CommandFailed(f"The agent ended with code {process.returncode}; its log is {log}. {said()}")
    process.terminate()
    raise CommandFailed(f"The agent did not become ready within {START_TIMEOUT:g} seconds; its log is {log}.")


def drained(state_dir: Path, say: Callable[[str], None], timeout: float | None) -> list[dict[str, Any]] | None:
    """Have the running agent begin nothing new, and wait until what has begun is finished, which may take days, but
    not for tasks that wait for a person, nor for longer than ``timeout`` (seconds). None when no agent runs, else what
    has not finished, as `towpath status` shows tasks. ``say`` is told now and then what is waited for, and in the end
    what is not. Raises `TowpathError`."""
    said, ends = "", math.inf if timeout is None else time.monotonic() + timeout
    try:
        local_socket.ask(state_dir, "POST", "/drain")
        status = local_socket.ask(state_dir, "GET", "/status")
        while not _is_drained(status) and time.monotonic() < ends:
            transfer = status["transfer"]
            sentence = f"{transfer['running']} task(s) run here and {transfer['sessions']} read from here."
            if sentence != said:
                say(f"Nothing new begins. {sentence}")
                said = sentence
            time.sleep(min(DRAIN_LOOK, max(0.0, ends - time.monotonic())))
            status = local_socket.ask(state_dir, "GET", "/status")
    except local_socket.NotRunning:
        return None
    if not _is_drained(status):
        say("The time is up; what still runs goes on after the next start.")
    unfinished = [task for task in status["tasks"] if task["state"] in ("ACTIVE", "WAITING")]
    for task in unfinished:
        if task["state"] == "WAITING" and task.get("needs_person"):
            why = task["status_sentence"] or task["status_code"]
            say(f"Not waited for: task {task['task_id']} waits for {person(task['who'])}. {terminal_safe(why)}")
    return unfinished


def _is_drained(status: dict[str, Any]) -> bool:
    # An agent of before that still runs does not tell who waits for people.
    return bool(status.get("drained", status["idle"]))


def stop_running(state_dir: Path) -> Holder | None:
    """Ask the running agent to end and wait until it has; None when none runs. Raises `CommandFailed`."""
    holder = holder_of(state_dir)
    if holder is None:
        return None
    if holder.host != socket.gethostname():
        raise CommandFailed(f"The agent runs on host {holder.host} (process {holder.pid}); stop it there.")
    try:
        local_socket.ask(state_dir, "POST", "/stop")
    except local_socket.NotRunning as error:
        # It holds the lock but does not answer: starting, ending, or stuck.
        if holder.pid <= 0:
            raise CommandFailed(error.sentence) from error
        with contextlib.suppress(ProcessLookupError):
            tell_to_end(holder.pid)
    deadline = time.monotonic() + STOP_TIMEOUT
    while holder_of(state_dir) is not None:
        if time.monotonic() > deadline:
            raise CommandFailed(f"The agent (process {holder.pid}) has not ended within {STOP_TIMEOUT:g} seconds.")
        time.sleep(0.05)
    return holder
