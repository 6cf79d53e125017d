"""The whole demonstration from curtain to curtain, with every way it may end."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from globus_sdk import GlobusError

from agent.demo import sample
from agent.demo.children import ChildFailed, leaves, warden
from agent.demo.stage import Stage
from agent.demo.trial import run_trial
from agent.demo.verdict import KILLS, shortcomings, summary
from agent.demo.world import AGENTS, World, open_world
from agent.quantities import human_bytes
from protocol.private_file import write_private_file

TREE = "demo"
TRIAL_SECONDS = 300.0
WATCH_SECONDS = 0.5
# Copies on both sides, and room for journals, logs and the file system's own needs.
SPACE_FACTOR = 2.2


@dataclass(frozen=True)
class Plan:
    """What the user asked for."""

    keep: bool = False
    json_file: Path | None = None
    roots: tuple[Path, Path] | None = None
    skip_transfer: bool = False
    directory: Path | None = None
    large_file_size: int = 1024 * sample.MIB
    source: Path | None = None


class CannotPlay(Exception):
    """The demonstration cannot begin; the text says what to change."""


@dataclass
class Ending:
    """How it ended: the exit code once it is known, and the signal that came, if one did."""

    code: int | None = None
    signal_number: int = 0


def perform(plan: Plan, stage: Stage) -> int:
    """Run the demonstration and return its exit code.

    0: all was shown. 1: something differs or failed. 128 + signal: interrupted before the outcome was known; a
    world that is only kept running ends on a signal as it should.
    """
    ending = Ending()
    try:
        check_roots(plan)
        if plan.json_file is not None:
            # Whoever waits for the file must not meet an earlier one.
            plan.json_file.unlink(missing_ok=True)
        with _place(plan, stage, ending) as directory:
            trio.run(_play, plan, stage, directory, ending)
            if ending.code is None and ending.signal_number:
                stage.say("Interrupted.")
                ending.code = 128 + ending.signal_number
    except CannotPlay as error:
        stage.say(f"The demonstration cannot begin: {error}")
        return 1
    return 1 if ending.code is None else ending.code


@contextmanager
def _place(plan: Plan, stage: Stage, ending: Ending) -> Iterator[Path]:
    """Where everything lives: the user's directory, or a temporary one. After a failure what is left of a temporary
    one is what explains it: logs, configuration and state, without the bulk."""
    if plan.directory is not None:
        directory = plan.directory.absolute()
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CannotPlay(f"{directory} is not an empty directory; name another, or one that does not exist yet.")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield directory
        stage.say(f"Everything stays in {directory}.")
        return
    directory = Path(tempfile.mkdtemp(prefix="towpath-demo-"))
    failed = True
    try:
        yield directory
        failed = bool(ending.code) and not ending.signal_number
    except CannotPlay:
        # Nothing has begun, so nothing explains it better than the refusal.
        failed = False
        raise
    finally:
        shutil.rmtree(directory / "roots" if failed else directory, ignore_errors=True)
        if failed:
            stage.say(f"Logs and state are in {directory}.")


async def _play(plan: Plan, stage: Stage, directory: Path, ending: Ending) -> None:
    refusals: list[Exception] = []
    try:
        async with _signals(ending):
            await _acts(plan, stage, directory, ending)
    except* CannotPlay as group:
        refusals = leaves(group)
    except* (ChildFailed, GlobusError, OSError) as group:
        ending.code = 1
        for error in leaves(group):
            stage.say(f"The demonstration failed: {error}")
    # Not where it was caught: before Python 3.11.4, what is raised there is in a group again.
    for refusal in refusals:
        raise refusal


@asynccontextmanager
async def _signals(ending: Ending) -> AsyncIterator[None]:
    """Inside the block SIGINT, SIGTERM and SIGHUP cancel it, so that every process is ended in good order."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as arrivals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in arrivals:
                    # Only the first one counts; ending in good order is under way then.
                    ending.signal_number = ending.signal_number or number
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            yield
            nursery.cancel_scope.cancel()


async def _acts(plan: Plan, stage: Stage, directory: Path, ending: Ending) -> None:
    roots = _roots(plan, directory)
    contents = await _data(plan, stage, roots)
    async with warden() as guard, open_world(directory, roots, guard, stage.say) as world:
        _publish(plan, world)
        code = 0
        if contents is not None:
            with stage.progress(contents.bytes):
                evidence = await run_trial(
                    world,
                    TREE,
                    contents,
                    say=stage.say,
                    show=stage.show,
                    changed=lambda: _publish(plan, world),
                    limit_seconds=TRIAL_SECONDS,
                )
            faults = shortcomings(evidence)
            code = 1 if faults else 0
            for line in summary(evidence) + faults:
                stage.say(line)
            stage.say("FAILED: see above." if faults else "All is well.")
        ending.code = code
        if plan.keep:
            await _keep(world, stage, ending)
    if not plan.keep:
        stage.say(_next_steps())


def check_roots(plan: Plan) -> None:
    """Refuse roots that cannot be used, before anything is made. Raises `CannotPlay`."""
    if plan.roots is None:
        return
    alpha, beta = plan.roots
    for name, root in zip(AGENTS, plan.roots, strict=True):
        if not root.is_dir():
            raise CannotPlay(f"{root}, the root for {name}, is not a directory; make it first.")
    if alpha.samefile(beta):
        raise CannotPlay("Both roots are the same directory; give two.")
    if not plan.skip_transfer and (beta / TREE).exists():
        raise CannotPlay(f"{beta / TREE} exists already; remove it, so that the transfer starts afresh.")


def _roots(plan: Plan, directory: Path) -> dict[str, Path]:
    if plan.roots is not None:
        return dict(zip(AGENTS, (root.absolute() for root in plan.roots), strict=True))
    roots = {name: directory / "roots" / name for name in AGENTS}
    for root in roots.values():
        root.mkdir(mode=0o700, parents=True)
    return roots


async def _data(plan: Plan, stage: Stage, roots: Mapping[str, Path]) -> sample.Contents | None:
    """Make what is to be transferred; None when nothing is. Roots of the user's own that nothing is to be moved
    from are left as they are."""
    tree = roots["alpha"] / TREE
    source = plan.source or sample.standard_library()

    def make() -> sample.Contents | None:
        checkpoint = trio.from_thread.check_cancelled
        if plan.roots is None or not plan.skip_transfer:
            sample.make_tutorial_data(roots["alpha"], checkpoint)
        if plan.skip_transfer:
            return None
        if not tree.exists():
            sample.make_tree(tree, source, plan.large_file_size, checkpoint)
        return sample.contents_of(tree)

    if not plan.skip_transfer:
        if not tree.exists():
            _check_space(tree.parent, plan.large_file_size, source)
        stage.say(f"Preparing the data in {roots['alpha']}.")
    return await trio.to_thread.run_sync(make)


def _check_space(place: Path, large_file_size: int, source: Path) -> None:
    needed = int((large_file_size + sample.contents_of(source).bytes) * SPACE_FACTOR)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CannotPlay(
            f"{human_bytes(needed)} of disk space are needed and {place} has {human_bytes(free)}; name a roomier place "
            f"with --directory, or move less with --large-file."
        )


def _publish(plan: Plan, world: World) -> None:
    if plan.json_file is not None:
        plan.json_file.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_private_file(plan.json_file.absolute(), f"{json.dumps(world.document(), indent=2)}\n".encode())


async def _keep(world: World, stage: Stage, ending: Ending) -> None:
    """Leave everything running until a signal comes. Ends with code 1 when a process ends by itself."""
    stage.say("\nThis is running now. In another terminal:\n\n" + world.exports())
    stage.say(_tour())
    stage.say("Ctrl-C ends it.")
    while True:
        for child in world.children:
            try:
                child.raise_if_ended()
            except ChildFailed:
                ending.code = 1
                raise
        await trio.sleep(WATCH_SECONDS)


def _tour() -> str:
    return (
        "\nand then, for example:\n\n"
        "  towpath ls $ALPHA:~/data1\n"
        "  towpath transfer --wait $ALPHA:~/data1/100M.dat $BETA:~/100M.dat\n"
        "  globus transfer --recursive $ALPHA:~/sync-demo $BETA:~/syncDemo\n"
        "  globus task list\n"
    )


def _next_steps() -> str:
    killed = ", ".join(name for name, _ in KILLS)
    return (
        f"\nWhat to try next: `towpath demo --keep` leaves the relay and both agents running and prints how to reach\n"
        f"them with `towpath` and the real `globus` command; kill {killed} yourself. README.md shows how to set up\n"
        f"a relay and agents of your own."
    )
