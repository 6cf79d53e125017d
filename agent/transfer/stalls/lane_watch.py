"""Looks after one lane process from its worker: whether it stands still as a whole, and what is done about that.

One that was stopped is ended, whatever it was about to do: the kernel ends stopped processes, so that none goes on when
others write what it had. One that hangs in a call is ended where its storage answers others. Where it does not, nothing
would be gained: whoever took the work over would hang as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agent.transfer.stalls.looks import Looks, Watched
from protocol.errors import RetryLater, TowpathError
from protocol.signs_of_life import Posture
from protocol.standstill import HANGS_FOR, STOPPED_FOR

# What stands still, or None once nothing does any more.
TellStandstill = Callable[[TowpathError | None], None]


class WatchedLanes(Watched, Protocol):
    """A lane process, as it is looked at."""

    async def storage_answers(self) -> bool | None:
        """Whether the storage that it writes to answers others; None when it cannot be asked now."""


async def until_lost(process: WatchedLanes, tell: TellStandstill) -> None:
    """Return when the process is to be ended."""
    looks, answered = Looks(process), False
    while True:
        posture = await looks.next()
        if posture is None:
            answered = False
            tell(None)
        elif posture is Posture.STOPPED:
            tell(_stopped())
            return
        elif posture is Posture.TRACED:
            tell(_traced())
        elif not (answers := await process.storage_answers()):
            answered = False
            if answers is not None:
                tell(storage_silent())
        elif answered:
            tell(_hangs())
            return
        else:
            # Storage may have come back just now: then the process does something before the next look.
            answered = True


def _stopped() -> TowpathError:
    return RetryLater(
        f"A process that receives for this task at the destination was stopped by a signal, and stood still for "
        f"{STOPPED_FOR:.0f} s. It is ended, and what it had not told of is transferred again.",
        code="PROCESS_STOPPED",
    )


def _traced() -> TowpathError:
    return RetryLater(
        "A process that receives for this task at the destination is held by a debugger; the task goes on with it.",
        code="PROCESS_STOPPED",
        who="destination owner",
    )


def _hangs() -> TowpathError:
    return RetryLater(
        f"A process that receives for this task at the destination has hung in one call for {HANGS_FOR:.0f} s, while "
        "storage answers others. It is ended, and what it had not told of is transferred again.",
        code="PROCESS_HANGS",
    )


def storage_silent() -> TowpathError:
    """Of storage that everybody waits for."""
    return RetryLater(
        f"The destination's storage does not answer: this task has waited for it for {HANGS_FOR:.0f} s. It goes on "
        "when it does.",
        code="STORAGE_SILENT",
    )


def source_silent() -> RetryLater:
    """Of storage that a source waits for, as it says."""
    return RetryLater(
        "The source's storage does not answer: its disk or file server is waited for. The task goes on when it does.",
        code="STORAGE_SILENT",
    )


def stays() -> TowpathError:
    """Of a process that was ended and is still there."""
    return RetryLater(
        "A process of this task was ended, but hangs in a call of the destination's storage. It might still write, so "
        "that the task waits until it is gone.",
        code="PROCESS_HANGS",
    )
