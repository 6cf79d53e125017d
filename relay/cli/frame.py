"""What all commands stand on: the configuration, the database beside a running relay, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from protocol.terminal import terminal_safe
from relay.cli.audited import remember

if TYPE_CHECKING:
    from relay.settings import Settings
    from relay.store.database import Store

_EVERYWHERE = Path("/etc/towpath/relay.yaml")

# Options that mean the same with every command that has them.
as_document = click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
of_one_user = click.option("--user", "name", help="Those of one user only.")


def default_configuration() -> Path:
    """Where the configuration is when nobody says so."""
    from relay.replacement import PLAN

    here = Path("relay.yaml")
    return here if here.exists() or Path(PLAN).exists() else _EVERYWHERE


def settings_of(context: click.Context) -> Settings:
    """The settings that the command works with. Raises `SettingsError`, and what `check_finished` raises."""
    from relay import replacement, settings

    configuration = context.obj or default_configuration()
    replacement.forget_finished(configuration.absolute().parent)
    loaded = settings.load(configuration)
    remember(context, loaded)
    return loaded


def with_store(settings: Settings, work: Callable[[Store], Any]) -> Any:
    """Run an async function over the store of an existing relay, its schema brought up to date."""
    import trio

    from relay.store.database import Store
    from relay.store.migrate import require, upgrade

    if not Path(settings.directory_path / settings.database.file).exists():
        raise click.ClickException(f"There is no relay in {settings.directory}; run `towpath-relay init` first.")

    remember(click.get_current_context(), settings)
    store = Store(settings.database_url, readers=1)
    try:
        require(store.writing_engine, store.path)
        upgrade(store.writing_engine)
        return trio.run(work, store)
    finally:
        store.close()


def show(document: dict[str, Any], as_json: bool) -> None:
    """Print one result."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    width = max(map(len, document))
    for name, value in document.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {'' if value is None else terminal_safe(value)}")


def show_rows(
    rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool, *, times: tuple[str, ...] = ()
) -> None:
    """Print several results, one a line below the names of the columns. Those in ``times`` are shown to the second,
    in UTC."""
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [tuple(column.replace("_", " ").capitalize() for column in columns)]
    table += [
        tuple(_cell(_to_the_second(row[column]) if column in times else row[column]) for column in columns)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())


def _to_the_second(time: str | None) -> str | None:
    """A time of a document, short enough for a table."""
    return time and time[:19].replace("T", " ")


def _cell(value: object) -> str:
    return terminal_safe(", ".join(value) if isinstance(value, list) else str(value or "-"))
