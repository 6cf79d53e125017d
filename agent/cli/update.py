"""``towpath update``: look for an update, install it, go back to the version before."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from agent.cli.command import with_output
from agent.cli.output import CommandFailed, Output
from agent.cli.service import config_option, failing_plainly
from agent.update.supervisor import LAUNCHD_JOB
from protocol.errors import TowpathError
from protocol.subcommands import Subcommands

UNIT = "towpath-agent.service"


@click.group(cls=Subcommands)
def update() -> None:
    """Look for updates, install them, go back. Only where towpath was installed by install.sh."""


@update.command()
@with_output
def status(out: Output) -> None:
    """Say which version runs and what is known of updates."""
    import msgspec

    from agent.update.install import Installation

    with failing_plainly():
        installation = Installation.here()
        state = installation.state()
        document = {"running": installation.running(), **msgspec.to_builtins(state)}
    names = (("Running", "running"), ("Available", "available"), ("Before", "previous"), ("Problem", "last_problem"))
    rows = [(label, document[key] or None) for label, key in names]
    out.record(document, [*rows, ("Not well here", ", ".join(state.failed) or None)])


@update.command()
@config_option
@with_output
def check(out: Output, config_file: Path) -> None:
    """Ask whether there is a newer version."""
    with failing_plainly():
        _, _, offer = _offer(config_file)
    sentence = "This is the newest version." if offer is None else f"Version {offer.version} is there."
    out.result({"available": offer.version if offer else None}, sentence)


@update.command()
@config_option
def install(config_file: Path) -> None:
    """Install the newest version now. Running transfers are checkpointed and go on in it."""
    from agent.update.change import change
    from agent.update.service import fetch

    with failing_plainly():
        installation, mirror, offer = _offer(config_file)
        if offer is None:
            click.echo("This is the newest version.")
            return
        click.echo(f"Fetching version {offer.version}.")
        fetch(installation, mirror, offer)
        click.echo(change(installation, offer.version, LocalAgent(config_file, installation.current)))


@update.command(hidden=True)
@click.argument("version")
@config_option
def change(version: str, config_file: Path) -> None:
    """Change to a version that was unpacked; the agent calls this."""
    from agent.update.change import change as change_version
    from agent.update.install import Installation

    with failing_plainly():
        installation = Installation.here()
        click.echo(change_version(installation, version, LocalAgent(config_file, installation.current)))


@update.command()
@config_option
def back(config_file: Path) -> None:
    """Go back to the version before, and do not take the present one again by itself."""
    from agent.update.change import go_back
    from agent.update.install import Installation

    with failing_plainly():
        installation = Installation.here()
        agent = LocalAgent(config_file, installation.current)
        version = go_back(installation, agent, running=agent.status() is not None)
    click.echo(f"Version {version} is the current one again.")


def _offer(config_file: Path) -> Any:
    from agent.config.layers import load_config
    from agent.identity_file import load_identity
    from agent.update.install import Installation
    from agent.update.service import look, mirror_for

    installation = Installation.here()
    config = load_config(config_file)
    identity = load_identity(config.state_dir)
    url = config.relay.url or (identity.relay_url if identity else None)
    if url is None and config.update.mirror is None:
        raise CommandFailed("No relay and no mirror is configured; set update.mirror or run `towpath setup`.")
    mirror = mirror_for(installation, config, url or "")
    return installation, mirror, look(installation, mirror, config.update, time.time())


class LocalAgent:
    """The agent of this user, started by its service manager or in the background (`agent.update.change.Agent`)."""

    def __init__(self, config_file: Path, current: Path) -> None:
        from agent.config.layers import state_dir_of

        self._config_file = config_file
        self._command = current / "bin" / "towpath"
        self._state_dir = state_dir_of(config_file)
        status = self.status()
        self._managed = _managed(int(status["pid"]) if status else 0)
        self._launchd = _launchd_job()

    def status(self) -> dict[str, Any] | None:
        """Its status, None if it does not answer."""
        from agent import local_socket

        try:
            return local_socket.ask(self._state_dir, "GET", "/status")
        except TowpathError:
            return None

    def stop(self) -> None:
        """Have it end. Raises `TowpathError`."""
        from agent.cli.background import stop_running

        try:
            stop_running(self._state_dir)
        except CommandFailed as error:
            raise TowpathError(error.message) from error
        if self._managed:
            # It would be started again after a failure while the versions change.
            self._systemctl("stop")

    def start(self) -> None:
        """Start what is current now. Raises `TowpathError`."""
        if self._managed:
            self._systemctl("reset-failed", check=False)
            self._systemctl("start")
            return
        if self._launchd:
            _run_quietly(["launchctl", "kickstart", self._launchd])
            return
        command = [str(self._command), "start", "--config", str(self._config_file)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TowpathError(f"It does not start: {error}.") from error
        if result.returncode:
            raise TowpathError(f"It does not start: {result.stderr.strip()[-300:] or result.returncode}.")

    def _systemctl(self, verb: str, *, check: bool = True) -> None:
        result = subprocess.run(["systemctl", "--user", verb, UNIT], capture_output=True, text=True, check=False)
        if check and result.returncode:
            raise TowpathError(f"systemctl --user {verb} {UNIT} failed: {result.stderr.strip()[-300:]}.")


def _run_quietly(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise TowpathError(f"{' '.join(command)} failed: {result.stderr.strip()[-300:]}.")


def _launchd_job() -> str:
    """How launchd names the agent's job; empty where it does not run it."""
    if sys.platform == "darwin":
        job = f"gui/{os.getuid()}/{LAUNCHD_JOB}"
        if subprocess.run(["launchctl", "print", job], capture_output=True, check=False).returncode == 0:
            return job
    return ""


def _managed(pid: int) -> bool:
    """Whether the user's service manager runs the agent with this process id, and not another one of this user."""
    if not pid or not shutil.which("systemctl"):
        return False
    command = ["systemctl", "--user", "show", "--property=MainPID", "--value", UNIT]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.returncode == 0 and result.stdout.strip() == str(pid)
    return False
