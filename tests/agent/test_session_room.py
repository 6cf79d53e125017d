"""As many sessions on a collection as its owner allows, and never one more, whoever comes at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from agent.config.keys import CollectionConfig, CollectionLimits
from agent.policy import Policy
from agent.transfer.tasks.served_session import PLACE_KEPT, ServedSessions
from protocol.errors import RetryLater

ONE = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"


class Nursery:
    """Keeps what would run."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def start_soon(self, _function: object, order: Any, _served: object) -> None:
        self.begun.append(order.session_id)


@pytest.fixture
def sessions() -> ServedSessions:
    collection = CollectionConfig(id=ONE, name="One", root="/data", limits=CollectionLimits(sessions=1))
    made = ServedSessions(cast("Any", SimpleNamespace(policy=Policy([collection]))))
    made.nursery = cast("trio.Nursery", Nursery())
    return made


def comes(sessions: ServedSessions, session_id: str) -> bool:
    return sessions._worker_of(cast("Any", SimpleNamespace(session_id=session_id)), ONE) is not None


async def test_the_second_is_told_to_wait_while_the_first_is_on_its_way(
    sessions: ServedSessions, autojump_clock: object
) -> None:
    sessions.check_room("a", ONE)
    with pytest.raises(RetryLater, match="as many sessions"):
        sessions.check_room("b", ONE)
    # Announced once more, as after a restart of the relay, it keeps its place.
    sessions.check_room("a", ONE)
    await trio.sleep(PLACE_KEPT + 1)
    sessions.check_room("b", ONE)
    with pytest.raises(RetryLater):
        sessions.check_room("a", ONE)


async def test_of_those_that_come_at_once_no_more_get_in_than_may(
    sessions: ServedSessions, autojump_clock: object
) -> None:
    """Both were announced, one of them long ago."""
    sessions.check_room("a", ONE)
    await trio.sleep(PLACE_KEPT + 1)
    sessions.check_room("b", ONE)
    assert comes(sessions, "b")
    assert not comes(sessions, "a")
    assert comes(sessions, "b"), "more connections of the same session"
    assert (sessions.count, sessions.refused) == (1, 1)


async def test_a_session_that_was_cut_leaves_its_place_to_others(sessions: ServedSessions) -> None:
    sessions.check_room("a", ONE)
    assert comes(sessions, "a")
    sessions.cut("a")
    sessions.check_room("b", ONE)
    assert comes(sessions, "b")
