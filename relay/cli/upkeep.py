"""Setting a relay up, running it, its configuration, backup and restore."""

from __future__ import annotations

import json
from pathlib import Path

import click

from relay.cli.audited import AuditedCommand, AuditedFileCommand, AuditedGroup, record_inside, remember_former
from relay.cli.frame import as_document, default_configuration, settings_of, with_store


@click.command(cls=AuditedCommand)
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), default=".", show_default="here")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")  # noqa: S104 - a default
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on.  [default: that of --url, else 8443]")
@click.option("--url", help="The address users and agents will use, such as https://relay.example.org:8443.")
@click.option("--name", help="What the relay is called.")
def init(directory: Path, host: str, port: int | None, url: str | None, name: str | None) -> None:
    """Make a relay: configuration, keys, certificate, database. Repeating it changes nothing."""
    from urllib.parse import urlsplit

    from relay import accounts
    from relay.examine import ONLY_HERE, names_this_machine
    from relay.initialise import initialise

    made = initialise(directory, host=host, port=port, url=url, name=name)
    if made.configuration_was_there:
        click.echo(f"{made.configuration} was there already and is unchanged; other options had no effect.")
    click.echo(f"The relay is ready in {made.settings.directory}. Its address is {made.settings.public_url}")
    if names_this_machine(urlsplit(made.settings.public_url).hostname or ""):
        how = "listen.url in its configuration" if made.configuration_was_there else "--url"
        click.echo(f"{ONLY_HERE} Say which with {how}, before anybody is added.")
    link = with_store(made.settings, lambda store: accounts.first_administrator_link(made.settings, store))
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


@click.command(cls=AuditedCommand)
@click.pass_context
def serve(context: click.Context) -> None:
    """Run the relay until SIGTERM or Ctrl-C."""
    import gc

    # Until it is ready (`relay.process.collect_seldom`): nothing of what is loaded for that is garbage, and looking for
    # some takes a tenth of the time.
    gc.disable()

    import trio

    from protocol.threads import wait_for_threads
    from relay import logs, server

    settings = settings_of(context)
    logs.set_up(settings.log)
    wait_for_threads()
    trio.run(server.serve, settings)


@click.command(cls=AuditedFileCommand)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@as_document
@click.pass_context
def backup(context: click.Context, file: Path, as_json: bool) -> None:
    """Write database, keys and configuration to FILE. Works while the relay runs. FILE holds secrets."""
    from relay.backup import back_up

    settings = settings_of(context)
    size = back_up(settings, context.obj or default_configuration(), file)
    if as_json:
        click.echo(json.dumps({"file": str(file), "bytes": size}, indent=2))
        return
    click.echo(f"Wrote {file} ({size} bytes). It holds the relay's secrets: keep it where only you can read it.")


@click.command(cls=AuditedFileCommand)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), help="Where; else as --config says.")
@click.option("--force", is_flag=True, help="Move a relay that is there already aside.")
@click.pass_context
def restore(context: click.Context, file: Path, directory: Path | None, force: bool) -> None:
    """Put a backup in place. The relay must not be running.

    What fails leaves everything as it was. After a restore that was killed, call it again: it first puts back what was
    there, and until then the other commands refuse to use what is half a relay.
    """
    from relay.backup import restore as restore_archive

    if directory is None:
        directory = (context.obj or default_configuration()).parent
    if (directory / "relay.yaml").exists():
        remember_former(context, directory / "relay.yaml")
    aside = restore_archive(file, directory, force=force, note=lambda database: record_inside(context, database))
    if aside is not None:
        click.echo(f"What was there before is in {aside}.")
    click.echo(f"Restored into {directory}. Start it with: towpath-relay --config {directory / 'relay.yaml'} serve")


@click.command(cls=AuditedCommand)
@as_document
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Look for what is wrong: configuration, files, database, keys, certificate, process, address.

    Changes nothing. Exit code 1 when something does not work or is open to others.
    """
    import time

    from protocol.findings import document_of, failed, lines_of
    from protocol.terminal import terminal_safe
    from relay.examine import examine

    report = []
    for title, findings in examine(context.obj or default_configuration(), time.time()):
        report.append((title, findings))
        if not as_json:
            for line in lines_of(title, findings):
                click.echo(terminal_safe(line))
    if as_json:
        click.echo(json.dumps({"checks": [document_of(title, findings) for title, findings in report]}, indent=2))
    if any(failed(findings) for _, findings in report):
        context.exit(1)


@click.group(cls=AuditedGroup)
def config() -> None:
    """The configuration file."""


@config.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print all settings in force.")
@click.pass_context
def config_check(context: click.Context, as_json: bool) -> None:
    """Check the configuration without running anything."""
    from relay import settings

    path = context.obj or default_configuration()
    loaded = settings.load(path)
    if as_json:
        click.echo(json.dumps(settings.as_document(loaded), indent=2))
    else:
        click.echo(f"{path} is in order. The relay's address is {loaded.public_url}")
