"""``towpath collection``: the folders that this machine offers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_output
from agent.cli.output import CommandFailed, Output, confirm, field
from agent.cli.service import config_option, failing_plainly, tell_running_agent, warn_of_exposure
from agent.config.keys import CollectionConfig
from agent.config.layers import load_config
from protocol.subcommands import Subcommands
from protocol.terminal import terminal_safe

if TYPE_CHECKING:
    from agent.enrol import SetupKey, Wish

COLUMNS = (
    field("ID", "id", whole=True),
    field("Name", "name"),
    field("Access", "access"),
    field("Sharing", "sharing"),
    field("Hidden", "hidden"),
    field("State", "state"),
    field("Root", "root"),
)


@click.group(cls=Subcommands)
def collection() -> None:
    """Offer folders of this machine, change and withdraw them."""


@collection.command("list")
@config_option
@with_output
def list_collections(out: Output, config_file: Path) -> None:
    """List what this machine offers."""
    with failing_plainly():
        config = load_config(config_file)
    states = {
        row["id"]: "available" if row["available"] else row["reason"] for row in _reports_of_agent(config.state_dir)
    }
    rows = [_row(row, states.get(row.id, "unknown (the agent does not run)")) for row in config.collections]
    out.table({"collections": rows}, rows, COLUMNS)


def _reports_of_agent(state_dir: Path) -> list[dict[str, Any]]:
    """What the running agent says of its collections; nothing when none runs."""
    from agent import local_socket
    from protocol.errors import TowpathError

    try:
        return list(local_socket.ask(state_dir, "GET", "/collections")["collections"])
    except TowpathError:
        return []


def _row(config: CollectionConfig, state: str) -> dict[str, Any]:
    return {
        "id": config.id,
        "name": config.name,
        "root": config.root,
        "access": "read-only" if config.read_only else "read-write",
        "sharing": "yes" if config.shareable else "no",
        "hidden": "offered" if config.hidden else "denied",
        "state": state,
    }


@collection.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--name", help="What to call it; the folder's name if not given.")
@click.option("--read-only", is_flag=True, help="Let others read, never write.")
@click.option("--sharing", is_flag=True, help="Let access rules open its folders to others.")
@click.option("--no-hidden", is_flag=True, help="Do not offer names that begin with a dot.")
@click.option("--setup-key-file", type=click.Path(path_type=Path), help="A setup key, for use without signing in.")
@config_option
@with_output
def add(
    out: Output,
    folder: str,
    name: str | None,
    read_only: bool,
    sharing: bool,
    no_hidden: bool,
    setup_key_file: Path | None,
    config_file: Path,
) -> None:
    """Offer FOLDER as one more collection.

    You have to be signed in (`towpath login`), unless a setup key is given by file or in TOWPATH_SETUP_KEY.
    """
    from agent.enrol import SETUP_KEY_VARIABLE, Wish, find_setup_key, set_up
    from agent.enrol_http import SetupRefused

    path = os.path.abspath(folder)
    title = name or os.path.basename(path) or path
    wish = Wish(root=path, name=title, read_only=read_only, shareable=sharing, hidden=not no_hidden)
    created = None
    with failing_plainly():
        if setup_key_file is None and not os.environ.get(SETUP_KEY_VARIABLE):
            created, key = _created(wish, config_file)
        else:
            key = find_setup_key(None, setup_key_file)
        try:
            outcome = set_up(key, wish, config_file)
        except SetupRefused:
            # A collection that no agent will ever serve is not left behind.
            if created is not None:
                _deleted_at_relay(created)
            raise
        said = tell_running_agent(outcome.state_dir)
    warn_of_exposure(outcome.collection_id, config_file)
    document = {"id": outcome.collection_id, "name": outcome.name, "root": outcome.root}
    out.result(document, f"Collection {outcome.name} ({outcome.collection_id}) offers {outcome.root}. {said}".strip())


def _created(wish: Wish, config_file: Path) -> tuple[str, SetupKey]:
    """Make the collection at the relay this machine belongs to; its id and the setup key that the relay gives."""
    from agent.cli.failures import explained
    from agent.cli.relay_client import current_profile, open_relay
    from agent.enrol import parse_setup_key_untrusted

    home = load_config(config_file).relay.url if config_file.exists() else None
    profile = current_profile(os.environ)
    with explained(profile), open_relay(os.environ) as relay:
        if home is not None and relay.profile.relay_url.rstrip("/") != home.rstrip("/"):
            raise CommandFailed(
                f"You are signed in to {relay.profile.relay_url}, but this machine belongs to {home}; sign in there."
            )
        document = {"DATA_TYPE": "endpoint", "display_name": wish.name, "is_globus_connect": True}
        answer = relay.transfer.post("/v0.10/endpoint", data=document)
    return str(answer["id"]), parse_setup_key_untrusted(str(answer["globus_connect_setup_key"]))


def _deleted_at_relay(collection_id: str) -> None:
    from agent.cli.failures import explained
    from agent.cli.relay_client import current_profile, open_relay

    with explained(current_profile(os.environ)), open_relay(os.environ) as relay:
        relay.transfer.delete_endpoint(collection_id)


@collection.command()
@click.argument("name_or_id")
@click.option("--name", help="A new name.")
@click.option("--access", type=click.Choice(["read-only", "read-write"]), help="What others may do.")
@click.option("--sharing/--no-sharing", default=None, help="Whether access rules may open its folders to others.")
@click.option("--hidden", type=click.Choice(["offered", "denied"]), help="Names that begin with a dot.")
@click.option("--root", type=click.Path(exists=True, file_okay=False), help="Another folder, in the place of the old.")
@click.option("--sessions", type=click.IntRange(0, 64), help="At most so many sessions at a time; 0: no limit.")
@config_option
@with_output
def update(out: Output, /, name_or_id: str, config_file: Path, **options: Any) -> None:
    """Rename a collection or change what is allowed on it. Your configuration file stays as it is."""
    from agent.config.layers import editing, entry_in

    if all(value is None for value in options.values()):
        raise click.UsageError("Give at least one thing to change; see --help.")
    with failing_plainly():
        found = _find(name_or_id, config_file)
        with editing(config_file) as content:
            entry = entry_in(content, "collections", found.id)
            for key in ("name", "access", "sharing", "hidden"):
                if options[key] is not None:
                    entry[key] = options[key]
            if options["root"] is not None:
                entry["root"] = os.path.abspath(options["root"])
            if options["sessions"] is not None:
                entry["limits"] = {"sessions": options["sessions"] or None}
        config = load_config(config_file)
        said = tell_running_agent(config.state_dir)
    warn_of_exposure(found.id, config_file)
    changed = next(row for row in config.collections if row.id == found.id)
    out.result(_row(changed, "changed"), f"Collection {changed.name} ({changed.id}) is changed. {said}".strip())


@collection.command()
@click.argument("name_or_id")
@click.option("--delete-at-relay", is_flag=True, help="Also delete it, and all access rules on it, at the relay.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@config_option
@with_output
def remove(out: Output, name_or_id: str, delete_at_relay: bool, yes: bool, config_file: Path) -> None:
    """Offer a collection no longer. The files stay where they are; transfers on it end."""
    from agent.config.document import read_layer
    from agent.config.keys import AgentConfig, document
    from agent.config.layers import editing, remove_entry

    with failing_plainly():
        found = _find(name_or_id, config_file)
        if not yes:
            confirm(terminal_safe(f"Withdraw {found.name} ({found.root})?"))
        state_dir = load_config(config_file).state_dir
        is_gone = any(row["id"] == found.id and row.get("missing") for row in _reports_of_agent(state_dir))
        owners = read_layer(document(config_file.read_bytes(), config_file), AgentConfig, config_file).values
        with editing(config_file) as content:
            remove_entry(content, "collections", found.id, owners=found.id in owners.get("collections", {}))
        said = tell_running_agent(state_dir)
    if delete_at_relay:
        _deleted_at_relay(found.id)
    is_gone = is_gone or delete_at_relay
    rest = "" if is_gone else " The relay still knows it; `towpath endpoint delete` removes it there."
    out.result({"id": found.id}, f"Collection {found.name} is no longer offered.{rest} {said}".strip())


def _find(name_or_id: str, config_file: Path) -> CollectionConfig:
    """The one collection of this id or name. Raises `CommandFailed`."""
    rows = load_config(config_file).collections
    found = [row for row in rows if row.id == name_or_id] or [row for row in rows if row.name == name_or_id]
    if len(found) != 1:
        what = "no collection" if not found else "more than one collection"
        raise CommandFailed(f"This machine offers {what} called {name_or_id!r}; see `towpath collection list`.")
    return found[0]
