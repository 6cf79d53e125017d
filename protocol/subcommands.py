"""Help of command groups, for the command lines of agent and relay."""

from __future__ import annotations

import click

# More characters than the first sentence of any command's help has.
_WHOLE = 1000


class Subcommands(click.Group):
    """A group that tells what each of its commands does in a whole sentence; click cuts them off with dots."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one row for each command, over several lines where need be."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, one.get_short_help_str(_WHOLE)) for name, one in commands.items() if one and not one.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
