"""Looks at one process every so often, and asks it when it says nothing; `protocol.standstill` decides."""

from __future__ import annotations

from typing import Protocol

import trio

from protocol.signs_of_life import Posture, Signs
from protocol.standstill import LOOK_EVERY, Standstill


class Watched(Protocol):
    """A process, as it is looked at."""

    @property
    def heard(self) -> int:
        """How often something has come from it."""

    async def ask(self) -> None:
        """Have it say something. It is not asked again before it was heard."""

    def signs(self) -> Signs | None:
        """What the system tells of it."""


class Looks:
    """At one process, from now on."""

    def __init__(self, process: Watched) -> None:
        self._process = process
        self._standstill = Standstill(trio.current_time())
        self._heard, self._asked = process.heard, False

    @property
    def seconds(self) -> float:
        """For how long it has stood still."""
        return self._standstill.seconds

    async def next(self) -> Posture | None:
        """Wait until it is time to look again: what it is in, when it counts as standing still."""
        await trio.sleep(LOOK_EVERY)
        heard = self._process.heard
        said, self._heard = heard != self._heard, heard
        if said:
            self._asked = False
        elif not self._asked:
            self._asked = True
            await self._process.ask()
        signs = None if said else self._process.signs()
        return self._standstill.look(trio.current_time(), heard=said, signs=signs)
