"""Turns at the handshake: bounded, in order, and not to be held up by those who dawdle."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from protocol.round_trip import has_left
from relay.turnstile import Turnstile, WaitedTooLong


class Visitors:
    """Who is inside, and when each came in (virtual seconds)."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.turnstile = turnstile
        self.came: dict[int, float] = {}
        self.inside = self.most = 0

    async def visit(self, number: int, stay: float, *, dawdles: bool = True) -> None:
        async with self.turnstile.turn(lambda: dawdles):
            self.came[number] = round(trio.current_time(), 3)
            self.inside += 1
            self.most = max(self.most, self.inside)
            await trio.sleep(stay)
            self.inside -= 1


async def test_places_are_given_in_order_as_they_become_free(autojump_clock: trio.testing.MockClock) -> None:
    visitors = Visitors(Turnstile(3, 10.0, 60.0))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(visitors.visit, number, 1.0)
            await trio.testing.wait_all_tasks_blocked()
    assert visitors.most == 3
    assert [round(visitors.came[number] - start) for number in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


async def test_who_stays_too_long_holds_up_nobody(autojump_clock: trio.testing.MockClock) -> None:
    visitors = Visitors(Turnstile(2, 0.25, 60.0))
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
    visitors = Visitors(Turnstile(1, 5.0, 60.0))
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


async def test_our_own_slowness_lets_no_more_in(autojump_clock: trio.testing.MockClock) -> None:
    visitors = Visitors(Turnstile(2, 0.25, 60.0))
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(partial(visitors.visit, number, 3.0, dawdles=False))
    assert visitors.most == 2


async def test_nobody_is_let_in_who_has_waited_too_long(autojump_clock: trio.testing.MockClock) -> None:
    """Else the work for those who have given up makes the next ones wait until they have given up, for ever."""
    visitors = Visitors(Turnstile(1, 1000.0, 20.0))
    turned_away: list[int] = []

    async def visit(number: int) -> None:
        try:
            await visitors.visit(number, 8.0)
        except WaitedTooLong:
            turned_away.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(visit, number)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(23)
        # This one finds the others turned away, and not in its way.
        nursery.start_soon(visit, 6)
    assert list(visitors.came) == [0, 1, 2, 6]
    assert turned_away == [3, 4, 5]
    assert visitors.came[6] - visitors.came[0] == pytest.approx(24.0)


async def test_a_caller_that_has_left_is_seen_even_behind_its_words() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        listener,
        await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as caller,
        await listener.accept() as taken,
    ):
        await caller.send_all(b"words")
        assert not has_left(taken.socket)
        await caller.aclose()
        with trio.fail_after(5):
            while not has_left(taken.socket):
                await trio.sleep(0.01)
        assert await taken.receive_some() == b"words"
