"""Takes turns among callers: however many requests of one wait, the next one of another is not behind them all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio


@dataclass
class _Caller:
    places: trio.Semaphore
    there: int = 0


class Turns:
    """``each`` requests of one caller go on at a time, in the order they came; the others of theirs wait here."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._callers: dict[str, _Caller] = {}

    @asynccontextmanager
    async def of(self, caller: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it inside."""
        mine = self._callers.setdefault(caller, _Caller(trio.Semaphore(self._each)))
        mine.there += 1
        try:
            async with mine.places:
                yield
        finally:
            mine.there -= 1
            if not mine.there:
                del self._callers[caller]
