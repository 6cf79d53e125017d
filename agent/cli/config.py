"""``towpath config``: look at the agent's configuration, change it, and say that it is right."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from agent.cli.command import with_output
from agent.cli.output import CommandFailed, Output
from agent.cli.service import config_option, failing_plainly, tell_running_agent
from agent.config.exposure import exposures, unusable
from agent.config.keys import AgentConfig, ConfigError
from agent.config.layers import load_config
from agent.exit_codes import ExitCode
from protocol.errors import TowpathError
from protocol.subcommands import Subcommands


@click.group(cls=Subcommands)
def config() -> None:
    """Show, change and check the agent's configuration."""


@config.command()
@config_option
@with_output
def check(out: Output, config_file: Path) -> int:
    """Read the configuration and list every mistake with its line.

    What can be wrong without being a mistake in the file (a missing folder) is a warning and no failure.
    """
    if out.is_json:
        document = checked(config_file)
        out.document(document)
        return ExitCode.OTHER if document["problems"] else ExitCode.DONE
    with failing_plainly():
        found = load_config(config_file)
    for warning in warnings_of(found, config_file):
        click.echo(f"Warning: {warning}", err=True)
    for _, sentence in exposures(found, config_file):
        click.echo(f"Note: {sentence}", err=True)
    click.echo(f"{config_file}: no mistakes; {len(found.collections)} collection(s), state in {found.state_dir}.")
    return ExitCode.DONE


def checked(config_file: Path) -> dict[str, Any]:
    """What is wrong with a configuration, and what its owner may not have meant, for programs."""
    try:
        found = load_config(config_file)
    except ConfigError as error:
        problems = [{"file": str(error.file), "line": line, "sentence": told} for line, told in error.problems]
        return {"problems": problems, "warnings": [], "notes": []}
    notes = [sentence for _, sentence in exposures(found, config_file)]
    return {"problems": [], "warnings": list(warnings_of(found, config_file)), "notes": notes}


def warnings_of(found: AgentConfig, config_file: Path) -> Iterator[str]:
    """Sentences on what an owner may not have meant."""
    if found.relay.url is None:
        yield "The agent is not set up yet; run `towpath setup` with a setup key."
    if found.relay.ca_file is not None and not found.relay.ca_file.is_file():
        yield f"The relay's CA certificate {found.relay.ca_file} is missing; run `towpath setup` again."
    textfile = found.metrics.textfile
    if textfile is not None and textfile.suffix != ".prom":
        yield f"The name of metrics.textfile, {textfile}, does not end in .prom; the node exporter does not read it."
    for collection in found.collections:
        if not os.path.isdir(collection.root):
            yield f"The root {collection.root} of {collection.name} is not a directory now."
    for _, sentence in unusable(found):
        yield sentence


@config.command()
@click.argument("key", required=False)
@click.option("--origin", is_flag=True, help="Also say where each value comes from.")
@config_option
@with_output
def show(out: Output, key: str | None, origin: bool, config_file: Path) -> None:
    """Show what is in force: all of it, or one KEY such as limits.lanes or a section such as limits.

    The password of a proxy is shown by its own key (relay.proxy) alone.
    """
    from agent.config.layers import load
    from agent.config.show import rows_of

    with failing_plainly():
        loaded = load(config_file)
    rows = [
        row if row.key == key else row.without_password()
        for row in rows_of(loaded)
        if key is None or row.key == key or row.key.startswith(f"{key}.")
    ]
    if not rows and key is not None:
        raise CommandFailed(f"There is no setting {key}; `towpath config show` lists all.")
    if out.is_json:
        out.document({row.key: {"value": row.value, "origin": row.origin} for row in rows})
    elif len(rows) == 1 and rows[0].key == key and not origin:
        out.line(rows[0].text)
    else:
        width = max((len(f"{row.key}: {row.text}") for row in rows), default=0)
        for row in rows:
            line = f"{row.key}: {row.text}"
            out.line(f"{line:<{width}}  # {row.origin}" if origin else line)


@config.command("set")
@click.argument("key")
@click.argument("value")
@config_option
def set_value(key: str, value: str, config_file: Path) -> None:
    """Set KEY to VALUE (written as in YAML), remembered beside your file, which stays as it is."""
    from agent.config.layers import overlay_file, set_in_overlay

    with failing_plainly():
        set_in_overlay(config_file, key, value)
    click.echo(f"{key} is set in {overlay_file(config_file)}.{_taken_up(config_file)}")


@config.command()
@click.argument("key")
@config_option
def unset(key: str, config_file: Path) -> None:
    """Forget what `towpath config set` remembered for KEY; your file counts again."""
    from agent.config.layers import unset_in_overlay

    with failing_plainly():
        was_set = unset_in_overlay(config_file, key)
    if not was_set:
        raise CommandFailed(f"{key} was not set by the program.")
    click.echo(f"{key} is no longer set by the program.{_taken_up(config_file)}")


@config.command()
@config_option
def edit(config_file: Path) -> None:
    """Open your file in an editor ($VISUAL, $EDITOR); it is replaced only by one without mistakes."""
    from agent.config.layers import load

    def checked(text: str) -> None:
        load(config_file, owners=text.encode())

    with failing_plainly():
        before = config_file.read_text(encoding="utf-8")
        after = _edited(before, config_file, checked)
        if after == before:
            click.echo("Nothing was changed.")
            return
        target = Path(os.path.realpath(config_file))
        mode = target.stat().st_mode & 0o777
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
            file.write(after)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, mode)
        os.replace(file.name, target)
    click.echo(f"{config_file} is changed.{_taken_up(config_file)}")


def _edited(before: str, config_file: Path, check_text: Callable[[str], None]) -> str:
    """The text as the owner left it, without mistakes. The editor opens again as long as the owner wants to mend."""
    text = before
    while True:
        edited = click.edit(text, extension=".yaml", require_save=False)
        if edited is None:
            return before
        text = edited
        try:
            check_text(text)
        except ConfigError as error:
            click.echo(error.sentence, err=True)
            if not click.confirm("Edit again? (Otherwise nothing is changed.)", err=True):
                return before
        else:
            return text


@config.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file."""
    from agent.config.show import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@config.command("accept-root")
@click.argument("collection_id")
@config_option
def accept_root(collection_id: str, config_file: Path) -> None:
    """Say that the root of a collection is right as it is now, although its disk is not the one of its first use, or a
    disk that was mounted below it is gone for good."""
    from agent import local_socket
    from agent.collections import MARKS_FILE, Marks

    with failing_plainly():
        found = load_config(config_file)
        collection = next((row for row in found.collections if row.id == collection_id), None)
        if collection is None:
            raise CommandFailed(f"{config_file} has no collection {collection_id}.")
        try:
            local_socket.ask(found.state_dir, "POST", f"/collections/{collection_id}/accept-root")
        except local_socket.NotRunning:
            Marks(found.state_dir / MARKS_FILE).forget(collection_id)
        except TowpathError as error:
            raise CommandFailed(error.sentence) from error
    click.echo(f"The root {collection.root} of {collection.name} is taken as it is now, with what is mounted below it.")


def _taken_up(config_file: Path) -> str:
    """Have a running agent take up the change; the end of a sentence on what it says."""
    with failing_plainly():
        said = tell_running_agent(load_config(config_file).state_dir)
    return f" {said}" if said else ""
