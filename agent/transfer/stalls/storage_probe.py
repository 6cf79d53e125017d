"""Whether storage answers at the moment: one that is written to by a file that is made in it, synced and removed, any
other by a name that is looked for in a folder of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from functools import partial

import trio

from agent.storage.base import Root
from agent.storage.handed import Handed
from protocol.errors import TowpathError
from protocol.names import CollectionPath

# How long (seconds) storage may take for that.
ANSWERS_WITHIN = 10.0


class StorageProbe:
    """Asks one question at a time; a call that hangs is not followed by another. The names of its files begin with
    ``names``, which is reserved and nobody else's. Called in the trio thread. Cancelling leaves a call to itself."""

    def __init__(self, names: bytes) -> None:
        self._names, self._numbers = names, itertools.count(1)
        self._last: _Call | None = None

    async def answers(self, folder: int) -> bool | None:
        """Whether the storage of the folder of this descriptor, which is duplicated, takes a file in time, or refuses
        it; None when it cannot be asked now. Whatever becomes of the call, it removes what it made."""
        if self._hangs:
            return False
        try:
            own = os.dup(folder)
        except OSError:
            # It was closed meanwhile, or descriptors are short.
            return None
        name = b"%s%x" % (self._names, next(self._numbers))
        return await self._ask(_Call(partial(_write, own, name), partial(os.close, own)))

    async def looks(self, root: Root, path: CollectionPath) -> bool | None:
        """Whether it can be told in time what is at a path and beside it, or that nothing is; None when that cannot be
        asked now. Nothing is written."""
        return False if self._hangs else await self._ask(_Call(partial(_look, root, path), _nothing))

    @property
    def _hangs(self) -> bool:
        return self._last is not None and not self._last.over

    async def _ask(self, call: _Call) -> bool | None:
        self._last = call
        try:
            with trio.move_on_after(ANSWERS_WITHIN):
                # With a limiter of its own: whoever hangs here takes no thread from others.
                await trio.to_thread.run_sync(call.make, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
                return True
        finally:
            call.leave()
        # Nobody can tell what storage is like while there is no thread to ask it.
        return False if call.begun else None


class _Call:
    """One question: ``ask``, and then ``let_go`` of what it holds, by the thread that asks it, or where none begins, by
    whoever wanted it."""

    def __init__(self, ask: Callable[[], None], let_go: Callable[[], None]) -> None:
        self._ask, self._let_go = ask, let_go
        self._lock = threading.Lock()
        self._taken = False
        self.begun = self.over = False

    def make(self) -> None:
        """In the thread."""
        if self._take():
            self.begun = True
            try:
                self._ask()
            finally:
                self._end()

    def leave(self) -> None:
        """A call that has not begun does not begin any more."""
        if self._take():
            self._end()

    def _take(self) -> bool:
        with self._lock:
            taken, self._taken = self._taken, True
        return not taken

    def _end(self) -> None:
        self._let_go()
        self.over = True


def _nothing() -> None:
    """A look holds nothing."""


def _write(folder: int, name: bytes) -> None:
    # A refusal is an answer.
    with contextlib.suppress(OSError):
        try:
            descriptor = Handed().write_whole(folder, name, 0o600, memoryview(b"?"), None)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        finally:
            os.unlink(name, dir_fd=folder)


def _look(root: Root, path: CollectionPath) -> None:
    # A name that nobody remembers: for one that was looked for before, a file server need not be asked.
    name = b"towpath-looks-" + os.urandom(8).hex().encode()
    for folder in (path, path[:-1]):
        with contextlib.suppress(OSError, TowpathError), root.open_directory(folder) as handle:
            handle.lstat(name)
