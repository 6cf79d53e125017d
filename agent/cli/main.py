"""The ``towpath`` command: a table of subcommands, each imported only when it is called.

`towpath --help` and shell completion answer from this table alone, so they stay fast however much the commands
behind it need. One place turns every outcome into an exit code, see `agent.exit_codes`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

from agent.cli.output import CommandFailed
from agent.exit_codes import ExitCode


@dataclass(frozen=True)
class Entry:
    """One subcommand: where it is (``module:attribute``), its line in the help, and the heading it stands under."""

    target: str
    summary: str
    section: str


FILES = "Files and transfers"
ACCOUNT = "You and the relay"
MACHINE = "This machine"

COMMANDS: dict[str, Entry] = {
    "ls": Entry("agent.cli.files:ls", "List a directory of a collection.", FILES),
    "stat": Entry("agent.cli.files:stat", "Show one file or directory.", FILES),
    "mkdir": Entry("agent.cli.files:mkdir", "Make a directory.", FILES),
    "rename": Entry("agent.cli.files:rename", "Rename a file or directory.", FILES),
    "rm": Entry("agent.cli.deletion:rm", "Delete something and wait until it is gone.", FILES),
    "delete": Entry("agent.cli.deletion:delete", "Submit a delete task.", FILES),
    "transfer": Entry("agent.cli.transfer:transfer", "Submit a transfer task.", FILES),
    "task": Entry("agent.cli.task:task", "List, watch, change and cancel tasks.", FILES),
    "endpoint": Entry("agent.cli.endpoint:endpoint", "Search and describe collections.", FILES),
    "share": Entry("agent.cli.share:share", "Share folders with other people.", FILES),
    "bookmark": Entry("agent.cli.bookmark:bookmark", "Name the places you use.", FILES),
    "login": Entry("agent.cli.account:login", "Sign in to a relay.", ACCOUNT),
    "logout": Entry("agent.cli.account:logout", "Sign out and forget the credentials.", ACCOUNT),
    "whoami": Entry("agent.cli.account:whoami", "Say who is signed in.", ACCOUNT),
    "setup": Entry("agent.cli.service:setup", "Enrol this machine, or add a collection to it.", MACHINE),
    "run": Entry("agent.cli.service:run", "Run the agent in the foreground.", MACHINE),
    "start": Entry("agent.cli.service:start", "Start the agent in the background.", MACHINE),
    "stop": Entry("agent.cli.service:stop", "Stop the agent.", MACHINE),
    "status": Entry("agent.cli.service:status", "Say what the agent is doing.", MACHINE),
    "top": Entry("agent.cli.top:top", "Watch what moves now.", MACHINE),
    "tray": Entry("agent.cli.tray:tray", "Show the agent's state on the desktop.", MACHINE),
    "pause": Entry("agent.cli.control:pause", "Hold up all transfers of this machine, or one.", MACHINE),
    "resume": Entry("agent.cli.control:resume", "Let them go on.", MACHINE),
    "reconnect": Entry("agent.cli.control:reconnect", "Connect to the relay at once.", MACHINE),
    "logs": Entry("agent.cli.logs:logs", "Show the agent's log.", MACHINE),
    "support-bundle": Entry(
        "agent.cli.support:support_bundle", "Collect what helps helpers, without secrets.", MACHINE
    ),
    "collection": Entry("agent.cli.collection:collection", "Offer folders of this machine.", MACHINE),
    "watch": Entry("agent.cli.watch:watch", "Transfer new files by themselves, by rules.", MACHINE),
    "config": Entry("agent.cli.config:config", "Show, change and check the agent's configuration.", MACHINE),
    "service": Entry("agent.cli.service_manager:service", "Have your service manager run the agent.", MACHINE),
    "update": Entry("agent.cli.update:update", "Look for updates, install them, go back.", MACHINE),
    "doctor": Entry("agent.cli.doctor:doctor", "Look for everything that can be wrong.", MACHINE),
    "demo": Entry("agent.demo.command:demo", "Move real data between two agents, with crashes, and prove it.", MACHINE),
    "completion": Entry("agent.cli.completion:completion", "Print the completion script of a shell.", MACHINE),
}

# What things are called elsewhere.
OTHER_WORDS = {
    "cp": "transfer",
    "copy": "transfer",
    "sync": "transfer --sync-level",
    "mirror": "transfer --delete",
    "mv": "rename",
    "cancel": "task cancel",
    "wait": "task wait",
    "search": "endpoint search",
}


class LazyGroup(click.Group):
    """A click group whose members come from `COMMANDS` and are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All subcommands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand, or None for a name that is not in the table."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.target} is not a command.")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called. Raises `click.UsageError`, with what was perhaps meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            meant = [OTHER_WORDS[args[0]]] if args[0] in OTHER_WORDS else get_close_matches(args[0], COMMANDS)
            if not meant:
                raise
            found = " or ".join(f"`towpath {name}`" for name in meant)
            raise click.UsageError(f"No such command {args[0]!r}; did you mean {found}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of the subcommands from the table, without importing any."""
        sections = dict.fromkeys(entry.section for entry in COMMANDS.values())
        for section in sections:
            rows = [(name, entry.summary) for name, entry in COMMANDS.items() if entry.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        """Complete subcommand names from the table; click's own way would import every one of them."""
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=entry.summary) for name, entry in COMMANDS.items() if name.startswith(incomplete)
        ]
        # The options of the group itself need no imports.
        return names + click.Command.shell_complete(self, ctx, incomplete)


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"towpath {version('towpath')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show version."
)
def cli() -> None:
    """Move research data between machines: verified, resumable, peer to peer.

    Exit codes: 0 done, 1 other trouble, 2 wrong usage, 3 done but some items were left out, 4 task failed,
    5 task cancelled, 6 waiting timed out, 7 task needs somebody's attention, 130 interrupted (the task goes on).
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Never raises for what a user can mend."""
    try:
        outcome = cli.main(args=arguments, prog_name="towpath", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.code if isinstance(error, CommandFailed) else error.exit_code
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`towpath ls … | head`). Say nothing more, also not at exit.
        sys.stdout = None
        return ExitCode.OTHER
    except OSError as error:
        # A home that cannot be written to, a full disk: told as the system tells it.
        CommandFailed(f"{error.filename or 'The system'}: {error.strerror or error}.").show()
        return ExitCode.OTHER
    return outcome if isinstance(outcome, int) else ExitCode.DONE


def main() -> None:
    """Entry point of the ``towpath`` command."""
    sys.exit(run())
