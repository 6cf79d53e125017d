"""Whether a folder's storage takes anything at the moment: a file is made in it, synced and removed."""

from __future__ import annotations

import contextlib
import os

import trio

from agent.storage.handed import Handed

# How long (seconds) storage may take for that.
ANSWERS_WITHIN = 10.0


class StorageProbe:
    """Asks one question at a time; a call that hangs is not followed by another. Called in the trio thread."""

    def __init__(self) -> None:
        self._hanging = False

    async def answers(self, folder: int, name: bytes) -> bool:
        """Whether the storage of the folder of this descriptor, which is duplicated, answers in time, if only with a
        refusal. ``name`` is reserved and new. Cancelling leaves the call to itself; it removes what it made."""
        if self._hanging:
            return False
        try:
            own = os.dup(folder)
        except OSError:
            # Nothing can be learned now.
            return False
        self._hanging = True

        def ask() -> None:
            try:
                _write(own, name)
            finally:
                os.close(own)
                self._hanging = False

        with trio.move_on_after(ANSWERS_WITHIN):
            # With a limiter of its own: whoever hangs here takes no thread from others.
            await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
            return True
        return False


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
