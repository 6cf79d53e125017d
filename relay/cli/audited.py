"""Commands of the operator in the audit log: those that were carried out, and those that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from relay.audit.trail import Entry
    from relay.settings import Settings

_SETTINGS = "towpath.settings"


def remember(context: click.Context, settings: Settings) -> None:
    """Say which relay the command is about, for its entry."""
    context.meta[_SETTINGS] = settings


class AuditedCommand(click.Command):
    """A command that is recorded: in the transaction of what it changes, else at its end, and also when it fails."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises what the command raises, and what keeps its entry from being written."""
        from relay.audit.commands import CommandRecord, command_entry
        from relay.store.database import companion

        entry = command_entry(ctx)
        if entry is None:
            return super().invoke(ctx)
        record = CommandRecord(entry)
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


class AuditedGroup(click.Group):
    """A group of such commands."""

    command_class = AuditedCommand
    group_class = type


def _write(context: click.Context, entry: Entry) -> None:
    """Record what is in no transaction of the relay's database: what failed, and what is about files."""
    from sqlalchemy import exc

    from relay.audit import trail
    from relay.store.database import Store

    settings: Settings | None = context.meta.get(_SETTINGS)
    if settings is None or not (settings.directory_path / settings.database.file).exists():
        return
    store = Store(settings.database_url, readers=1)
    try:
        with store.writing_engine.begin() as connection:
            trail.append(connection, [entry])
    except exc.SQLAlchemyError as error:
        click.echo(f"towpath-relay: this is not in the audit log: {type(error).__name__}", err=True)
    finally:
        store.close()
