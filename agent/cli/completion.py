"""``towpath completion``: the script that makes a shell complete commands and options."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: towpath completion bash > ~/.local/share/bash-completion/completions/towpath
    zsh:  towpath completion zsh > a directory of $fpath, as _towpath
    fish: towpath completion fish > ~/.config/fish/completions/towpath.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"There is no completion for {shell}.")
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "towpath", "_TOWPATH_COMPLETE").source())
