"""Looks for updates every now and then, and has them installed when that disturbs nobody.

Only in an agent that runs from a bundle. ``auto`` waits for a moment without running tasks, at most `PATIENCE`; then
tasks are checkpointed like at any stop, and go on in the new version. ``notify`` only says that there is one.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import trio

from agent.config.keys import AgentConfig, UpdateConfig
from agent.update.install import Installation, NotInstalled
from agent.update.mirror import HttpFetcher, Mirror
from agent.update.offer import Offer, is_newer, takes_part, this_platform
from protocol.errors import TowpathError

logger = logging.getLogger("towpath.update")

FIRST_LOOK = 300.0
LOOK_EVERY = 6 * 3600.0
PATIENCE = 24 * 3600.0
BUSY_LOOK = 60.0


def mirror_for(installation: Installation, config: AgentConfig, relay_url: str) -> Mirror:
    """The configured mirror, by default the relay. Raises OSError."""
    url = config.update.mirror or f"{relay_url.rstrip('/')}/updates"
    return Mirror(installation.directory, installation.pinned_root(), url, HttpFetcher(config.relay.ca_file))


def look(installation: Installation, mirror: Mirror, config: UpdateConfig, now: float) -> Offer | None:
    """Ask for an update and remember what came of it; an offer that is newer and has not failed here. Blocks.

    Raises `TowpathError`.
    """
    state = installation.state()
    state.last_check = now
    try:
        offer = mirror.offer(config.channel, this_platform())
        state.last_problem = ""
    except TowpathError as error:
        state.last_problem = error.sentence
        installation.remember(state)
        raise
    if offer is not None and (not is_newer(offer.version, installation.running()) or offer.version in state.failed):
        offer = None
    state.available = offer.version if offer else ""
    installation.remember(state)
    return offer


def fetch(installation: Installation, mirror: Mirror, offer: Offer) -> None:
    """Download, verify and unpack an offer. Blocks. Raises `TowpathError` or OSError."""
    bundle = mirror.download(offer)
    installation.unpack(bundle, offer.version, offer.platform)
    bundle.unlink(missing_ok=True)


class UpdateService:
    """The agent's own looking for updates."""

    def __init__(
        self,
        config: AgentConfig,
        config_file: Path,
        node_id: str,
        relay_url: str,
        is_busy: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self._config_file = config_file
        self._node_id = node_id
        self._relay_url = relay_url
        self._is_busy = is_busy
        self._clock = clock
        self.available = ""
        try:
            self._installation: Installation | None = Installation.here()
        except NotInstalled:
            self._installation = None

    async def run(self) -> None:
        """Until cancelled; ends at once where there is nothing to update."""
        if self._installation is None:
            return
        await self._settle(self._installation, proved=False)
        await trio.sleep(FIRST_LOOK * random.uniform(0.5, 1.5))  # noqa: S311 - only spreads the load
        await self._settle(self._installation, proved=True)
        while True:
            if self.config.update.mode != "off":
                try:
                    await self._once(self._installation)
                except (TowpathError, OSError) as error:
                    logger.warning("No update: %s", error)
            await trio.sleep(LOOK_EVERY * random.uniform(0.8, 1.2))  # noqa: S311

    @staticmethod
    async def _settle(installation: Installation, *, proved: bool) -> None:
        try:
            await trio.to_thread.run_sync(lambda: installation.settle(proved=proved))
        except OSError as error:
            logger.warning("What became of an update could not be written down: %s", error)

    async def _once(self, installation: Installation) -> None:
        config = self.config
        mirror = await trio.to_thread.run_sync(mirror_for, installation, config, self._relay_url)
        offer = await trio.to_thread.run_sync(look, installation, mirror, config.update, self._clock())
        self.available = offer.version if offer else ""
        if offer is None:
            return
        if config.update.mode == "notify" or not takes_part(self._node_id, offer):
            logger.info("Version %s is there; `towpath update` installs it.", offer.version)
            return
        await trio.to_thread.run_sync(fetch, installation, mirror, offer)
        # Looked at again and again, because what keeps the agent busy ends in many places.
        for _ in range(int(PATIENCE / BUSY_LOOK)):
            if not self._is_busy():
                break
            await trio.sleep(BUSY_LOOK)
        if self.config.update.mode != "auto":
            return
        logger.info("Changing to version %s.", offer.version)
        await trio.to_thread.run_sync(start_change, installation, offer.version, self._config_file)


def start_change(installation: Installation, version: str, config_file: Path) -> None:
    """Have a process of its own change the version; it outlives this agent. Raises OSError."""
    command = [str(installation.current / "bin" / "towpath"), "update", "change", version, "--config", str(config_file)]
    if os.environ.get("INVOCATION_ID") and shutil.which("systemd-run"):
        # The service manager ends everything in the agent's own unit together with the agent.
        command = ["systemd-run", "--user", "--collect", "--quiet", *command]
    null = subprocess.DEVNULL
    subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
