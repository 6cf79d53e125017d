"""`towpath-relay`: set up, run and look after a relay.

Each command imports what it needs when it runs, so that `--help` answers at once. All commands work beside a running
relay. Secrets are printed once, to standard output, and never taken from the command line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from relay.settings import Settings
    from relay.store.database import Store

T = TypeVar("T")

_EVERYWHERE = Path("/etc/towpath/relay.yaml")


def main() -> NoReturn:
    """Entry point of the command. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    import tarfile

    from protocol.errors import TowpathError

    # Nearly all files of a relay are secret; those that are not are opened up one by one.
    os.umask(0o077)
    try:
        cli.main(prog_name="towpath-relay", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.Abort:
        _fail("Stopped.")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TowpathError as error:
        _fail(error.sentence)
    except tarfile.TarError as error:
        _fail(f"The backup cannot be read: {error}")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    click.echo(f"towpath-relay: {sentence}", err=True)
    sys.exit(1)


def _default_configuration() -> Path:
    here = Path("relay.yaml")
    return here if here.exists() else _EVERYWHERE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="TOWPATH_RELAY_CONFIG",
    help="The relay's configuration file; without it relay.yaml here, then /etc/towpath/relay.yaml.",
)
@click.version_option(package_name="towpath")
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Set up, run and look after a Towpath relay."""
    context.obj = config


def _settings(context: click.Context) -> Settings:
    from relay import settings

    return settings.load(context.obj or _default_configuration())


def _with_store(settings: Settings, work: Callable[[Store], Any]) -> Any:
    """Run an async function over the store of an existing relay, its schema brought up to date."""
    import trio

    from relay.audit import trail
    from relay.audit.commands import command_entry
    from relay.store.database import Store
    from relay.store.migrate import upgrade

    if not Path(settings.directory_path / settings.database.file).exists():
        raise click.ClickException(f"There is no relay in {settings.directory}; run `towpath-relay init` first.")

    async def recorded(store: Store) -> Any:
        result = await work(store)
        entry = command_entry(click.get_current_context())
        if entry is not None:
            await store.write(lambda connection: trail.append(connection, [entry]))
        return result

    store = Store(settings.database_url, readers=1)
    try:
        upgrade(store.writing_engine)
        return trio.run(recorded, store)
    finally:
        store.close()


@cli.command()
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), default=".", show_default="here")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")  # noqa: S104
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on.  [default: that of --url, else 8443]")
@click.option("--url", help="The address users and agents will use, such as https://relay.example.org:8443.")
@click.option("--name", help="What the relay is called.")
def init(directory: Path, host: str, port: int | None, url: str | None, name: str | None) -> None:
    """Make a relay: configuration, keys, certificate, database. Repeating it changes nothing."""
    from relay import accounts
    from relay.initialise import initialise

    made = initialise(directory, host=host, port=port, url=url, name=name)
    if made.configuration_was_there:
        click.echo(f"{made.configuration} was there already and is unchanged; other options had no effect.")
    click.echo(f"The relay is ready in {made.settings.directory}. Its address is {made.settings.public_url}")
    link = _with_store(made.settings, lambda store: accounts.first_administrator_link(made.settings, store))
    if link is not None:
        click.echo("Once it runs, become its administrator with this link, which works once and for a week:")
        click.echo(f"  {link}")
    click.echo("Next:")
    command = f"towpath-relay --config {made.configuration}"
    click.echo(f"  {command} serve")
    click.echo(f"  {command} user add NAME")
    click.echo(f"  {command} collection add NAME --owner USER")
    if made.settings.tls.certificate is None:
        click.echo("Globus clients trust its certificate with:")
        click.echo(f"  export GLOBUS_SDK_VERIFY_SSL={made.settings.directory_path / 'tls' / 'ca.pem'}")
    click.echo(f"Keep {made.settings.directory_path / 'keys' / 'root.pem'} safe; see `towpath-relay root --help`.")


@cli.command()
@click.pass_context
def serve(context: click.Context) -> None:
    """Run the relay until SIGTERM or Ctrl-C."""
    import trio

    from relay import logs, server

    settings = _settings(context)
    logs.set_up(settings.log)
    trio.run(server.serve, settings)


@cli.group()
def user() -> None:
    """People of this relay."""


@user.command("add")
@click.argument("name")
@click.option("--full-name", help="The name to show to others.")
@click.option("--email")
@click.option("--password-file", type=click.File(), help="Read a password from a file, or - for standard input.")
@click.option("--no-link", is_flag=True, help="Make no link for choosing a password.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def user_add(
    context: click.Context,
    name: str,
    full_name: str | None,
    email: str | None,
    password_file: IO[str] | None,
    no_link: bool,
    as_json: bool,
) -> None:
    """Add a user, and print a one-time link with which they choose their password.

    NAME without an @ belongs to the relay's own domain; others sign in at their provider and need no link.
    """
    from relay import accounts

    settings = _settings(context)
    password = None if password_file is None else password_file.read(1000).rstrip("\r\n")
    identity = _with_store(settings, accounts.adding_user(settings, name, full_name, email))
    document = {"id": identity.id, "username": identity.username, "name": identity.name, "email": identity.email}
    if password is not None:
        _with_store(settings, accounts.setting_password(settings, identity.id, password))
    elif not no_link and identity.username.endswith("@" + settings.user_domain):
        document["link"] = _with_store(settings, accounts.inviting(settings, identity.id))
    _show(document, as_json)


@user.command("link")
@click.argument("name")
@click.pass_context
def user_link(context: click.Context, name: str) -> None:
    """Print a one-time link with which a user chooses a new password. It works for a week."""
    from relay import accounts

    settings = _settings(context)
    click.echo(_with_store(settings, accounts.inviting(settings, name)))


@user.command("password")
@click.argument("name")
@click.option(
    "--password-file", type=click.File(), help="Read it from a file, or - for standard input; else asked for."
)
@click.pass_context
def user_password(context: click.Context, name: str, password_file: IO[str] | None) -> None:
    """Give a user a password. It is never taken from the command line, where others could see it."""
    from relay import accounts

    settings = _settings(context)
    if password_file is not None:
        password = password_file.read(1000).rstrip("\r\n")
    else:
        password = str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    _with_store(settings, accounts.setting_password(settings, name, password))
    click.echo("The password is set; browsers that were signed in have to sign in again.")


@user.command("close")
@click.argument("name")
@click.pass_context
def user_close(context: click.Context, name: str) -> None:
    """Close an account: it cannot sign in any more and its tokens are dead. Nothing is deleted."""
    from relay import accounts

    settings = _settings(context)
    identity = _with_store(settings, accounts.closing(settings, name))
    click.echo(f"{identity.username} is closed.")


@user.command("administrator")
@click.pass_context
def user_administrator(context: click.Context) -> None:
    """Print a new one-time link for the relay's first administrator."""
    from relay import accounts

    settings = _settings(context)
    link = _with_store(settings, lambda store: accounts.first_administrator_link(settings, store))
    click.echo("This relay has an administrator." if link is None else link)


@user.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def user_list(context: click.Context, as_json: bool) -> None:
    """List the users."""
    from relay import accounts

    _show_rows(_with_store(_settings(context), accounts.list_users), ("id", "username", "status", "name"), as_json)


@cli.group()
def client() -> None:
    """Programs that sign in with an id and a secret."""


@client.command("add")
@click.argument("name")
@click.option("--owner", help="The user this client belongs to.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def client_add(context: click.Context, name: str, owner: str | None, as_json: bool) -> None:
    """Add a client and print its id and secret, this once."""
    from relay import accounts

    settings = _settings(context)
    _show(_with_store(settings, accounts.adding_client(settings, name, owner)), as_json)


@client.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def client_list(context: click.Context, as_json: bool) -> None:
    """List the clients and the ids of their secrets."""
    from relay import accounts

    rows = _with_store(_settings(context), accounts.list_clients)
    _show_rows(rows, ("client_id", "name", "owner", "secret_ids"), as_json)


@client.command("add-secret")
@click.argument("client_id")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def client_add_secret(context: click.Context, client_id: str, as_json: bool) -> None:
    """Give a client a further secret and print it, this once."""
    from relay import accounts

    _show(_with_store(_settings(context), accounts.adding_secret(client_id)), as_json)


@client.command("remove-secret")
@click.argument("client_id")
@click.argument("secret_id")
@click.pass_context
def client_remove_secret(context: click.Context, client_id: str, secret_id: str) -> None:
    """Take a secret from a client."""
    from relay import accounts

    if not _with_store(_settings(context), accounts.removing_secret(client_id, secret_id)):
        raise click.ClickException(f"Client {client_id} has no secret {secret_id}.")
    click.echo("Removed. Tokens that were given for it stay valid until they end.")


@cli.group()
def app() -> None:
    """Applications that sign people in: web portals, JupyterHub, programs on people's machines, services."""


@app.command("add")
@click.argument("name")
@click.option("--owner", required=True, help="The user who administers it from now on.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["web", "native", "service"]),
    default="web",
    show_default=True,
    help="web: keeps a secret; native: runs on people's machines, without one; service: acts for itself.",
)
@click.option("--redirect-uri", multiple=True, help="Where browsers come back to after sign-in. Repeatable.")
@click.option("--project", help="The owner's project it goes to; made when missing, and called NAME by default.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def app_add(
    context: click.Context,
    name: str,
    owner: str,
    kind: str,
    redirect_uri: tuple[str, ...],
    project: str | None,
    as_json: bool,
) -> None:
    """Register an application and print its id and secret, this once."""
    from relay.applications import operator

    settings = _settings(context)
    work = operator.adding_application(settings, name, owner, kind, redirect_uri, project)
    _show(_with_store(settings, work), as_json)


@cli.group()
def collection() -> None:
    """Collections: storage that agents serve."""


@collection.command("add")
@click.argument("name")
@click.option("--owner", required=True, help="The user it belongs to.")
@click.option("--grant", multiple=True, metavar="IDENTITY:ROLE", help="Give a role, such as administrator. Repeatable.")
@click.option("--public/--private", default=False, show_default=True, help="Whether everybody can find it.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.pass_context
def collection_add(
    context: click.Context, name: str, owner: str, grant: tuple[str, ...], public: bool, as_json: bool
) -> None:
    """Make a collection and print the setup key for its agent, this once."""
    from relay import accounts

    settings = _settings(context)
    _show(_with_store(settings, accounts.adding_collection(settings, name, owner, grant, public)), as_json)


@cli.group()
def audit() -> None:
    """The audit log: who did what, when, from where, and how it ended."""


@audit.command("export")
@click.option("--after", type=click.IntRange(0), default=0, help="Only entries with numbers above this one.")
@click.pass_context
def audit_export(context: click.Context, after: int) -> None:
    """Print the log as JSON lines, oldest first."""
    from relay.audit import trail

    def show(connection: Any) -> None:
        for line in trail.lines(connection, after):
            click.echo(line)

    _with_store(_settings(context), lambda store: store.read(show))


@audit.command("verify")
@click.pass_context
def audit_verify(context: click.Context) -> None:
    """Check that no entry was changed, left out or put in. Keep the last hash elsewhere to see a cut-off end."""
    from relay.audit import trail

    verdict = _with_store(_settings(context), lambda store: store.read(trail.verify))
    if verdict.broken is not None:
        raise click.ClickException(
            f"The log is broken at entry {verdict.broken}; the {verdict.entries} before are whole."
        )
    click.echo(f"{verdict.entries} entries, whole. Last hash: {verdict.head}")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_context
def backup(context: click.Context, file: Path) -> None:
    """Write database, keys and configuration to FILE. Works while the relay runs. FILE holds secrets."""
    from relay.backup import back_up

    settings = _settings(context)
    size = back_up(settings, context.obj or _default_configuration(), file)
    click.echo(f"Wrote {file} ({size} bytes). It holds the relay's secrets: keep it where only you can read it.")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), help="Where; else as --config says.")
@click.option("--force", is_flag=True, help="Move a relay that is there already aside.")
@click.pass_context
def restore(context: click.Context, file: Path, directory: Path | None, force: bool) -> None:
    """Put a backup in place. The relay must not be running."""
    from relay.backup import restore as restore_archive

    if directory is None:
        directory = (context.obj or _default_configuration()).parent
    aside = restore_archive(file, directory, force=force)
    if aside is not None:
        click.echo(f"What was there before is in {aside}.")
    click.echo(f"Restored into {directory}. Start it with: towpath-relay --config {directory / 'relay.yaml'} serve")


@cli.group()
def root() -> None:
    """The root key, which agents pin for good when they are set up.

    It certifies the ticket keys that the relay uses from day to day. It may be kept elsewhere: then certify a new
    ticket key with it before the current one ends.
    """


@root.command("show")
@click.pass_context
def root_show(context: click.Context) -> None:
    """Show the root's public half and the state of the ticket key."""
    from datetime import UTC, datetime

    from relay.keys import RelayKeys

    keys = RelayKeys(_settings(context).directory_path / "keys")
    state = keys.statistics()
    click.echo(keys.root_public_pem.strip())
    click.echo(
        f"The private half is {'here: ' + str(keys.root_path) if state.root_present else 'not on this machine'}."
    )
    until = datetime.fromtimestamp(state.ticket_key_expires, UTC)
    click.echo(f"Ticket key {state.ticket_key} is certified until {until:%Y-%m-%d %H:%M} UTC.")


@root.command("move")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_context
def root_move(context: click.Context, file: Path) -> None:
    """Move the root's private half to FILE, for keeping it off this machine."""
    from relay import keys

    keys.move_root(_settings(context).directory_path / "keys", file)
    click.echo(f"Moved to {file}. Before the ticket key ends: towpath-relay root certify --root FILE")


@root.command("certify")
@click.option("--root", "file", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The root key.")
@click.pass_context
def root_certify(context: click.Context, file: Path | None) -> None:
    """Make a new ticket key and certify it. A running relay takes it up within a minute."""
    import time

    from protocol.ticket import RelayRoot
    from relay import keys

    settings = _settings(context)
    directory = settings.directory_path / "keys"
    try:
        root_key = RelayRoot.load(file or directory / "root.pem")
    except ValueError as error:
        raise click.ClickException(f"{file} is no root key: {error}") from error
    made = keys.certify_ticket_key(directory, root_key, time.time(), settings.tickets.key_life)
    click.echo(f"Ticket key {made.kid} is certified.")


@cli.group()
def config() -> None:
    """The configuration file."""


@config.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print all settings in force.")
@click.pass_context
def config_check(context: click.Context, as_json: bool) -> None:
    """Check the configuration without running anything."""
    from relay import settings

    path = context.obj or _default_configuration()
    loaded = settings.load(path)
    if as_json:
        click.echo(json.dumps(settings.as_document(loaded), indent=2))
    else:
        click.echo(f"{path} is in order. The relay's address is {loaded.public_url}")


def _show(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    width = max(map(len, document))
    for name, value in document.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {'' if value is None else value}")


def _show_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        cells = (row[column] for column in columns)
        click.echo("  ".join(",".join(cell) if isinstance(cell, list) else str(cell or "-") for cell in cells))


if __name__ == "__main__":
    main()
