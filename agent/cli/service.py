"""The commands that set up and run the agent of this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from agent.cli.output import CommandFailed
from agent.config import AgentConfig, default_config_file, load_config
from protocol.errors import TowpathError

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0

Command = TypeVar("Command", bound=Callable[..., Any])


def _config_option(command: Command) -> Command:
    option = click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="The agent's configuration file."
    )
    return option(command)


@click.command()
@click.argument("key", required=False)
@click.option("--setup-key-file", type=click.Path(path_type=Path), help="Read the one-time setup key from a file.")
@click.option("--root", required=True, help="The folder to offer as a collection.")
@click.option("--name", help="What to call the collection; the relay's name for it if not given.")
@click.option("--read-only", is_flag=True, help="Let others read, never write.")
@click.option("--sharing", is_flag=True, help="Allow guest collections on it.")
@click.option("--home", default="/", show_default=True, help="The folder inside the root that ~ stands for.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where the agent keeps its state.")
@click.option("--globus-files", is_flag=True, help="Also write ~/.globusonline/lta/client-id.txt.")
@_config_option
def setup(
    key: str | None,
    setup_key_file: Path | None,
    root: str,
    name: str | None,
    read_only: bool,
    sharing: bool,
    home: str,
    state_dir: Path | None,
    globus_files: bool,
    config_file: Path | None,
) -> None:
    """Enrol this machine with a one-time setup KEY, or add a collection to it.

    The key may also come from --setup-key-file or the environment variable TOWPATH_SETUP_KEY, where other users of
    the machine cannot see it.
    """
    from agent.enrol import Wish, find_setup_key, set_up, write_globus_files

    wish = Wish(root=root, name=name, read_only=read_only, shareable=sharing, home=home)
    try:
        found = find_setup_key(key, setup_key_file)
        outcome = set_up(found, wish, config_file or default_config_file(), state_dir)
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error
    if globus_files:
        write_globus_files(outcome.collection_id, Path.home())
    done = "was set up before with this key" if outcome.already else "is set up"
    click.echo(f"Collection {outcome.name} ({outcome.collection_id}) {done}: {outcome.root}")
    click.echo("Run the agent with `towpath start` (or `towpath run` in the foreground).")


@click.command()
@_config_option
def run(config_file: Path | None) -> None:
    """Run the agent in the foreground, until Ctrl-C or SIGTERM."""
    from agent import daemon

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "hypercorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        daemon.run(config_file or default_config_file())
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error


def _load(config_file: Path | None) -> tuple[Path, AgentConfig]:
    file = (config_file or default_config_file()).absolute()
    try:
        return file, load_config(file)
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error


@click.command()
@_config_option
def start(config_file: Path | None) -> None:
    """Start the agent in the background and wait until it serves."""
    from agent.identity_file import make_state_dir
    from agent.lock import holder_of

    file, config = _load(config_file)
    make_state_dir(config.state_dir)
    holder = holder_of(config.state_dir)
    if holder is not None:
        raise CommandFailed(f"The agent already runs as process {holder.pid} on {holder.host}.")
    log = config.state_dir / "agent.log"
    with (
        tempfile.TemporaryDirectory(prefix="towpath-") as folder,
        contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notify,
    ):
        notify.bind(f"{folder}/ready")
        notify.settimeout(0.2)
        process = _spawn(file, log, f"{folder}/ready")
        _wait_ready(process, notify, log)
    click.echo(f"The agent runs as process {process.pid}; its log is {log}.")


def _spawn(file: Path, log: Path, notify: str) -> subprocess.Popen[bytes]:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", "from agent.cli.main import main; main()", "run", "--config", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env={**os.environ, "NOTIFY_SOCKET": notify},
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def _wait_ready(process: subprocess.Popen[bytes], notify: socket.socket, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in notify.recv(4096):
                return
        if process.poll() is not None:
            raise CommandFailed(f"The agent ended with code {process.returncode}; see {log}.")
    process.terminate()
    raise CommandFailed(f"The agent did not become ready within {START_TIMEOUT:g} seconds; see {log}.")


@click.command()
@_config_option
def stop(config_file: Path | None) -> None:
    """Stop the agent; running transfers are settled and go on at the next start."""
    from agent import local_socket
    from agent.lock import holder_of

    _, config = _load(config_file)
    try:
        local_socket.ask(config.state_dir, "POST", "/stop")
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error
    deadline = time.monotonic() + STOP_TIMEOUT
    while holder_of(config.state_dir) is not None:
        if time.monotonic() > deadline:
            raise CommandFailed(f"The agent has not ended within {STOP_TIMEOUT:g} seconds.")
        time.sleep(0.05)
    click.echo("The agent has stopped.")


@click.command()
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@_config_option
def status(form: str, config_file: Path | None) -> None:
    """Say what the agent of this machine is doing."""
    from agent import local_socket

    _, config = _load(config_file)
    try:
        document = local_socket.ask(config.state_dir, "GET", "/status")
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error
    if form == "json":
        click.echo(json.dumps(document, indent=2))
        return
    link = document["link"]
    where = (
        f"linked to {link['relay_url']}" if link["connected"] else f"not linked: {link['last_error'] or 'connecting'}"
    )
    click.echo(f"Agent {document['version']}, process {document['pid']}, {where}")
    for row in document["collections"]:
        state = "available" if row["available"] else f"not available: {row['reason']}"
        click.echo(f"  collection {row['name']} ({row['id']}): {state}")
    for task in document["tasks"]:
        counters = task["counters"]
        held = "" if task["status_code"] in ("OK", "QUEUED") else f", {task['status_sentence'] or task['status_code']}"
        click.echo(
            f"  task {task['task_id']}: {task['state']}{held}, {counters['files_transferred']} files, "
            f"{counters['bytes_transferred']} bytes"
        )
