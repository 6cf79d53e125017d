"""What a destination can be told of its source before the source was asked: where it said at its link that it can be
dialled, and a path that the relay arranges for both at once. So a first byte need not wait for one side's answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocol.candidates import Arrangement, Candidate
from protocol.control import ARRANGED, MEETS, TUNNELLED, SessionAnswer
from relay.transfer.agents import AgentLinks
from relay.transfer.parties import Side
from relay.transfer.task_rows import Task


class Arranges(Protocol):
    """Who arranges paths (`relay.rendezvous.signalling`)."""

    def arrange(
        self,
        session_id: str,
        task_id: str,
        destination: str,
        source: str,
        owner_id: str,
        hosts: tuple[list[Candidate], list[Candidate]],
        *,
        tunnel: bool,
        meet: bool,
    ) -> tuple[Arrangement, Arrangement]:
        """For the destination and for the source, whose standing candidates ``hosts`` are."""


@dataclass(frozen=True)
class Ahead:
    """The source's answer as far as it is known, and what is arranged for the destination and for the source."""

    answer: SessionAnswer
    destination: Arrangement | None = None
    source: Arrangement | None = None


def told_ahead(links: AgentLinks, paths: Arranges, task: Task, worker: Side, source: Side) -> Ahead | None:
    """None where the source has to be asked first: it is of a version before, or away, or both sides are one node.

    A path is arranged for the first order of a task: at a later one it has one, or looks for one.
    """
    hello = links.hello(source.node_id)
    if hello is None or ARRANGED not in hello.abilities or source.node_id == worker.node_id:
        return None
    answer = SessionAnswer(
        session_id=task.session_id,
        generation=0,
        candidates=hello.candidates,
        certificate=source.party.certificate,
        observed=links.address(worker.node_id),
        peer_observed=links.address(source.node_id),
    )
    other = links.hello(worker.node_id)
    if task.delivered or other is None or ARRANGED not in other.abilities or task.task_options.transport == "quic":
        return Ahead(answer)
    arranged = paths.arrange(
        task.session_id,
        task.id,
        worker.node_id,
        source.node_id,
        task.owner_id,
        (other.candidates, hello.candidates),
        tunnel=task.task_options.relay_path != "never" and all(TUNNELLED in each.abilities for each in (hello, other)),
        meet=all(MEETS in each.abilities for each in (hello, other)),
    )
    return Ahead(answer, *arranged)
