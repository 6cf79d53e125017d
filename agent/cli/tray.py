"""``towpath tray``: the agent's state as an icon on the desktop."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent.cli.output import CommandFailed
from agent.cli.service import config_option, failing_plainly


@click.command()
@click.option("--autostart", type=click.Choice(["on", "off"]), help="Show it whenever you sign in, or no longer.")
@config_option
def tray(autostart: str | None, config_file: Path) -> None:
    """Show the agent's state in the tray of the desktop, with a menu, until you quit it."""
    if autostart is not None:
        from agent.desktop.autostart import set_autostart

        command = [sys.executable, "-m", "agent", "tray", "--config", str(config_file)]
        with failing_plainly():
            path = set_autostart(command, wanted=autostart == "on")
        click.echo(f"{path} is {'written' if autostart == 'on' else 'removed'}.")
        return
    try:
        from agent.desktop.tray import Tray

        Tray(config_file).run()
    except ImportError as error:
        raise CommandFailed(
            f"The tray needs libraries that are not installed ({error.name}); install towpath[desktop], or use "
            "`towpath status` and `towpath top`."
        ) from error
    except Exception as error:
        # pystray looks for a window system when it is imported and again when it runs (a session bus), and each one
        # has errors of its own.
        raise CommandFailed(f"There is no desktop to show it on ({error}); use `towpath top`.") from error
