"""The command `towpath-relay`."""

from relay.cli.main import cli, main

__all__ = ["cli", "main"]
