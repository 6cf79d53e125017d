"""What every command shares: the ``--format`` option, and for those that need one, a relay to speak to."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

from agent.cli.output import Output

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

P = ParamSpec("P")
R = TypeVar("R")

# More characters than the first sentence of any command's help has.
_WHOLE = 1000

_format_option = click.option(
    "-F",
    "--format",
    "output_format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How results are written.",
)


class Subcommands(click.Group):
    """A group that tells what each of its commands does in a whole sentence; click cuts them off with dots."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one row for each command, over several lines where need be."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, one.get_short_help_str(_WHOLE)) for name, one in commands.items() if one and not one.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def with_output(function: Callable[Concatenate[Output, P], R]) -> Callable[..., R]:
    """Give a command its `Output` as first argument, after ``--format``."""

    @_format_option
    @functools.wraps(function)
    def command(*arguments: Any, output_format: str, **options: Any) -> R:
        return function(Output("json" if output_format == "json" else "text"), *arguments, **options)

    return command


def with_relay(function: Callable[Concatenate[Relay, Output, P], R]) -> Callable[..., R]:
    """Give a command a signed-in `Relay` and its `Output` as first arguments; failures become sentences."""

    @_format_option
    @functools.wraps(function)
    def command(*arguments: Any, output_format: str, **options: Any) -> R:
        from agent.cli.failures import explained
        from agent.cli.relay_client import current_profile, open_relay

        profile = current_profile(os.environ)
        with explained(profile), open_relay(os.environ) as relay:
            return function(relay, Output("json" if output_format == "json" else "text"), *arguments, **options)

    return command
