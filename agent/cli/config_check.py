"""``towpath config``: look at the agent's configuration, and say that it is right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from agent.cli.output import CommandFailed
from agent.cli.service import config_option, failing_plainly
from agent.config import AgentConfig, load_config
from protocol.errors import TowpathError


@click.group()
def config() -> None:
    """Check the agent's configuration."""


@config.command()
@config_option
def check(config_file: Path) -> None:
    """Read the configuration and list every mistake with its line.

    What can be wrong without being a mistake in the file (a missing folder) is a warning and no failure.
    """
    with failing_plainly():
        found = load_config(config_file)
    for warning in warnings_of(found, config_file):
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"{config_file}: no mistakes; {len(found.collections)} collection(s), state in {found.state_dir}.")


def warnings_of(found: AgentConfig, config_file: Path) -> Iterator[str]:
    """Sentences on what an owner may not have meant."""
    if found.relay.url is None:
        yield "The agent is not set up yet; run `towpath setup` with a setup key."
    if found.relay.ca_file is not None and not found.relay.ca_file.is_file():
        yield f"The relay's CA certificate {found.relay.ca_file} is missing; run `towpath setup` again."
    for collection in found.collections:
        if not os.path.isdir(collection.root):
            yield f"The root {collection.root} of {collection.name} is not a directory now."
            continue
        for what, path in (("state directory", found.state_dir), ("configuration", config_file)):
            if _is_below(path, collection.root):
                yield (
                    f"The {what} {path} lies inside the collection {collection.name}: whoever may read that can read "
                    "the agent's key, and whoever may write can change what the agent allows."
                    if what == "state directory"
                    else f"The {what} {path} lies inside the collection {collection.name}: whoever may write there can "
                    "change what the agent allows."
                )


def _is_below(path: Path, root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


@config.command("accept-root")
@click.argument("collection_id")
@config_option
def accept_root(collection_id: str, config_file: Path) -> None:
    """Say that the root of a collection is right although its disk is not the one of its first use."""
    from agent import local_socket
    from agent.collections import MARKS_FILE, Marks

    with failing_plainly():
        found = load_config(config_file)
        collection = next((row for row in found.collections if row.id == collection_id), None)
        if collection is None:
            raise CommandFailed(f"{config_file} has no collection {collection_id}.")
        try:
            local_socket.ask(found.state_dir, "POST", f"/collections/{collection_id}/accept-root")
        except local_socket.NotRunning:
            Marks(found.state_dir / MARKS_FILE).forget(collection_id)
        except TowpathError as error:
            raise CommandFailed(error.sentence) from error
    click.echo(f"The root {collection.root} of {collection.name} is taken as it is now.")
