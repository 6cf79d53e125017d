"""Lets a bounded number work at a time and the others wait in order, without those who dawdle holding anybody up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from protocol.errors import RetryLater


class WaitedTooLong(RetryLater):
    """There was no place in time."""

    default_code = "BUSY"


class Turnstile:
    """``places`` may be inside at a time. Whoever has been inside for ``longest`` seconds and still keeps us waiting
    stays, and no longer counts. Nobody is let in after ``patience`` seconds at the door: by then callers give up, and
    work for those who are gone would make the next ones wait as long."""

    def __init__(self, places: int, longest: float, patience: float) -> None:
        self._places = places
        self._longest = longest
        self._patience = patience
        # Who is inside, by when each began to count; so the first is the first whose time is over.
        self._inside: dict[_Visitor, float] = {}
        self._door = trio.Lock()
        self._left = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def turn(self, dawdles: Callable[[], bool]) -> AsyncIterator[None]:
        """Wait for a place, in the order of arrival, and hold it. ``dawdles`` says whether it is the visitor who keeps
        us waiting, and not we him. Raises `WaitedTooLong`."""
        visitor = _Visitor(dawdles)
        came = trio.current_time()
        async with self._door:
            # One waits here with a clock, everybody else at the door without.
            while not self._has_room(trio.current_time()):
                with trio.move_on_at(next(iter(self._inside.values())) + self._longest):
                    await self._left.park()
            if trio.current_time() - came > self._patience:
                raise WaitedTooLong("Too many agents connect at the same time; try again in a moment.")
            self._inside[visitor] = trio.current_time()
        try:
            yield
        finally:
            if self._inside.pop(visitor, None) is not None:
                self._left.unpark()

    def _has_room(self, now: float) -> bool:
        while self._inside:
            first = next(iter(self._inside))
            if now < self._inside[first] + self._longest:
                break
            del self._inside[first]
            if not first.dawdles():
                # It is our own slowness: letting more in would make it worse.
                self._inside[first] = now
        return len(self._inside) < self._places


class _Visitor:
    def __init__(self, dawdles: Callable[[], bool]) -> None:
        self.dawdles = dawdles
