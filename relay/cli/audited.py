"""Commands of the operator in the audit log: those that were carried out, and those that failed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from protocol.subcommands import Subcommands

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.exc import SQLAlchemyError

    from relay.audit.commands import CommandRecord
    from relay.audit.trail import Entry
    from relay.settings import Settings

_SETTINGS = "towpath.settings"
_RECORD = "towpath.record"
_ANNOUNCED = "towpath.announced"


class NotAnnounced(click.ClickException):
    """A command about files cannot be announced in the audit log; ``why`` is a sentence."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The audit log cannot be written, so nothing was done. {why}")
        self.why = why


def remember(context: click.Context, settings: Settings) -> None:
    """Say which relay the command is about, for its entry; before the command changes any of its files.

    Raises `NotAnnounced`.
    """
    context.meta[_SETTINGS] = settings
    if not isinstance(context.command, AuditedFileCommand) or _ANNOUNCED in context.meta:
        return
    database = settings.directory_path / settings.database.file
    if database.exists():
        _announce(context, settings.database_url)


def _announce(context: click.Context, url: str) -> None:
    from sqlalchemy import exc

    record: CommandRecord = context.meta[_RECORD]
    try:
        _append(url, replace(record.entry, outcome="begun"))
    except exc.SQLAlchemyError as error:
        raise NotAnnounced(_why(error)) from error
    context.meta[_ANNOUNCED] = True


def remember_former(context: click.Context, configuration: Path) -> None:
    """The same of a relay that a backup takes the place of, as far as it can be read and written: damage is what
    backups are for. What is put in place tells of the command in any case (`record_inside`)."""
    from relay.settings import SettingsError, load

    try:
        remember(context, load(configuration))
    except (SettingsError, NotAnnounced) as error:
        why = error.why if isinstance(error, NotAnnounced) else error.sentence
        click.echo(f"towpath-relay: the relay that is there cannot tell of this in its audit log. {why}", err=True)


def record_inside(context: click.Context, database: Path) -> None:
    """Write the command's entry into a database that is about to be put in place, brought up to date for that."""
    record: CommandRecord = context.meta[_RECORD]
    _append(f"sqlite:///{database}", record.entry, bring_up_to_date=True)
    record.written = True


class AuditedCommand(click.Command):
    """A command that is recorded: in the transaction of what it changes, else at its end, and also when it fails."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises what the command raises, and what keeps its entry from being written."""
        from relay.audit.commands import CommandRecord, command_entry
        from relay.store.database import companion

        entry = command_entry(ctx)
        if entry is None:
            return super().invoke(ctx)
        record = ctx.meta[_RECORD] = CommandRecord(entry)
        mark = companion.set(record.accompany)
        try:
            result = super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            _write(ctx, record.failure(error))
            raise
        finally:
            companion.reset(mark)
        if not record.written:
            _write(ctx, entry)
        return result


class AuditedFileCommand(AuditedCommand):
    """A command about files, which no transaction of the database holds: it is announced before it changes anything
    and told of again when it has ended, so that there is no change without an entry, whatever is killed when."""


class AuditedGroup(Subcommands):
    """A group of such commands."""

    command_class = AuditedCommand
    group_class = type


def _write(context: click.Context, entry: Entry) -> None:
    """Record what is in no transaction of the relay's database: what failed, and how it ended that is about files."""
    from sqlalchemy import exc

    settings: Settings | None = context.meta.get(_SETTINGS)
    if settings is None or not (settings.directory_path / settings.database.file).exists():
        return
    try:
        _append(settings.database_url, entry)
    except exc.SQLAlchemyError as error:
        click.echo(f"towpath-relay: this is not in the audit log. {_why(error)}", err=True)


def _why(error: SQLAlchemyError) -> str:
    """What keeps the audit log from being written, as the store says it, or the kind of error."""
    from sqlalchemy import exc

    from protocol.errors import TowpathError
    from relay.store.database import raise_explained

    if isinstance(error, exc.DatabaseError):
        try:
            raise_explained(error)
        except TowpathError as explained:
            return explained.sentence
    return type(error).__name__


def _append(url: str, entry: Entry, *, bring_up_to_date: bool = False) -> None:
    from relay.audit import trail
    from relay.store.database import Store
    from relay.store.migrate import upgrade

    store = Store(url, readers=1)
    try:
        if bring_up_to_date:
            upgrade(store.writing_engine)
        with store.writing_engine.begin() as connection:
            trail.append(connection, [entry])
    finally:
        store.close()
