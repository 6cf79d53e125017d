"""Event lines for the relay: what is urgent passes what only tells of progress. In virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from agent.transfer.tasks.outbox import MAX_UNREAD, PROGRESS_EVERY, UNREAD_LIFE, Outbox
from protocol.control import AgentEvent


class Store:
    """Keeps lines; nothing here needs a disk."""

    def __init__(self) -> None:
        self.lines: list[AgentEvent] = []

    def events_after(self, after: int) -> list[AgentEvent]:
        return [line for line in self.lines if line.n > after]


def passing(kind: str, task_id: str = "one") -> AgentEvent:
    return AgentEvent(n=0, kind=kind, time="", task_id=task_id)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(work: Any, *arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


async def follow(lines: AsyncIterator[AgentEvent], seen: list[tuple[float, str]]) -> None:
    async for line in lines:
        seen.append((trio.current_time(), line.kind))


@pytest.mark.usefixtures("at_once")
async def test_an_offer_does_not_wait_behind_progress(autojump_clock: trio.testing.MockClock) -> None:
    store = Store()
    outbox = Outbox(store)  # type: ignore[arg-type]
    seen: list[tuple[float, str]] = []
    async with outbox.read(0) as lines, trio.open_nursery() as nursery:
        nursery.start_soon(follow, lines, seen)
        begun = trio.current_time()
        for index in range(4):
            await trio.sleep(0.01)
            outbox.passing(passing("progress", str(index % 2)))
        outbox.passing(passing("path_offer"))
        await trio.sleep(0.01)
        store.lines.append(AgentEvent(n=1, kind="event", time=""))
        outbox.durable()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [(pytest.approx(when - begun, abs=1e-3), kind) for when, kind in seen] == [
        (0.01, "progress"),
        (0.04, "path_offer"),
        (0.05, "event"),
        # What both tasks said meanwhile, the newest of each.
        (0.01 + PROGRESS_EVERY, "progress"),
        (0.01 + PROGRESS_EVERY, "progress"),
    ]


async def first_lines(outbox: Outbox) -> list[tuple[str, str]]:
    """What a reader that comes now has at once."""
    seen: list[tuple[str, str]] = []
    with trio.move_on_after(1):
        async with outbox.read(0) as lines:
            async for line in lines:
                seen.append((line.task_id, line.kind))
    return seen


@pytest.mark.usefixtures("at_once")
async def test_what_is_asked_before_there_is_a_link_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    outbox = Outbox(Store())  # type: ignore[arg-type]
    outbox.passing(passing("session_wanted", "long ago"))
    await trio.sleep(UNREAD_LIFE + 1)
    for kind in ("session_wanted", "path_offer", "session_wanted", "progress", "collections"):
        outbox.passing(passing(kind))
    # The newest comes last; of what the link tells anyway nothing is kept.
    assert await first_lines(outbox) == [("one", "path_offer"), ("one", "session_wanted")]
    assert await first_lines(outbox) == []


@pytest.mark.usefixtures("at_once")
async def test_of_much_that_nobody_reads_the_newest_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    outbox = Outbox(Store())  # type: ignore[arg-type]
    for number in range(MAX_UNREAD + 5):
        outbox.passing(passing("session_wanted", str(number)))
    lines = await first_lines(outbox)
    assert len(lines) == MAX_UNREAD
    assert lines[0][0] == "5"
