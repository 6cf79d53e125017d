"""Lets a bounded number work at a time and the others wait in order, without those who dawdle holding anybody up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Turnstile:
    """``places`` may be inside at a time. Whoever stays longer than ``longest`` seconds stays, and no longer counts."""

    def __init__(self, places: int, longest: float) -> None:
        self._places = places
        self._longest = longest
        # Who is inside, by when each came; so the first is the first whose time is over.
        self._inside: dict[object, float] = {}
        self._door = trio.Lock()
        self._left = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place, in the order of arrival, and hold it."""
        ticket = object()
        async with self._door:
            # One waits here with a clock, everybody else at the door without.
            while not self._has_room(trio.current_time()):
                with trio.move_on_at(next(iter(self._inside.values())) + self._longest):
                    await self._left.park()
            self._inside[ticket] = trio.current_time()
        try:
            yield
        finally:
            if self._inside.pop(ticket, None) is not None:
                self._left.unpark()

    def _has_room(self, now: float) -> bool:
        while self._inside:
            first = next(iter(self._inside))
            if now < self._inside[first] + self._longest:
                break
            del self._inside[first]
        return len(self._inside) < self._places
