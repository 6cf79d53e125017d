"""``towpath config``: look at the agent's configuration."""

from __future__ import annotations

from pathlib import Path

import click

from agent.cli.output import CommandFailed
from agent.config import ConfigError, default_config_file, load_config


@click.group()
def config() -> None:
    """Check the agent's configuration."""


@config.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="The configuration file.")
def check(config_file: Path | None) -> None:
    """Read the configuration and list every mistake with its line."""
    file = config_file or default_config_file()
    try:
        found = load_config(file)
    except ConfigError as error:
        raise CommandFailed(error.sentence) from error
    click.echo(f"{file}: no mistakes; {len(found.collections)} collection(s), state in {found.state_dir}.")
