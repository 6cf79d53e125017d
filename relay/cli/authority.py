"""The relay's own certificate authority."""

from __future__ import annotations

import click

from relay.cli.audited import AuditedFileCommand, AuditedGroup
from relay.cli.frame import as_document, settings_of, show


@click.group(cls=AuditedGroup)
def authority() -> None:
    """The relay's own certificate authority, which agents and clients trust by file.

    It lasts for ten years. A relay that shows a certificate of a public authority has none.
    """


@authority.command("renew", cls=AuditedFileCommand)
@as_document
@click.pass_context
def authority_renew(context: click.Context, as_json: bool) -> None:
    """Give the authority ten more years. Its key stays, so nobody is cut off.

    Agents and clients that have its former certificate go on with that until it ends. Give them the new one before.
    """
    from datetime import UTC, datetime

    from relay import tls
    from relay.times import iso

    settings = settings_of(context)
    file = tls.tls_directory(settings) / "ca.pem"
    former = tls.authority_of(settings).not_valid_after_utc
    ends = tls.renew_authority(settings, datetime.now(UTC))
    if as_json:
        document = {"file": str(file), "expires": iso(ends.timestamp()), "former_expires": iso(former.timestamp())}
        show({**document, "sha256": tls.ca_fingerprint(settings)}, as_json)
        return
    click.echo(f"{file} now lasts until {ends:%Y-%m-%d}. A running relay goes on with it within a minute.")
    click.echo(f"Until {former:%Y-%m-%d %H:%M} UTC, put it in the place of its copies:")
    click.echo("  agents: the file that `relay.ca_file` names, and start the agent again")
    click.echo("  clients: the file of --ca-file, TOWPATH_CA_FILE or GLOBUS_SDK_VERIFY_SSL")
    click.echo("Setup keys that nobody has used name the former certificate; make new ones.")
