"""Why a task waits at its destination for the owner of the machine: what is configured, a pause, manners. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from agent.policy import Policy
from protocol.control import TaskObserved
from protocol.errors import NeedsPerson, RetryLater, TowpathError

OWNER: Final = "destination owner"


class Going(Protocol):
    """A task of this machine."""

    @property
    def observed(self) -> TaskObserved: ...

    @property
    def running(self) -> bool: ...

    @property
    def runnable(self) -> bool: ...


def waits_for_person(observed: TaskObserved) -> bool:
    """Whether a task goes on when somebody has done something about it, and not before."""
    return observed.state == "WAITING" and observed.needs_person


def is_drained(tasks: Iterable[Going]) -> bool:
    """Whether of what runs, or would, all waits for people, or for the place of one that does."""
    going = [task for task in tasks if task.running or task.runnable]
    behind = [task for task in going if not task.running and task.observed.status_code == "DESTINATION_BUSY"]
    waiting = [task for task in going if waits_for_person(task.observed)]
    return len(waiting) + (len(behind) if waiting else 0) == len(going)


def why_held_up(
    policy: Policy, collection_id: str, *, held: bool, holds_back: bool, begun: bool
) -> TowpathError | None:
    """What keeps a task from running on a collection of this machine now; None when nothing does.

    ``held``: the owner has paused this task alone. ``holds_back``: the machine holds back by itself for the moment.
    ``begun``: something of the task was done already.
    """
    try:
        policy.check(collection_id, (), "rw")
    except TowpathError as error:
        return error
    if policy.paused:
        sentence = "The owner of the destination has paused this machine; the task goes on when it is resumed."
        return NeedsPerson(sentence, code="PAUSED_BY_OWNER", who=OWNER)
    if policy.draining and not begun:
        sentence = (
            "The owner of the destination is draining this machine: what has begun is finished, and nothing new begins "
            "until it is resumed."
        )
        return NeedsPerson(sentence, code="PAUSED_BY_OWNER", who=OWNER)
    if held:
        sentence = "The owner of the destination has paused this task; it goes on when they resume it."
        return NeedsPerson(sentence, code="PAUSED_BY_OWNER", who=OWNER)
    if holds_back:
        return RetryLater(
            f"The destination holds back: {policy.held_back or 'its machine is in use.'}", code="HELD_BACK"
        )
    return None
