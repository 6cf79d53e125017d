"""`towpath-relay`: set up, run and look after a relay.

Each command imports what it needs when it runs, so that `--help` answers at once. All commands work beside a running
relay. Secrets are printed once, to standard output, and never taken from the command line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from protocol.subcommands import Subcommands
from relay.cli import audit, authority, people, programs, root_key, storage, upkeep


def main() -> NoReturn:
    """Entry point of the command. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    from protocol.errors import TowpathError

    # Nearly all files of a relay are secret; those that are not are opened up one by one.
    os.umask(0o077)
    try:
        # What a command ends with by `context.exit` comes back from here, where click does not exit itself.
        outcome = cli.main(prog_name="towpath-relay", standalone_mode=False)
    except click.Abort:
        _fail("Stopped.")
    except click.UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message())
    except TowpathError as error:
        _fail(error.sentence)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.exit(outcome if isinstance(outcome, int) else 0)


def _fail(sentence: str) -> NoReturn:
    click.echo(f"towpath-relay: {sentence}", err=True)
    sys.exit(1)


@click.group(cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="TOWPATH_RELAY_CONFIG",
    show_envvar=True,
    help="The relay's configuration file; without it relay.yaml here, then /etc/towpath/relay.yaml.",
)
@click.version_option(package_name="towpath")
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Set up, run and look after a Towpath relay.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
    context.obj = config


for _command in (
    upkeep.init,
    upkeep.serve,
    people.user,
    people.token,
    programs.client,
    programs.app,
    storage.collection,
    storage.agent,
    audit.audit,
    upkeep.backup,
    upkeep.restore,
    root_key.root,
    authority.authority,
    upkeep.config,
    upkeep.doctor,
):
    cli.add_command(_command)
