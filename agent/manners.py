"""Manners on a machine that people use: transfers wait on battery, on a metered network, or while the machine is busy.

`decide` is a plain function with a memory of one state, so that nothing flaps; `look` asks the system (psutil, and
NetworkManager's own command for whether the network is metered).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil
import trio

from agent.config.keys import MannersConfig

logger = logging.getLogger("towpath.agent")

LOOK_EVERY = 20.0
# A machine has been busy for so many looks before it counts, and quiet for as many before it counts no more.
LOOKS = 3
QUIETER = 0.8


@dataclass(frozen=True)
class Conditions:
    """The machine at this moment; None where the system cannot say. ``others`` is the percentage of all processors that
    programs other than the agent use."""

    on_battery: bool | None = None
    metered: bool | None = None
    others: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Why transfers wait, as a sentence (empty: they do not), and how many looks spoke for a change of that."""

    reason: str = ""
    busy: bool = False
    contrary: int = 0


def decide(config: MannersConfig, now: Conditions, before: Verdict) -> Verdict:
    """What manners want now."""
    busy, contrary = _busy(config, now, before)
    if config.on_battery == "pause" and now.on_battery:
        return Verdict("This machine runs on battery; transfers go on when it is plugged in.", busy, contrary)
    if config.on_metered == "pause" and now.metered:
        return Verdict("The network is metered; transfers go on in another one.", busy, contrary)
    if busy:
        return Verdict("Other programs need this machine; transfers go on when it is quieter.", busy, contrary)
    return Verdict("", busy, contrary)


def _busy(config: MannersConfig, now: Conditions, before: Verdict) -> tuple[bool, int]:
    if config.busy_above is None or now.others is None:
        return False, 0
    limit = config.busy_above * (QUIETER if before.busy else 1.0)
    if (now.others > limit) == before.busy:
        return before.busy, 0
    if before.contrary + 1 < LOOKS:
        return before.busy, before.contrary + 1
    return not before.busy, 0


class Observer:
    """Looks at the machine. Blocks for a moment; the first look knows nothing of other programs' use yet."""

    def __init__(self) -> None:
        self._own = 0.0
        self._total = 0.0
        self._idle = 0.0

    def look(self, config: MannersConfig) -> Conditions:
        """What the configuration wants to know."""
        return Conditions(
            on_battery=_on_battery() if config.on_battery == "pause" else None,
            metered=_metered() if config.on_metered == "pause" else None,
            others=self._others() if config.busy_above is not None else None,
        )

    def _others(self) -> float | None:
        times = psutil.cpu_times()
        total, idle = sum(times), times.idle + getattr(times, "iowait", 0.0)
        own = _own_seconds()
        spent, waited, ours = total - self._total, idle - self._idle, max(0.0, own - self._own)
        first = self._total == 0.0
        self._total, self._idle, self._own = total, idle, own
        return None if first or spent <= 0 else max(0.0, min(100.0, 100 * (spent - waited - ours) / spent))


def _own_seconds() -> float:
    """Processor time of the agent and its workers."""
    process = psutil.Process()
    seconds = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            seconds += times.user + times.system
    return seconds


def _on_battery() -> bool | None:
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):
        return None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _metered() -> bool | None:
    command = shutil.which("nmcli")
    if command is None:
        return None
    try:
        result = subprocess.run(
            [command, "-t", "-f", "GENERAL.STATE,GENERAL.METERED", "device", "show"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_metered(result.stdout) if result.returncode == 0 else None


def parse_metered(text: str) -> bool | None:
    """Whether a connected device is metered, from nmcli's terse output."""
    connected, answers = False, []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "GENERAL.STATE":
            connected = value.startswith("100")
        elif key == "GENERAL.METERED" and connected:
            answers.append(value.startswith("yes"))
    return any(answers) if answers else None


class Manners:
    """Looks every now and then and has transfers held back or let go on. ``apply`` gets the reason, or empty text."""

    def __init__(self, config: Callable[[], MannersConfig], apply: Callable[[str], Awaitable[None]]) -> None:
        self._config = config
        self._apply = apply
        self.verdict = Verdict()

    async def run(self) -> None:
        """Until cancelled."""
        observer = Observer()
        while True:
            config = self._config()
            try:
                now = await trio.to_thread.run_sync(observer.look, config) if config.wanted else Conditions()
            except OSError as error:
                # No descriptor to look with: what was decided holds until there is one.
                logger.warning("This machine cannot be looked at now: %s.", error.strerror or error)
                await trio.sleep(LOOK_EVERY)
                continue
            before, self.verdict = self.verdict, decide(config, now, self.verdict)
            if before.reason != self.verdict.reason:
                logger.info("%s", self.verdict.reason or "Transfers go on.")
                await self._apply(self.verdict.reason)
            await trio.sleep(LOOK_EVERY)
