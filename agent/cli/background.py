"""The agent as a process apart: starting it detached, waiting until it serves, seeing it end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from agent import local_socket
from agent.cli.output import CommandFailed
from agent.config.keys import AgentConfig
from agent.lock import Holder, holder_of
from agent.sdnotify import VARIABLE
from agent.update.supervisor import DETACHED

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0
LOG_FILE = "agent.log"
TAIL = 2000


def start_detached(config_file: Path, config: AgentConfig) -> int:
    """Start the agent in a session of its own; returns its process id once it is ready. Raises `CommandFailed`."""
    log = config.state_dir / LOG_FILE
    logged = log.stat().st_size if log.exists() else 0
    with tempfile.TemporaryDirectory(prefix="towpath-") as folder:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.closing(channel), open(f"{folder}/output", "w+b") as output:
            # The agent says that it is ready as it says it to a service manager.
            channel.bind(f"{folder}/ready")
            channel.settimeout(0.2)
            process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--config", str(config_file), "--log-file", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, VARIABLE: f"{folder}/ready", DETACHED: "1"},
                start_new_session=True,
            )
            _wait_ready(process, channel, log, lambda: _said(Path(output.name), 0) + _said(log, logged))
    return process.pid


def _said(file: Path, since: int) -> str:
    """What was written to a file since it had this size; the end of it."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        stream.seek(max(since, stream.seek(0, os.SEEK_END) - TAIL))
        return stream.read(TAIL).decode("utf-8", "replace").strip().removeprefix("towpath: ")
    return ""


def _wait_ready(process: subprocess.Popen[bytes], channel: socket.socket, log: Path, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in channel.recv(4096):
                return
        if process.poll() is not None:
            raise CommandFailed(f"The agent ended with code {process.returncode}; its log is {log}. {said()}")
    process.terminate()
    raise CommandFailed(f"The agent did not become ready within {START_TIMEOUT:g} seconds; its log is {log}.")


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
            os.kill(holder.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT
    while holder_of(state_dir) is not None:
        if time.monotonic() > deadline:
            raise CommandFailed(f"The agent (process {holder.pid}) has not ended within {STOP_TIMEOUT:g} seconds.")
        time.sleep(0.05)
    return holder
