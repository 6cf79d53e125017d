"""``towpath pause | resume | reconnect``: short words to the running agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from agent.cli.service import config_option, failing_plainly


def _command(name: str, path: str, help_text: str) -> Callable[..., Any]:
    def ask(config_file: Path) -> None:
        from agent import local_socket
        from agent.config.layers import state_dir_of

        with failing_plainly():
            click.echo(local_socket.ask(state_dir_of(config_file), "POST", path)["message"])

    return click.command(name, help=help_text)(config_option(ask))


pause = _command("pause", "/pause", "Hold up all transfers of this machine; they wait, also over restarts.")
resume = _command("resume", "/resume", "Let the transfers of this machine go on.")
reconnect = _command("reconnect", "/relay/reconnect", "Connect to the relay at once instead of waiting.")
