"""``towpath watch``: rules that start a transfer when new files have settled in a folder, or at set times."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from agent.cli.command import with_output
from agent.cli.output import Column, CommandFailed, Output, field
from agent.cli.service import config_option, failing_plainly, tell_running_agent
from agent.config.keys import AgentConfig, CollectionConfig, document
from agent.config.layers import load_config
from protocol.subcommands import Subcommands

COLUMNS = (
    field("Name", "name"),
    field("Folder", "folder"),
    Column("Batches", lambda row: ", ".join(f"{n} {state}" for state, n in (row.get("batches") or {}).items()) or "-"),
    field("Settling", "settling", right=True),
    field("Problem", "problem"),
)


@click.group(cls=Subcommands)
def watch() -> None:
    """Transfer new files by themselves, by rules."""


@watch.command("list")
@config_option
@with_output
def list_rules(out: Output, config_file: Path) -> None:
    """List the rules and what they have done."""
    from agent import local_socket
    from protocol.errors import TowpathError

    with failing_plainly():
        config = load_config(config_file)
    try:
        rows = local_socket.ask(config.state_dir, "GET", "/watch")["rules"]
    except TowpathError:
        rows = [
            {"name": row.name, "folder": row.folder, "batches": {}, "problem": "The agent does not run."}
            for row in config.watch
        ]
    out.table({"rules": rows}, rows, COLUMNS)


@watch.command()
@click.argument("name")
@click.option("--collection", required=True, help="Name or id of the collection of this machine that holds the folder.")
@click.option("--folder", default="/", show_default=True, help="The folder in it.")
@click.option("--destination", required=True, help="Name or id of the collection that files go to.")
@click.option("--template", default="/{path}", show_default=True, help="Their path there; see conf/agent.yaml.")
@click.option("--recursive/--no-recursive", default=True, help="Also folders in the folder (the default).")
@click.option("--include", multiple=True, help="Only names that match.")
@click.option("--exclude", multiple=True, help="Not what matches.")
@click.option("--settle", type=click.IntRange(0, 604800), default=60, show_default=True, help="Seconds without change.")
@click.option("--after", type=click.Choice(["keep", "delete", "move"]), default="keep", show_default=True)
@click.option("--moved-to", help="With --after move: a folder of the same collection.")
@click.option("--schedule", help="Cron expression: go at these times, not as soon as files have settled.")
@click.option(
    "--sync-level",
    type=click.Choice(["exists", "size", "mtime", "checksum"]),
    help="Leave out what the destination has already.",
)
@click.option(
    "--retries", type=click.IntRange(0, 1000), default=10, show_default=True, help="New tasks after a failure."
)
@config_option
@with_output
def add(out: Output, /, name: str, config_file: Path, **options: Any) -> None:
    """Add a rule, or change the one of this name."""
    from agent.config.layers import editing, entry_in
    from agent.watch.rule import FEEDS_ITSELF, feeds_itself
    from protocol.names import parse_path_untrusted

    with failing_plainly():
        offered = load_config(config_file).collections
        here = options["collection"] = _offered(options["collection"], offered)
        there = options["destination"] = _offered(options["destination"], offered) or _at_relay(options["destination"])
        if here is None:
            raise CommandFailed("The collection to watch is not one of this machine; see `towpath collection list`.")
        folder = parse_path_untrusted(options["folder"])
        if here == there and feeds_itself(options["template"], folder, recursive=options["recursive"]):
            raise CommandFailed(FEEDS_ITSELF)
        with editing(config_file) as content:
            given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
            entry_in(content, "watch", name, "name").update(
                {key: value for key, value in given.items() if value not in (None, [])}
            )
        said = tell_running_agent(load_config(config_file).state_dir)
    out.result({"name": name}, f"Rule {name} is set. {said}".strip())


def _offered(name_or_id: str, offered: Sequence[CollectionConfig]) -> str | None:
    """The id of a collection of this machine; None if it is none, or if two are called so."""
    found = [row.id for row in offered if row.id == name_or_id.lower()]
    found = found or [row.id for row in offered if row.name == name_or_id]
    return found[0] if len(found) == 1 else None


def _at_relay(name_or_id: str) -> str:
    """The id of a collection anywhere; for a name the relay is asked. Raises `CommandFailed`."""
    from agent.cli.failures import explained
    from agent.cli.location import Location, is_uuid, resolve
    from agent.cli.relay_client import current_profile, open_relay

    if is_uuid(name_or_id):
        return name_or_id.lower()
    with explained(current_profile(os.environ)), open_relay(os.environ) as relay:
        return resolve(Location(name_or_id), relay).collection_id


@watch.command()
@click.argument("name")
@config_option
@with_output
def remove(out: Output, name: str, config_file: Path) -> None:
    """Remove a rule. What it has submitted goes on."""
    from agent.config.document import read_layer
    from agent.config.layers import editing, remove_entry

    with failing_plainly():
        config = load_config(config_file)
        if name not in {row.name for row in config.watch}:
            raise CommandFailed(f"There is no rule {name}; see `towpath watch list`.")
        owners = read_layer(document(config_file.read_bytes(), config_file), AgentConfig, config_file).values
        with editing(config_file) as content:
            remove_entry(content, "watch", name, owners=name in owners.get("watch", {}), identity_key="name")
        said = tell_running_agent(config.state_dir)
    out.result({"name": name}, f"Rule {name} is removed. {said}".strip())


@watch.command("run")
@click.argument("name")
@click.option("--retry", is_flag=True, help="Also try again what had failed for good.")
@config_option
def run_now(name: str, retry: bool, config_file: Path) -> None:
    """Have a rule look and go now, also a timed one."""
    from urllib.parse import quote

    from agent import local_socket
    from agent.config.layers import state_dir_of

    with failing_plainly():
        path = f"/watch/{quote(name, safe='')}/{'retry' if retry else 'run'}"
        click.echo(local_socket.ask(state_dir_of(config_file), "POST", path)["message"])
