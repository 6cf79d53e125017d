"""Why a task waits at its destination for the owner of the machine: what is configured, a pause, manners. No I/O."""

from __future__ import annotations

from typing import Final

import msgspec

from agent.policy import Policy
from protocol.control import TaskObserved
from protocol.errors import NeedsPerson, RetryLater, TowpathError

# What a task says that has not begun and that nobody holds up.
_WAITS_FOR_TURN = ("", "OK", "QUEUED", "DESTINATION_BUSY")
OWNER: Final = "destination owner"


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


def told(observed: TaskObserved, error: TowpathError | None) -> TaskObserved:
    """What is observed of a task that no worker runs, when this holds it up, or nothing does any more.

    One that has not begun stays QUEUED, so that cancelling it takes no worker.
    """
    if error is not None:
        state = "QUEUED" if observed.state == "QUEUED" else "PAUSED"
        # Errors of the policy name nobody: whatever is configured here is for the owner to change.
        who = "" if error.disposition == "retry" else OWNER
        return msgspec.structs.replace(
            observed,
            state=state,
            status_code=error.code,
            status_sentence=error.sentence,
            who=who,
            # Nothing moves, whatever was measured last.
            rate=0.0,
            flow=None,
        )
    if observed.state == "PAUSED" or (observed.state == "QUEUED" and observed.status_code not in _WAITS_FOR_TURN):
        return msgspec.structs.replace(observed, state="QUEUED", status_code="QUEUED", status_sentence="", who="")
    return observed
