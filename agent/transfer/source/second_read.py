"""Reading what is sent a second time, past the page cache where the system allows, for collections that ask for it.

A digest says what was read, not what is stored: a bit that flips between a source's disk and its memory goes into the
digest, and everything after it agrees. Nobody but a second read can tell, or a checksum that was published before.
"""

from __future__ import annotations

from agent.storage import page_cache
from agent.storage.base import Root
from protocol.errors import RetryLater
from protocol.names import CollectionPath, format_path

# Read and compared in pieces of this size.
PIECE = 1024 * 1024


class SecondRead:
    """The second reads of one lane; holds one piece in memory."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._piece = bytearray(0)

    def check(self, descriptor: int, content: memoryview, offset: int, path: CollectionPath) -> None:
        """Read ``content`` again from where it came. Raises `RetryLater` (SOURCE_MISREAD) when it reads otherwise now,
        OSError when it does not read."""
        page_cache.forget(descriptor, offset, len(content))
        for start in range(0, len(content), PIECE):
            wanted = content[start : start + PIECE]
            if len(self._piece) != len(wanted):
                self._piece = bytearray(len(wanted))
            view, done = memoryview(self._piece), 0
            while done < len(wanted):
                count = self._root.preadv(descriptor, [view[done:]], offset + start + done)
                if not count:
                    break
                done += count
            if done < len(wanted) or self._piece != wanted:
                raise RetryLater(
                    f"{format_path(path)} was read twice at the source and was not the same both times, though nothing "
                    "changed it: the source's storage or memory errs. It is read again.",
                    code="SOURCE_MISREAD",
                    who="source owner",
                    subject=format_path(path),
                )
