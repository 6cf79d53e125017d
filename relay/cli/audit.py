"""The audit log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from protocol.terminal import terminal_safe
from relay.cli.audited import AuditedGroup
from relay.cli.frame import as_document, settings_of, with_store

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from relay.store.database import Store


@click.group(cls=AuditedGroup)
def audit() -> None:
    """The audit log: who did what, when, from where, and how it ended."""


@audit.command("show")
@click.option("--since", default="7d", show_default=True, help="A length of time (36h, 30d) or a date (2026-11-01).")
@click.option("--by", metavar="NAME", help="Only what this user or program did, at its id or name.")
@click.option("--about", metavar="TEXT", help="Only where this stands in the action or a fact: an id, a name, a word.")
@click.option("--failed", is_flag=True, help="Only what was refused or failed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@click.pass_context
def audit_show(
    context: click.Context, since: str, by: str | None, about: str | None, failed: bool, as_json: bool
) -> None:
    """Show who did what, oldest first: time, who, action, outcome, from where, facts."""
    import time

    from relay import accounts
    from relay.audit.reading import Question, find

    moment = _moment(since, time.time())
    settings = settings_of(context)

    async def work(store: Store) -> None:
        who = None if by is None else (await accounts.find_identity(store, settings, by)).id
        question = Question(since=moment, by=who, about=about, failed=failed)

        def show(connection: Connection) -> None:
            for entry in find(connection, question):
                click.echo(json.dumps(entry) if as_json else _line(entry))

        await store.read(show)

    with_store(settings, work)


def _moment(since: str, now: float) -> float:
    """Unix seconds of a date, or of so long before ``now``. Raises `click.UsageError`."""
    from datetime import UTC, datetime

    from relay.settings import seconds_of

    try:
        return now - seconds_of(since)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(since)
    except ValueError:
        raise click.UsageError(f"--since takes 36h, 30d, or a date such as 2026-11-01, not {since!r}.") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _line(entry: dict[str, Any]) -> str:
    who = entry["username"] or entry["who"]
    if not who and entry["client"]:
        who = f"the program {entry['program'] or entry['client']}"
    elif not who:
        who = "operator" if entry["origin"].startswith("command line") else "somebody"
    facts = " ".join(f"{key}={value}" for key, value in sorted(entry["facts"].items()))
    parts = (entry["time"][:19].replace("T", " "), who, entry["action"], entry["outcome"], entry["origin"], facts)
    return terminal_safe("  ".join(parts))


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
@as_document
@click.pass_context
def audit_verify(context: click.Context, as_json: bool) -> None:
    """Check that no entry was changed, left out or put in. Keep the last hash elsewhere to see a cut-off end."""
    from relay.audit import trail

    verdict = with_store(settings_of(context), lambda store: store.read(trail.verify))
    if as_json:
        click.echo(json.dumps({"entries": verdict.entries, "head": verdict.head, "broken": verdict.broken}))
        context.exit(0 if verdict.broken is None else 1)
    if verdict.broken is not None:
        raise click.ClickException(
            f"The log is broken at entry {verdict.broken}; the {verdict.entries} before are whole."
        )
    click.echo(f"{verdict.entries} entries, whole. Last hash: {verdict.head}")
