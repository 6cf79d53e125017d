"""Looking at storage for several tasks at once, in as few threads as it takes.

Threads that make one short system call after the other hand the interpreter's lock to one another at every call, and
every hop to a thread and back costs as much as planning dozens of files. So while storage answers from memory one
thread does what all of them have asked for meanwhile, in one hop. As soon as it has to be waited for, there is a thread
for each, so that a disk or a file server sees many requests at a time.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")

# Threads that wait for storage side by side.
MOST = 16
# Hops without a wait for the disk before one thread does again what many did.
CALM = 64
# File systems whose reads the kernel counts in the thread that waits for them (or that never wait).
_COUNTED = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "ramfs", "tmpfs", "xfs"})

if sys.platform == "linux":
    import resource

    _KNOWN = True

    def _reads() -> int:
        """How often this thread has waited for a disk to read."""
        return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock

else:
    _KNOWN = False

    def _reads() -> int:
        return 0


class _Job(Generic[T]):
    __slots__ = ("done", "error", "function", "lot", "value")

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.done = False
        self.error: BaseException | None = None
        self.value: T
        # Where the task that asked for it waits: to wake all of them each time would cost more than most jobs do.
        self.lot = trio.lowlevel.ParkingLot()

    def run(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            # It is the asking task that ends by it.
            self.error = error
        self.done = True


class StorageThreads:
    """For one file system, by its name. All methods are called in the trio thread."""

    def __init__(self, file_system: str) -> None:
        self._counted = _KNOWN and file_system in _COUNTED
        # What nobody has begun. Threads take from it, too: each step of a deque is one step for all of them.
        self._waiting: deque[_Job[Any]] = deque()
        # What threads have done and nobody was told of yet.
        self._done: deque[_Job[Any]] = deque()
        self._token = trio.lowlevel.current_trio_token()
        # Threads at work, and pieces of work since the last that had to wait for the disk.
        self._threads = 0
        self._calm = CALM

    async def run(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, in a thread. Cancelling waits for one that has begun."""
        job = _Job(function)
        self._waiting.append(job)
        try:
            while not job.done:
                if self._waiting and self._threads < self._most:
                    await self._work()
                else:
                    await job.lot.park()
        finally:
            if not job.done:
                await self._give_up(job)
            # If it was the one whose turn it was, another is now.
            self._pass_on()
        if job.error is not None:
            raise job.error
        return job.value

    async def _give_up(self, job: _Job[T]) -> None:
        """Its task is cancelled: it is not begun, or, where a thread has taken it, awaited to its end."""
        try:
            self._waiting.remove(job)
        except ValueError:
            with trio.CancelScope(shield=True):
                while not job.done:
                    await job.lot.park()

    def _pass_on(self) -> None:
        """Wake as many of those whose jobs wait as may start threads."""
        room = self._most - self._threads
        if self._waiting and room > 0:
            # A copy is one step; threads take from it.
            for job in islice(self._waiting.copy(), room):
                job.lot.unpark()

    def _tell(self) -> None:
        """Wake those whose jobs are done."""
        while self._done:
            self._done.popleft().lot.unpark()

    @property
    def _most(self) -> int:
        return 1 if self._counted and self._calm >= CALM else MOST

    async def _work(self) -> None:
        self._threads += 1
        try:
            await trio.to_thread.run_sync(self._take)
        finally:
            self._threads -= 1
            self._tell()
            self._pass_on()

    def _take(self) -> None:
        """In a thread: do what waits, as long as something does and a thread alone is enough."""
        while True:
            try:
                job = self._waiting.popleft()
            except IndexError:
                return
            before = _reads()
            job.run()
            self._calm = 0 if _reads() != before else self._calm + 1
            self._done.append(job)
            if self._most > 1:
                return
            self._token.run_sync_soon(self._tell, idempotent=True)
