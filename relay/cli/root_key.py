"""The root key."""

from __future__ import annotations

from pathlib import Path

import click

from relay.cli.audited import AuditedFileCommand, AuditedGroup
from relay.cli.frame import as_document, settings_of, show


@click.group(cls=AuditedGroup)
def root() -> None:
    """The root key, which agents pin for good when they are set up.

    It certifies the ticket keys that the relay uses from day to day. It may be kept elsewhere: then certify a new
    ticket key with it before the current one ends.
    """


@root.command("show")
@as_document
@click.pass_context
def root_show(context: click.Context, as_json: bool) -> None:
    """Show the root's public half and the state of the ticket key."""
    from datetime import UTC, datetime

    from relay.keys import RelayKeys
    from relay.times import iso

    keys = RelayKeys(settings_of(context).directory_path / "keys")
    state = keys.statistics()
    if as_json:
        document = {"relay_id": state.relay_id, "root_public": keys.root_public_pem, "root_here": state.root_present}
        show({**document, "ticket_key": state.ticket_key, "ticket_key_expires": iso(state.ticket_key_expires)}, as_json)
        return
    click.echo(keys.root_public_pem.strip())
    click.echo(
        f"The private half is {'here: ' + str(keys.root_path) if state.root_present else 'not on this machine'}."
    )
    until = datetime.fromtimestamp(state.ticket_key_expires, UTC)
    click.echo(f"Ticket key {state.ticket_key} is certified until {until:%Y-%m-%d %H:%M} UTC.")


@root.command("move", cls=AuditedFileCommand)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_context
def root_move(context: click.Context, file: Path) -> None:
    """Move the root's private half to FILE, for keeping it off this machine."""
    from relay import keys

    keys.move_root(settings_of(context).directory_path / "keys", file)
    click.echo(f"Moved to {file}. Before the ticket key ends: towpath-relay root certify --root FILE")


@root.command("certify", cls=AuditedFileCommand)
@click.option("--root", "file", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The root key.")
@click.pass_context
def root_certify(context: click.Context, file: Path | None) -> None:
    """Make a new ticket key and certify it. A running relay takes it up within a minute."""
    import time

    from protocol.ticket import RelayRoot
    from relay import keys

    settings = settings_of(context)
    directory = settings.directory_path / "keys"
    if file is None and not (directory / "root.pem").exists():
        sentence = "The root key is not on this machine; name the file it was moved to with --root FILE."
        raise keys.KeysUnusable(sentence, who="relay operator")
    try:
        root_key = RelayRoot.load(file or directory / "root.pem")
    except ValueError as error:
        raise click.ClickException(f"{file} is no root key: {error}") from error
    made = keys.certify_ticket_key(directory, root_key, time.time(), settings.tickets.key_life)
    click.echo(f"Ticket key {made.kid} is certified.")
