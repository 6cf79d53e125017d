"""``towpath pause | resume | reconnect``: short words to the running agent."""

from __future__ import annotations

import uuid
from pathlib import Path

import click

from agent.cli.service import config_option, failing_plainly


def _ask(config_file: Path, path: str) -> None:
    from agent import local_socket
    from agent.config.layers import state_dir_of

    with failing_plainly():
        click.echo(local_socket.ask(state_dir_of(config_file), "POST", path)["message"])


@click.command()
@click.argument("task_id", required=False, type=click.UUID)
@config_option
def pause(task_id: uuid.UUID | None, config_file: Path) -> None:
    """Hold up all transfers of this machine, or one task that comes to it; also over restarts."""
    _ask(config_file, "/pause" if task_id is None else f"/tasks/{task_id}/pause")


@click.command()
@click.argument("task_id", required=False, type=click.UUID)
@config_option
def resume(task_id: uuid.UUID | None, config_file: Path) -> None:
    """Let all transfers of this machine go on, or one task that was held up by itself; either ends only its like."""
    _ask(config_file, "/resume" if task_id is None else f"/tasks/{task_id}/resume")


@click.command()
@config_option
def reconnect(config_file: Path) -> None:
    """Connect to the relay at once instead of waiting."""
    _ask(config_file, "/relay/reconnect")
