"""Which step a task needs next to be with its agents as it is meant to be: a plain function of what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocol.control import FINAL_STATES
from relay.transfer.task_rows import Task


class Step(Enum):
    """What a task needs next."""

    NOTHING = "nothing"
    WAIT_FOR_WORKER = "wait for the agent that drives the task"
    SEND_ORDER = "send the order"
    OFFER_SESSION = "ask the source for a session and pass its answer on"
    WITHDRAW_SESSION = "withdraw the ticket at the source"
    CLOSE = "let the agent forget the task"


@dataclass(frozen=True)
class Situation:
    """What decides the next step. ``session_wanted``: the agent needs a (newer) way to the source."""

    worker_connected: bool
    source_connected: bool
    session_wanted: bool
    keep_until: float


def next_step(task: Task, situation: Situation, now: float) -> Step:
    """The one thing to do for a task now. Stopping comes before everything else, and closing the source first of all:
    it is where data would still flow out."""
    observed = task.last_observed
    agent_done = observed is not None and observed.state in FINAL_STATES
    order_due = task.delivered < task.revision
    if task.finished:
        if task.session_open and situation.source_connected:
            return Step.WITHDRAW_SESSION
        if task.attempted and order_due and task.desired == "cancel" and not agent_done and situation.worker_connected:
            return Step.SEND_ORDER
        told = agent_done or not order_due
        if not task.closed and told and now >= situation.keep_until and situation.worker_connected:
            return Step.CLOSE
        return Step.NOTHING
    if task.desired == "pause":
        if task.session_open and situation.source_connected:
            return Step.WITHDRAW_SESSION
        if not task.attempted:
            return Step.NOTHING
    if not situation.worker_connected:
        return Step.WAIT_FOR_WORKER
    if order_due:
        return Step.SEND_ORDER
    if situation.session_wanted and situation.source_connected and task.desired == "run":
        return Step.OFFER_SESSION
    return Step.NOTHING
