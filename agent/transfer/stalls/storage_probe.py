"""Whether a folder's storage takes anything at the moment: a file is made in it, synced and removed."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading

import trio

from agent.storage.handed import Handed

# How long (seconds) storage may take for that.
ANSWERS_WITHIN = 10.0


class StorageProbe:
    """Asks one question at a time; a call that hangs is not followed by another. The names of its files begin with
    ``names``, which is reserved and nobody else's. Called in the trio thread."""

    def __init__(self, names: bytes) -> None:
        self._names, self._numbers = names, itertools.count(1)
        self._last: _Call | None = None

    async def answers(self, folder: int) -> bool:
        """Whether the storage of the folder of this descriptor, which is duplicated, answers in time, if only with a
        refusal. Cancelling leaves the call to itself; it removes what it made."""
        if self._last is not None and not self._last.over:
            return False
        try:
            call = _Call(os.dup(folder), b"%s%x" % (self._names, next(self._numbers)))
        except OSError:
            # Nothing can be learned now.
            return False
        self._last = call
        try:
            with trio.move_on_after(ANSWERS_WITHIN):
                # With a limiter of its own: whoever hangs here takes no thread from others.
                await trio.to_thread.run_sync(call.make, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
                return True
            return False
        finally:
            call.leave()


class _Call:
    """One question. Its folder is closed by the thread that asks it, or where none begins, by whoever wanted that."""

    def __init__(self, folder: int, name: bytes) -> None:
        self._folder, self._name = folder, name
        self._lock = threading.Lock()
        self._taken = False
        self.over = False

    def make(self) -> None:
        """In the thread."""
        if self._take():
            try:
                _write(self._folder, self._name)
            finally:
                self._close()

    def leave(self) -> None:
        """A call that has not begun does not begin any more."""
        if self._take():
            self._close()

    def _take(self) -> bool:
        with self._lock:
            taken, self._taken = self._taken, True
        return not taken

    def _close(self) -> None:
        os.close(self._folder)
        self.over = True


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
