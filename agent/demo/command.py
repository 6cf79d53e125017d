"""``towpath demo``: the main job, shown and proven on one machine."""

from __future__ import annotations

import shlex
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import trio

from agent.cli.output import CommandFailed
from agent.demo.children import ChildFailed
from agent.demo.sample import MIB, make_tutorial_data
from agent.demo.story import Outcome, Story
from agent.demo.world import World, little_world


@click.command()
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C or SIGTERM.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write how to reach everything to a file.")
@click.option("--roots", nargs=2, type=click.Path(path_type=Path), help="Directories for alpha and beta.")
@click.option("--skip-transfer", is_flag=True, help="Only bring the little world up.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where to keep everything; a new temporary one.")
def demo(
    keep: bool,
    json_file: Path | None,
    roots: tuple[Path, Path] | None,
    skip_transfer: bool,
    directory: Path | None,
) -> int:
    """Start a relay and two agents, move real data while killing each of them, and compare.

    Exit code 0 only if everything arrived as it was, little was sent again, and no name was ever visible with wrong
    content.
    """
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="towpath-demo-")))
        directory = directory.absolute()
        directory.mkdir(parents=True, exist_ok=True)
        absolute = (roots[0].absolute(), roots[1].absolute()) if roots else None
        try:
            return trio.run(_demo, directory, absolute, json_file, keep, skip_transfer)
        except* ChildFailed as group:
            failure = str(_innermost(group))
    raise CommandFailed(failure)


def _innermost(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def _demo(
    directory: Path, roots: tuple[Path, Path] | None, json_file: Path | None, keep: bool, skip_transfer: bool
) -> int:
    code = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def end_on_signal() -> None:
                async for _ in signals:
                    ended.set()
                    nursery.cancel_scope.cancel()

            nursery.start_soon(end_on_signal)
            async with little_world(directory, roots) as world:
                click.echo(f"A relay and two agents run below {directory}.")
                await trio.to_thread.run_sync(make_tutorial_data, world.alpha.root)
                if json_file is not None:
                    world.write_document(json_file)
                if not skip_transfer:
                    code = await _transfer(world)
                if keep:
                    _print_exports(world)
                    await trio.sleep_forever()
            nursery.cancel_scope.cancel()
    if ended.is_set() and not keep:
        click.echo("Interrupted; everything has ended.")
        return 130
    return code


async def _transfer(world: World) -> int:
    with _Bar() as bar:
        outcome = await Story(world, bar.say, bar.show).run()
    _print_outcome(outcome)
    return 1 if outcome.problems else 0


class _Bar:
    """A progress bar on a terminal, a line for every tenth elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        console = Console(highlight=False)
        self._terminal = console.is_terminal
        self._tenth = -1
        self._progress = Progress(
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._terminal,
        )
        self._task = self._progress.add_task("alpha → beta", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)
        tenth = done * 10 // max(total, 1)
        if not self._terminal and tenth > self._tenth:
            self._tenth = tenth
            self.say(f"{tenth * 10:3d} %  {done / MIB:7.0f} of {total / MIB:.0f} MiB")


def _print_outcome(outcome: Outcome) -> None:
    rate = outcome.bytes / MIB / max(outcome.seconds, 1e-6)
    click.echo(f"{outcome.files} files, {outcome.bytes / MIB:.0f} MiB in {outcome.seconds:.1f} s: {rate:.0f} MiB/s,")
    click.echo(f"with {', '.join(outcome.kills)} killed and started again on the way.")
    click.echo(f"Sent again: {outcome.sent_again / MIB:.1f} MiB.")
    click.echo(f"The watcher looked {outcome.looks} times at the destination's names.")
    if outcome.comparison is not None and outcome.comparison.equal:
        click.echo(f"Both trees are equal, says {outcome.comparison.tool}.")
    for problem in outcome.problems:
        click.echo(f"PROBLEM: {problem}", err=True)
    if not outcome.problems:
        click.echo("All as it should be. Try next: towpath demo --keep, then the commands it prints.")


def _print_exports(world: World) -> None:
    click.echo("\nEverything is up. In another terminal:\n")
    for name, value in world.exports().items():
        click.echo(f"export {name}={shlex.quote(value)}")
    click.echo("\ntowpath ls $ALPHA:~/data1")
    click.echo("globus transfer $ALPHA:~/data1/1M.dat $BETA:~/1M.dat\n\nCtrl-C ends it.")
