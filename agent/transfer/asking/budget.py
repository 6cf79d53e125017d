"""How much may be on its way: bytes asked for and not yet settled, the most a kill can cost."""

from __future__ import annotations

import trio

# A kill costs at most this much: it must stay below 64 MiB together with what sockets hold.
UNSETTLED_BYTES = 48 * 1024 * 1024
# A small file costs at least this much of the budget, which bounds their number too.
SMALLEST_CHARGE = 2048


class Budget:
    """A byte semaphore for one trio task group; waiters are served in order."""

    def __init__(self, total: int = UNSETTLED_BYTES) -> None:
        self.total = total
        self.used = 0
        self._lot = trio.lowlevel.ParkingLot()
        self._blocked = 0.0
        self._since: float | None = None

    @property
    def blocked(self) -> float:
        """Seconds so far in which somebody waited for room."""
        return self._blocked + (0.0 if self._since is None else trio.current_time() - self._since)

    def resize(self, total: int) -> None:
        """Another total from now on; what is on its way stays. No single amount may be larger than any total."""
        self.total = total
        self._lot.unpark()

    async def acquire(self, amount: int) -> None:
        """Wait until ``amount`` more fits; something larger than the whole budget waits until it is alone."""
        amount = min(amount, self.total)
        await trio.lowlevel.checkpoint()
        while self.used + amount > self.total or len(self._lot):
            await self._park()
            if self.used + amount <= self.total:
                break
        self.used += amount
        if self.used < self.total:
            self._lot.unpark()

    async def _park(self) -> None:
        if self._since is None:
            self._since = trio.current_time()
        try:
            await self._lot.park()
        finally:
            if not len(self._lot) and self._since is not None:
                self._blocked, self._since = self.blocked, None

    def release(self, amount: int) -> None:
        """Give back what `acquire` took. Must be called in the trio thread."""
        self.used -= min(amount, self.total)
        self._lot.unpark()


def charge(size: int) -> int:
    """What one small file costs."""
    return max(size, SMALLEST_CHARGE)
