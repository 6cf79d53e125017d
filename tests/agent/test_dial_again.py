"""A source that is away is dialled again where it was, while the relay is asked where it may be now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock

from agent.connect.finder import PathFinder
from agent.transfer.tasks import task_paths
from agent.transfer.tasks.task_paths import ANSWER_TIMEOUT, DIAL_AGAIN, TaskPaths
from protocol.control import AgentEvent, Party, SessionAnswer
from protocol.errors import RetryLater
from tests.agent.orders import order_of


class Finder:
    """Finds the source once it is there; each look takes no time."""

    why = "connection refused"
    path = None

    def __init__(self, there_at: float) -> None:
        self.there_at = trio.current_time() + there_at
        self.tries = 0

    async def connect(self, *, begins: bool) -> str:
        self.tries += 1
        await trio.lowlevel.checkpoint()
        if trio.current_time() < self.there_at:
            raise RetryLater("Nobody answers.", code="CONNECT_FAILED")
        return "connected"

    def take_answer(self, answer: SessionAnswer) -> None:
        pass


def answer(generation: int) -> SessionAnswer:
    return SessionAnswer(session_id="s", generation=generation, candidates=[], certificate="")


def paths(monkeypatch: pytest.MonkeyPatch, there_at: float, asked: list[AgentEvent]) -> tuple[TaskPaths, Finder]:
    finder = Finder(there_at)
    monkeypatch.setattr(task_paths, "PathFinder", lambda *_, **__: cast(PathFinder, finder))
    limits = SimpleNamespace(lanes=2)
    node = SimpleNamespace(
        node_id="n",
        network=SimpleNamespace(linked=trio.Event()),
        config=SimpleNamespace(limits=limits),
        outbox=SimpleNamespace(passing=asked.append),
    )
    party = Party(endpoint_id="e", node_id="m", collection_id="c", certificate="certificate")
    order = msgspec.structs.replace(order_of(), source=party)
    return TaskPaths(cast(Any, node), order, answer(1), lambda _path: None), finder


async def test_it_is_found_within_a_moment_of_its_return(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AgentEvent] = []
    made, finder = paths(monkeypatch, 7.3, asked)
    began = trio.current_time()
    assert await made.connect() == ("connected", "certificate")
    assert trio.current_time() - began <= 7.3 + DIAL_AGAIN
    assert finder.tries < 12
    assert {event.kind for event in asked} == {"session_wanted"}
    assert 1 < len(asked) <= 3


async def test_one_that_is_back_soon_is_found_soon(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    for there_at, late in ((0.05, 0.1), (0.2, 0.2), (0.5, 0.4)):
        made, _ = paths(monkeypatch, there_at, [])
        began = trio.current_time()
        await made.connect()
        assert there_at <= trio.current_time() - began <= there_at + late


async def test_a_newer_answer_is_tried_at_once_and_counts(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the relay says now is where the source is: if it does not answer there, that is the news."""
    made, _ = paths(monkeypatch, 100.0, [])
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def tell() -> None:
            await trio.sleep(2.5)
            made.take_answer(answer(2))

        nursery.start_soon(tell)
        with pytest.raises(RetryLater) as caught:
            await made.connect()
    assert caught.value.code == "CONNECT_FAILED"
    assert trio.current_time() - began == pytest.approx(2.5)


async def test_one_that_stays_away_is_reported(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = paths(monkeypatch, 1000.0, [])
    began = trio.current_time()
    with pytest.raises(RetryLater) as caught:
        await made.connect()
    assert caught.value.code == "GC_NOT_CONNECTED"
    assert "connection refused" in caught.value.sentence
    assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT, abs=2 * DIAL_AGAIN)


async def test_a_link_is_made_use_of_at_once(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task begins before its agent is linked; what it can only have with the relay's help it tries again then."""
    asked: list[AgentEvent] = []
    made, finder = paths(monkeypatch, 1.25, asked)
    network = made._node.network
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def link() -> None:
            await trio.sleep(1.25)
            network.linked.set()
            network.linked = trio.Event()

        nursery.start_soon(link)
        await made.connect()
    assert trio.current_time() - began == pytest.approx(1.25)
    # Four times before, ever later.
    assert finder.tries == 5
    # The relay is asked anew: before that it could not hear.
    assert len(asked) == 2
