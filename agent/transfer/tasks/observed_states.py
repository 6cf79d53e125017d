"""What the daemon itself says is observed of a task, where no worker does: held up, behind another one, cancelled,
standing still. No I/O."""

from __future__ import annotations

import msgspec

from agent.transfer.basis.times import now_iso
from agent.transfer.tasks.held_up import OWNER
from protocol.control import TaskObserved, TaskOrder
from protocol.errors import NeedsPerson, TowpathError

# What a task says that has not begun and that nobody holds up.
_WAITS_FOR_TURN = ("", "OK", "QUEUED", "DESTINATION_BUSY")


def held_up_by(observed: TaskObserved, error: TowpathError | None) -> TaskObserved:
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
            needs_person=who != "",
            # Nothing moves, whatever was measured last.
            rate=0.0,
            flow=None,
        )
    if observed.state == "PAUSED" or (observed.state == "QUEUED" and observed.status_code not in _WAITS_FOR_TURN):
        return msgspec.structs.replace(
            observed, state="QUEUED", status_code="QUEUED", status_sentence="", who="", needs_person=False
        )
    return observed


def behind(observed: TaskObserved, order: TaskOrder, holder: TaskOrder) -> TaskObserved:
    """Another task has the place that this one writes to."""
    name = f"Task {holder.task_id}" if holder.owner_id == order.owner_id else "A task of somebody else"
    return msgspec.structs.replace(
        observed,
        state="QUEUED",
        status_code="DESTINATION_BUSY",
        status_sentence=f"{name} writes to the same place; this one follows when it has ended or is paused.",
        who="",
        needs_person=False,
    )


def canceled(observed: TaskObserved) -> TaskObserved:
    """Ended as it is."""
    return msgspec.structs.replace(
        observed,
        state="CANCELED",
        status_code="CANCELED",
        status_sentence="",
        who="",
        needs_person=False,
        completion_time=now_iso(),
    )


def standing_still(observed: TaskObserved, error: TowpathError) -> TaskObserved:
    """Its worker stands still, and this is why."""
    return msgspec.structs.replace(
        observed,
        state="WAITING",
        status_code=error.code,
        status_sentence=error.sentence,
        who=error.who,
        needs_person=isinstance(error, NeedsPerson),
        # As of one that is held up: nothing moves, whatever was measured last.
        rate=0.0,
        flow=None,
    )
