"""Processes that stand still, real ones and played ones, for tests."""

from __future__ import annotations

import time

import trio
import trio.testing

from agent.transfer.stalls.lane_watch import until_lost
from protocol.errors import TowpathError
from protocol.signs_of_life import Posture, Signs, signs_of

STILL = (1.0, 1.0, 1.0, 1.0)


def until_seen(pid: int, posture: Posture) -> Signs:
    for _ in range(1000):
        signs = signs_of(pid)
        if signs is not None and signs.posture is posture:
            return signs
        time.sleep(0.005)
    raise AssertionError(signs)


class Played:
    """A lane process that is seen as it is told to be."""

    def __init__(self, posture: Posture, *, storage: bool | None = True) -> None:
        self.posture, self.storage = posture, storage
        self.marks = STILL
        self.says = False
        self.asked = self._heard = 0
        self.told: list[str] = []

    @property
    def heard(self) -> int:
        self._heard += self.says
        return self._heard

    async def ask(self) -> None:
        self.asked += 1

    def signs(self) -> Signs:
        return Signs(self.posture, self.marks)

    async def storage_answers(self) -> bool | None:
        return self.storage

    def tell(self, error: TowpathError | None) -> None:
        said = "" if error is None else error.code
        if not self.told or self.told[-1] != said:
            self.told.append(said)

    async def watched(self, seconds: float) -> float | None:
        """After how long it is to be ended, if that is within so many seconds."""
        began = trio.current_time()
        with trio.move_on_after(seconds):
            await until_lost(self, self.tell)
            return trio.current_time() - began
        return None
