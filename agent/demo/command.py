"""``towpath demo``: its options. What happens is in `agent.demo.play`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C, and print how to reach it.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write how to reach it to a file, once all is up. The file holds a secret and is for you alone.",
)
@click.option(
    "--roots",
    nargs=2,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="A B",
    help="Use these directories for alpha and beta.",
)
@click.option("--skip-transfer", is_flag=True, help="Only bring the relay and both agents up.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="Keep everything in this (new or empty) directory instead of a temporary one.",
)
@click.option(
    "--large-file", type=click.IntRange(min=1), default=1024, show_default=True, metavar="MIB", help="Its size."
)
@click.option(
    "--tree",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Move a copy of this directory instead of Python's standard library.",
)
def demo(
    keep: bool,
    json_file: Path | None,
    roots: tuple[Path, Path] | None,
    skip_transfer: bool,
    directory: Path | None,
    large_file: int,
    tree: Path | None,
) -> int:
    """Move real data between two agents under a relay, kill each of them on the way, and prove nothing was lost.

    Starts a relay and the agents alpha and beta, each a process of its own; transfers Python's standard library,
    symlinks and a large file; kills beta, alpha and the relay with SIGKILL along the way and starts each again; looks
    at beta's files all the time; and compares both sides with an independent tool. The exit code is 1 when anything
    differs, when more than 64 MiB were sent again after a kill, or when the task needed help.
    """
    from agent.demo.play import Plan, perform
    from agent.demo.sample import MIB
    from agent.demo.stage import Stage

    if skip_transfer and not keep and json_file is None:
        click.echo("With --skip-transfer and without --keep this only checks that everything starts.", err=True)
    plan = Plan(keep, json_file, roots, skip_transfer, directory, large_file * MIB, tree)
    return perform(plan, Stage())
