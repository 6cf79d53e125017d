"""The audit log."""

from __future__ import annotations

from typing import Any

import click

from relay.cli.audited import AuditedGroup
from relay.cli.frame import settings_of, with_store


@click.group(cls=AuditedGroup)
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

    with_store(settings_of(context), lambda store: store.read(show))


@audit.command("verify")
@click.pass_context
def audit_verify(context: click.Context) -> None:
    """Check that no entry was changed, left out or put in. Keep the last hash elsewhere to see a cut-off end."""
    from relay.audit import trail

    verdict = with_store(settings_of(context), lambda store: store.read(trail.verify))
    if verdict.broken is not None:
        raise click.ClickException(
            f"The log is broken at entry {verdict.broken}; the {verdict.entries} before are whole."
        )
    click.echo(f"{verdict.entries} entries, whole. Last hash: {verdict.head}")
