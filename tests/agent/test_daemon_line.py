"""What a task's worker hears from its daemon, at moments that are awkward."""

from __future__ import annotations

import msgspec
import pytest

from agent.transfer.asking.source_session import SessionLost
from agent.transfer.daemon_line import DaemonLine
from agent.transfer.processes.channel import Common, Desire, RunTask
from protocol.session import Message, RenewTicket
from tests.agent.orders import order_of


class _Session:
    """A session that is lost, or not, while its run is still settling what has arrived."""

    def __init__(self, *, lost: bool) -> None:
        self.lost = lost
        self.said: list[Message] = []

    def post(self, message: Message) -> None:
        if self.lost:
            raise SessionLost("The connection to the source broke.")
        self.said.append(message)


def _line() -> DaemonLine:
    order = msgspec.structs.replace(order_of(), ticket="old")
    common = Common(node_id="n", node_key=b"", relay_id="r", relay_root="", collections=[])
    return DaemonLine(None, RunTask(common=common, order=order, state_dir="", lanes=1), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", [False, True])
async def test_a_new_ticket_ends_no_worker_whose_session_was_lost_just_now(*, lost: bool) -> None:
    """The relay has one to give when a source is back, which is when its sessions end."""
    line, session = _line(), _Session(lost=lost)
    line._session = session  # type: ignore[assignment]
    line._handle(Desire(desired="run", ticket="new"), [])
    assert line.ticket == "new"
    assert session.said == ([] if lost else [RenewTicket("new")])
    line._handle(Desire(desired="cancel", ticket="newer"), [])
    assert (line.desired, line.ticket) == ("cancel", "newer")
