"""Looks for updates every now and then, and has them installed when that disturbs nobody.

Only in an agent that runs from a bundle. ``auto`` waits for a moment without running tasks, at most `PATIENCE`; then
tasks are checkpointed like at any stop, and go on in the new version. ``notify`` only says that there is one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent.config.keys import AgentConfig, UpdateConfig
from agent.system.processes import detached
from agent.update.install import Installation, NotInstalled
from agent.update.offer import Offer, is_newer, takes_part, this_platform
from agent.update.supervisor import check_changeable
from protocol.errors import TowpathError

if TYPE_CHECKING:
    from agent.update.mirror import Mirror

logger = logging.getLogger("towpath.update")

FIRST_LOOK = 300.0
# A version that has run for so long, and that nobody watches any more, is the right one.
PROVED_AFTER = 300.0
PATIENCE = 24 * 3600.0
BUSY_LOOK = 15.0
CHANGE_LOG = "change.log"


def mirror_for(installation: Installation, config: AgentConfig, relay_url: str) -> Mirror:
    """The configured mirror, by default the relay. Raises OSError."""
    # Loaded at the first look: the library takes a tenth of a daemon's start.
    from agent.update.mirror import HttpFetcher, Mirror

    url = config.update.mirror or f"{relay_url.rstrip('/')}/updates"
    return Mirror(installation.directory, installation.pinned_root(), url, HttpFetcher(config.relay.ca_file))


def look(installation: Installation, mirror: Mirror, config: UpdateConfig, now: float) -> Offer | None:
    """Ask for an update and remember what came of it; an offer that is newer and has not failed here. Blocks.

    Raises `TowpathError`.
    """
    try:
        offer = mirror.offer(config.channel, this_platform())
    except TowpathError as error:
        with installation.amending() as state:
            state.last_check, state.last_problem = now, error.sentence
        raise
    running = installation.running()
    with installation.amending() as state:
        if offer is not None and (not is_newer(offer.version, running) or offer.version in state.failed):
            offer = None
        state.last_check, state.available = now, offer.version if offer else ""
        state.last_problem = ""
    return offer


def fetch(installation: Installation, mirror: Mirror, offer: Offer) -> None:
    """Download, verify and unpack an offer. Blocks. Raises `TowpathError` or OSError."""
    if (installation.versions / offer.version).exists():
        # Whole and verified, or it would not have its name; the agent was too busy to change to it so far.
        return
    bundle = mirror.download(offer)
    installation.unpack(bundle, offer.version, offer.platform)
    bundle.unlink(missing_ok=True)


class UpdateService:
    """The agent's own looking for updates. ``installation`` is found where this program lies if not given."""

    def __init__(
        self,
        config: AgentConfig,
        config_file: Path,
        node_id: str,
        relay_url: str,
        is_busy: Callable[[], bool],
        clock: Callable[[], float] = time.time,
        *,
        installation: Installation | None = None,
        ask: Callable[[Installation, AgentConfig, str], Mirror] = mirror_for,
        check: Callable[[], object] = check_changeable,
        begin: Callable[[Installation, str, Path], None] | None = None,
    ) -> None:
        self._config = config
        self._config_changed = trio.Event()
        self._config_file = config_file
        self._node_id = node_id
        self._relay_url = relay_url
        self._is_busy = is_busy
        self._clock = clock
        self._ask = ask
        self._check = check
        self._begin = begin or start_change
        self.available = ""
        self._installation = installation
        if installation is None:
            with contextlib.suppress(NotInstalled):
                self._installation = Installation.here()

    @property
    def config(self) -> AgentConfig:
        """What counts; a new one counts at once, also for how long to wait."""
        return self._config

    @config.setter
    def config(self, config: AgentConfig) -> None:
        self._config = config
        self._config_changed.set()

    async def run(self) -> None:
        """Until cancelled; ends at once where there is nothing to update."""
        installation = self._installation
        if installation is None:
            return
        await self._settle(installation, proved=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._prove, installation)
            await self._look_again_and_again(installation)

    async def _look_again_and_again(self, installation: Installation) -> None:
        await self._wait(most=FIRST_LOOK)
        while True:
            if self.config.update.mode != "off":
                try:
                    await self._once(installation)
                except (TowpathError, OSError) as error:
                    logger.warning("No update: %s", error)
            await self._wait()

    async def _wait(self, *, most: float = math.inf) -> None:
        """Wait for the interval that is configured, spread so that not all agents of a relay ask at once."""
        began, spread = trio.current_time(), random.uniform(0.8, 1.2)  # noqa: S311 - no secret
        while True:
            self._config_changed = trio.Event()
            with trio.move_on_at(began + min(most, self.config.update.interval) * spread):
                await self._config_changed.wait()
                continue
            return

    async def _prove(self, installation: Installation) -> None:
        await trio.sleep(PROVED_AFTER)
        await self._settle(installation, proved=True)

    @staticmethod
    async def _settle(installation: Installation, *, proved: bool) -> None:
        try:
            await trio.to_thread.run_sync(lambda: installation.settle(proved=proved))
        except OSError as error:
            logger.warning("What became of an update could not be written down: %s", error)

    async def _once(self, installation: Installation) -> None:
        config = self.config
        mirror = await trio.to_thread.run_sync(self._ask, installation, config, self._relay_url)
        offer = await trio.to_thread.run_sync(look, installation, mirror, config.update, self._clock())
        self.available = offer.version if offer else ""
        if offer is None:
            return
        if config.update.mode == "notify" or not takes_part(self._node_id, offer):
            logger.info("Version %s is there; `towpath update install` installs it.", offer.version)
            return
        await trio.to_thread.run_sync(self._check)
        await trio.to_thread.run_sync(fetch, installation, mirror, offer)
        # Looked at again and again, because what keeps the agent busy ends in many places.
        for _ in range(int(PATIENCE / BUSY_LOOK)):
            if not self._is_busy() or self.config.update.mode != "auto":
                break
            await trio.sleep(BUSY_LOOK)
        if self.config.update.mode != "auto":
            return
        logger.info("Changing to version %s.", offer.version)
        await trio.to_thread.run_sync(self._begin, installation, offer.version, self._config_file)


def start_change(installation: Installation, version: str, config_file: Path) -> None:
    """Have a process of its own change the version; it outlives this agent, and what it says goes to `CHANGE_LOG`.

    Raises OSError, or `NotReplaceable` where the agent would not come back.
    """
    command = [str(installation.current / "bin" / "towpath"), "update", "change", version, "--config", str(config_file)]
    if check_changeable():
        # The service manager ends everything in the agent's own unit together with the agent.
        command = ["systemd-run", "--user", "--collect", "--quiet", *command]
    with open(installation.directory / CHANGE_LOG, "w+b") as said:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, **detached())
