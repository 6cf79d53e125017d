"""Looks after one worker from the daemon: whether it stands still as a whole, and when it is to be ended for that.

One that was stopped is ended; its lane processes end with it, and what follows it waits for the task's lock until none
is left. One that hangs in a call of storage goes on when that answers: another one would hang there as well. Any other
that hangs is ended in the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import trio

from agent.transfer.processes.channel import Channel, ChannelClosed
from agent.transfer.processes.message_buffer import AreYouThere
from agent.transfer.stalls.looks import Looks
from protocol.errors import RetryLater, TowpathError
from protocol.signs_of_life import Posture, Signs, signs_of
from protocol.standstill import HANGS_FOR, LOOK_EVERY, STOPPED_FOR

# How often one that hangs counts as one that will hang for ever.
HANGS_FOR_EVER = 2

TellStandstill = Callable[[TowpathError], Awaitable[None]]


class _Worker:
    """The process at the other end of a channel, as it is looked at."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def heard(self) -> int:
        return self._channel.heard

    async def ask(self) -> None:
        # One that is gone is noticed by whoever listens to it. Somebody else may have waited to send for long.
        with contextlib.suppress(ChannelClosed), trio.move_on_after(LOOK_EVERY / 2):
            await self._channel.send(AreYouThere())

    def signs(self) -> Signs | None:
        return None if self._channel.pid is None else signs_of(self._channel.pid)


async def until_lost(channel: Channel, tell: TellStandstill) -> TowpathError:
    """Return when the worker at the other end is to be ended, and why. ``tell`` hears, at every look, why it stands
    still and goes on to do so; what it says itself after that holds again."""
    looks = Looks(_Worker(channel))
    while True:
        posture = await looks.next()
        if posture is Posture.STOPPED:
            return _stopped()
        if posture is Posture.TRACED:
            await tell(_traced())
        elif posture is Posture.WAITS and looks.seconds >= HANGS_FOR_EVER * HANGS_FOR:
            return _hung()
        elif posture is not None:
            await tell(_hangs())


def _stopped() -> TowpathError:
    return RetryLater(
        f"The process of this task was stopped by a signal, and stood still for {STOPPED_FOR:.0f} s. It is ended, and "
        "another one goes on.",
        code="PROCESS_STOPPED",
    )


def _traced() -> TowpathError:
    return RetryLater(
        "The process of this task is held by a debugger; the task goes on with it.",
        code="PROCESS_STOPPED",
        who="destination owner",
    )


def _hangs() -> TowpathError:
    return RetryLater(
        f"The process of this task has hung in one call for {HANGS_FOR:.0f} s, perhaps because the disk or file server "
        "with the agent's state does not answer.",
        code="PROCESS_HANGS",
    )


def _hung() -> TowpathError:
    return RetryLater(
        f"The process of this task has hung in one call for {HANGS_FOR_EVER * HANGS_FOR:.0f} s. It is ended, and "
        "another one goes on.",
        code="PROCESS_HANGS",
    )
