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

_format_option = click.option(
    "-F",
    "--format",
    "output_format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How results are written.",
)


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
