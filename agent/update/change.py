"""Changes the running version: checkpoint and stop, switch, start, look whether it is well, and go back if not.

Run by a process of its own that outlives the agent. What it needs from the world (`Agent`) is an argument, so that
every way it can go is tested without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from agent.update.install import STARTS_FILE, Installation
from agent.update.offer import UpdateRefused
from protocol.errors import TowpathError

HEALTHY_WITHIN = 90.0
STEADY_FOR = 10.0
LOOK_EVERY = 0.5


class Agent(Protocol):
    """The agent's process, seen from outside. Everything blocks."""

    def status(self) -> dict[str, Any] | None:
        """Its status, None if it does not answer."""

    def stop(self) -> None:
        """Have it settle its tasks and end. Raises `TowpathError` if it does not."""

    def start(self) -> None:
        """Start the version that is current now. Raises `TowpathError` if it does not get ready."""


def change(
    installation: Installation,
    version: str,
    agent: Agent,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Make an unpacked version the running one; a sentence on how it went.

    Raises `UpdateRefused` (code ROLLED_BACK) when it was not well and the one before runs again.
    """
    before = installation.running()
    if before == version:
        return f"Version {version} is the current one already."
    status = agent.status()
    # Written first: whoever finds the new version current and `pending` set knows that it has not proved itself.
    with installation.amending() as state:
        state.pending, state.previous = version, before
    (installation.directory / STARTS_FILE).unlink(missing_ok=True)
    if status is not None:
        agent.stop()
    installation.switch(version)
    problem = ""
    if status is not None:
        problem = _start_and_watch(
            version, agent, was_linked=bool(status["link"]["connected"]), sleep=sleep, clock=clock
        )
    if problem:
        go_back(installation, agent, running=True)
        raise UpdateRefused(
            f"Version {version} was not well ({problem}); version {before} runs again.", code="ROLLED_BACK"
        )
    with installation.amending() as state:
        state.pending, state.available, state.last_problem = "", "", ""
    (installation.directory / STARTS_FILE).unlink(missing_ok=True)
    installation.prune()
    return f"Version {version} runs; {before} is kept to go back to."


def _start_and_watch(
    version: str, agent: Agent, *, was_linked: bool, sleep: Callable[[float], None], clock: Callable[[], float]
) -> str:
    """Start what is current now and watch it for a while; what is wrong with it, empty if nothing."""
    try:
        agent.start()
    except TowpathError as error:
        return error.sentence
    began, well_since = clock(), None
    problem = "it did not answer"
    while clock() - began < HEALTHY_WITHIN:
        status = agent.status()
        if status is None:
            well_since, problem = None, "it does not answer"
        elif status["version"] != version:
            return f"it is version {status['version']}"
        elif was_linked and not status["link"]["connected"]:
            well_since, problem = None, "it does not reach the relay, which the one before did"
        elif well_since is None:
            well_since = clock()
        if well_since is not None and clock() - well_since >= STEADY_FOR:
            return ""
        sleep(LOOK_EVERY)
    return problem


def go_back(installation: Installation, agent: Agent, *, running: bool) -> str:
    """Make the previous version current again, and never try the other one by itself; the version current now.

    Raises `UpdateRefused` when there is none."""
    previous, failed = installation.state().previous, installation.running()
    if not previous or previous == failed:
        raise UpdateRefused("There is no version to go back to.", who="you")
    if running:
        try:
            agent.stop()
        except TowpathError:
            # It may hang or be gone; what counts is that the other one starts.
            pass
    installation.switch(previous)
    with installation.amending() as state:
        if failed not in state.failed:
            state.failed.append(failed)
        state.pending, state.last_problem = "", f"Version {failed} was not well and is not tried again."
    if running:
        agent.start()
    return previous
