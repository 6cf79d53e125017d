"""``towpath service``: have the user's service manager run the agent (systemd; launchd by `install.sh`)."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from agent.cli.output import CommandFailed
from agent.cli.service import config_option, failing_plainly
from protocol.subcommands import Subcommands

UNIT = "towpath-agent.service"
LABEL = "org.towpath.agent"


@click.group(cls=Subcommands)
def service() -> None:
    """Have your service manager start the agent, also after a reboot."""


def program() -> list[str]:
    """The command that starts this very program again."""
    own = Path(sys.prefix) / "bin" / "towpath"
    # The link to the current version, so that an update needs no new unit.
    current = own.parents[2].parent / "current" / "bin" / "towpath" if len(own.parents) > 3 else own
    if current.exists() and current.resolve() == own.resolve():
        return [str(current)]
    return [str(own)] if own.exists() else [sys.executable, "-m", "agent"]


def unit_text(template: str, command: Sequence[str], config_file: Path) -> str:
    """The unit with the real command in it. systemd's own escapes: a percent sign and a dollar sign are doubled."""
    words = [*command, "run", "--config", str(config_file)]
    quoted = " ".join(_quoted(word) for word in words)
    lines = [f"ExecStart={quoted}" if line.startswith("ExecStart=") else line for line in template.splitlines()]
    condition = f"ConditionPathExists={str(config_file).replace('%', '%%')}"
    lines = [condition if line.startswith("ConditionPathExists=") else line for line in lines]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if all(c.isalnum() or c in "/._-@%$" for c in escaped) else f'"{escaped}"'


def template() -> str:
    """The documented unit. Raises `CommandFailed` when the installation has none."""
    package = Path(__file__).parents[1]
    for place in (Path(sys.prefix) / "systemd", package / "_systemd", package.parent / "systemd"):
        if (place / UNIT).is_file():
            return (place / UNIT).read_text(encoding="utf-8")
    raise CommandFailed("The installation is incomplete: the unit file is missing.")


def unit_path() -> Path:
    """Where the user's unit belongs."""
    from agent.config.keys import default_config_file

    return default_config_file().parents[1] / "systemd" / "user" / UNIT


@service.command()
@config_option
def install(config_file: Path) -> None:
    """Write the unit and start the agent with it."""
    if platform.system() == "Darwin":
        place = f"~/Library/LaunchAgents/{LABEL}.plist"
        raise CommandFailed(
            f"There is no systemd on macOS. Do `towpath service manifest > {place}`, then `launchctl load -w {place}`."
        )
    if not shutil.which("systemctl"):
        raise CommandFailed("There is no systemd here; use `towpath start`, for example from cron's @reboot.")
    # Before anything is written. Sessions of login nodes and containers often have none.
    if _ask_systemctl(["show-environment"]).returncode:
        raise CommandFailed(
            "systemd runs nothing for you here (no user session answers); use `towpath start`, for example from cron's "
            "@reboot, or have an administrator enable lingering for you (`loginctl enable-linger`)."
        )
    with failing_plainly():
        path = unit_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(unit_text(template(), program(), config_file), encoding="utf-8")
    for words in (["daemon-reload"], ["enable", "--now", UNIT]):
        _systemctl(words)
    click.echo(f"{path} is written, and the agent runs. Also while you are not signed in: loginctl enable-linger")


@service.command()
def remove() -> None:
    """Stop the agent and remove the unit."""
    path = unit_path()
    if not path.exists():
        raise CommandFailed(f"There is no {path}.")
    _systemctl(["disable", "--now", UNIT])
    path.unlink()
    _systemctl(["daemon-reload"])
    click.echo(f"{path} is removed.")


@service.command()
@click.option("--program", "path", help="The command to start; this very program by default.")
@click.option("--launchd/--systemd", default=sys.platform == "darwin", help="For which service manager.")
@config_option
def manifest(path: str | None, launchd: bool, config_file: Path) -> None:
    """Print what a service manager wants: a unit, or a property list for launchd."""
    from agent.desktop.autostart import launch_agent

    command = [path] if path else program()
    if launchd:
        text = launch_agent(LABEL, [*command, "run", "--config", str(config_file)], keep_alive=True).decode()
    else:
        text = unit_text(template(), command, config_file)
    click.echo(text, nl=False)


def _ask_systemctl(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemctl", "--user", *words], capture_output=True, text=True, check=False)


def _systemctl(words: Sequence[str]) -> None:
    result = _ask_systemctl(words)
    if result.returncode:
        raise CommandFailed(f"systemctl --user {' '.join(words)}: {result.stderr.strip() or result.returncode}")
