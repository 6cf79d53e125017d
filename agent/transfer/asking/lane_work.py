"""What one lane has to do, and the process that receives on it where that is another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio

from agent.transfer.asking.end_game import LaneSpeed
from agent.transfer.basis.jobs import Request


class Elsewhere(Protocol):
    """A lane that another process receives on: what it writes is known when it says so."""

    def expect(self, request: Request) -> None:
        """Have it take what is about to be asked for."""

    def discard(self, r: int) -> None:
        """Have it leave lying what comes of a request."""

    def withdraw(self, r: int) -> None:
        """Have nothing more of a request written; `Fetcher.relinquished` follows."""


@dataclass(eq=False)
class LaneWork:
    """What one lane has to do."""

    number: int
    outstanding: dict[int, Request] = field(default_factory=dict)
    size: int = 0
    speed: LaneSpeed = field(default_factory=LaneSpeed)
    # It was without work at the last measurement, too.
    idle: bool = False
    # Set for a lane that gets no more work; the event says that it has nothing left.
    drained: trio.Event | None = None
    # What was asked of it is its own to the end: it is not slow, it only leaves.
    keeps: bool = False
    elsewhere: Elsewhere | None = None
