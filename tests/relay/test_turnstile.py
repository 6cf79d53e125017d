"""Turns at the handshake: bounded, in order, and not to be held up by those who dawdle."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from relay.turnstile import Turnstile


class Visitors:
    """Who is inside, and when each came in (virtual seconds)."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.turnstile = turnstile
        self.came: dict[int, float] = {}
        self.inside = self.most = 0

    async def visit(self, number: int, stay: float) -> None:
        async with self.turnstile.turn():
            self.came[number] = round(trio.current_time(), 3)
            self.inside += 1
            self.most = max(self.most, self.inside)
            await trio.sleep(stay)
            self.inside -= 1


async def test_places_are_given_in_order_as_they_become_free(autojump_clock: trio.testing.MockClock) -> None:
    visitors = Visitors(Turnstile(3, 10.0))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(visitors.visit, number, 1.0)
            await trio.testing.wait_all_tasks_blocked()
    assert visitors.most == 3
    assert [round(visitors.came[number] - start) for number in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


async def test_who_stays_too_long_holds_up_nobody(autojump_clock: trio.testing.MockClock) -> None:
    visitors = Visitors(Turnstile(2, 0.25))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(visitors.visit, number, 100.0)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        # All are in, though nobody has left; and whoever leaves late frees no place twice.
        assert [round(visitors.came[number] - start, 2) for number in range(6)] == [0, 0, 0.25, 0.25, 0.5, 0.5]
    second = trio.current_time()
    visitors.most = 0
    async with trio.open_nursery() as nursery:
        for number in range(6, 10):
            nursery.start_soon(visitors.visit, number, 0.1)
    assert visitors.most == 2
    assert trio.current_time() - second == pytest.approx(0.2)


async def test_one_who_gives_up_at_the_door_lets_the_next_come(autojump_clock: trio.testing.MockClock) -> None:
    visitors = Visitors(Turnstile(1, 5.0))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visitors.visit, 0, 1.0)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.5):
            async with trio.open_nursery() as leaving:
                leaving.start_soon(visitors.visit, 1, 1.0)
                leaving.start_soon(visitors.visit, 2, 1.0)
        nursery.start_soon(visitors.visit, 3, 1.0)
    assert visitors.came.keys() == {0, 3}
    assert visitors.came[3] - start == pytest.approx(1.0)
