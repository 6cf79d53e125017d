"""``towpath pause | resume | reconnect``: short words to the running agent."""

from __future__ import annotations

import uuid
from pathlib import Path

import click

from agent.cli.command import with_output
from agent.cli.output import Output
from agent.cli.service import config_option, failing_plainly


def _ask(out: Output, config_file: Path, path: str, **done: object) -> None:
    from agent import local_socket
    from agent.config.layers import state_dir_of

    with failing_plainly():
        message = local_socket.ask(state_dir_of(config_file), "POST", path)["message"]
    out.result({**done, "message": message}, message)


@click.command()
@click.argument("task_id", required=False, type=click.UUID)
@click.option("--drain", is_flag=True, help="Let what has begun finish; only what has not begun waits.")
@config_option
@with_output
def pause(out: Output, task_id: uuid.UUID | None, drain: bool, config_file: Path) -> None:
    """Hold up all transfers of this machine, or one task that comes to it; also over restarts, until `resume`."""
    if task_id is not None:
        if drain:
            raise click.UsageError("--drain is for the whole machine; leave the task out.")
        _ask(out, config_file, f"/tasks/{task_id}/pause", task_id=str(task_id), state="paused")
    elif drain:
        _ask(out, config_file, "/drain", state="draining")
    else:
        _ask(out, config_file, "/pause", state="paused")


@click.command()
@click.argument("task_id", required=False, type=click.UUID)
@config_option
@with_output
def resume(out: Output, task_id: uuid.UUID | None, config_file: Path) -> None:
    """Let all transfers of this machine go on, or one task that was held up by itself; either ends only its like."""
    if task_id is None:
        _ask(out, config_file, "/resume", state="running")
    else:
        _ask(out, config_file, f"/tasks/{task_id}/resume", task_id=str(task_id), state="running")


@click.command()
@config_option
@with_output
def reconnect(out: Output, config_file: Path) -> None:
    """Connect to the relay at once instead of waiting."""
    _ask(out, config_file, "/relay/reconnect", state="connecting")
